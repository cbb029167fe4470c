"""`lego doctor` on a sound install, with a wrong op, and with an unusable backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lego_kernels
from lego import doctor, engine
from lego_kernels import library

ROOT = Path(lego_kernels.__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "lego_kernels/ops").glob("[a-z]*.py"))


def test_sound_install(capsys):
    diagnosis = doctor.diagnose()
    cpu = [report for report in diagnosis.ops if report.device == "cpu"]
    assert [report.op for report in cpu] == OPS  # no op without a self-test
    assert all(report.backend == "native" for report in cpu)
    assert all(report.error == "" for report in diagnosis.ops)
    assert diagnosis.versions["python"].startswith("3.")
    assert doctor.print_diagnosis(diagnosis) == len(diagnosis.problems) == 0
    assert "No problem found" in capsys.readouterr().out


def test_json(capsys):
    assert doctor.print_diagnosis(doctor.diagnose(), json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ops"][0]["backend"] == library.backend_of(OPS[0], "cpu")
    assert printed["build"] == library.build_record()


def test_wrong_op_is_found(monkeypatch, capsys):
    monkeypatch.setattr(lego_kernels, "kv_append", lambda *tensors: None)
    diagnosis = doctor.diagnose()
    assert diagnosis.problems[0].what.endswith("differs from its reference")
    assert doctor.print_diagnosis(diagnosis) == 1
    assert "Fix: set LEGO_BACKEND=reference" in capsys.readouterr().out


def test_failing_op_is_found(monkeypatch):
    def fail(*tensors):
        raise RuntimeError("no kernel image [sm_30]")

    monkeypatch.setattr(lego_kernels, "kv_append", fail)
    assert "no kernel image [sm_30]" in doctor.diagnose().problems[0].what


def test_unusable_backend_is_reported():
    code = "from lego.doctor import *; print(print_diagnosis(diagnose()))"
    environment = os.environ | {"LEGO_BACKEND": "fast", "COLUMNS": "200"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "LEGO_BACKEND: must be one of auto, native, reference, got fast" in done.stdout
    assert "Fix: unset LEGO_BACKEND" in done.stdout
    assert done.stdout.endswith("1\n")


def test_native_engine_is_tried(monkeypatch, capsys):
    (report,) = [r for r in doctor.diagnose().engines if r.device == "cpu"]
    assert (report.mode, report.error) == ("decode_step", "")
    monkeypatch.setattr(engine, "agrees_with_reference", lambda device: False)
    diagnosis = doctor.diagnose()
    assert diagnosis.problems[0].what == "the native engine on cpu: differs from its reference"
    assert doctor.print_diagnosis(diagnosis) == 1
    assert "Fix: use --engine reference" in capsys.readouterr().out
