"""setup.py on machines that can compile everything, something and nothing."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def toolkit_problem() -> str:
    try:
        SETUP["find_cuda_home"]()
    except FileNotFoundError as error:
        return str(error)
    return ""


def build(folder: Path, **environment: str) -> dict:
    """Build both packages into `folder`; return the libraries' part of the build record."""
    stages = [f"--build-lib={folder}", f"--build-temp={folder}.temp"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", *stages],
        cwd=ROOT,
        env=os.environ | {"LEGO_FORCE_CUDA": "0"} | environment,
        check=True,
    )
    return json.loads((folder / "lego_kernels" / "build_record.json").read_text())["libraries"]


def python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder)} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def undefined_symbols(library: Path) -> list[str]:
    command = ["nm", "--dynamic", "--demangle", "--undefined-only", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]


def assert_stable_abi(library: Path) -> None:
    symbols = undefined_symbols(library)
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if re.search(r"\b(at|c10|torch|caffe2)::", symbol)]


def test_failing_compiler_leaves_a_working_install(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho broken on purpose >&2\nexit 1\n")
    compiler.chmod(0o755)
    built = tmp_path / "built"
    record = build(built, CXX=str(compiler))
    assert record["_C_cpu"]["status"] == "failed"
    assert "broken on purpose" in "\n".join(record["_C_cpu"]["output"])
    assert not list(built.rglob("*.so"))

    report = "import json, sys; from lego.doctor import *; sys.exit(print_diagnosis(diagnose()))"
    done = python(built, report, COLUMNS="200")
    assert done.returncode == 1, done.stderr
    assert "broken on purpose" in done.stdout and "Fix: " in done.stdout
    assert done.stderr.count("the native CPU kernels are not loaded") == 1
    refused = python(built, "import lego_kernels", LEGO_BACKEND="native")
    assert "ImportError: LEGO_BACKEND=native: the native CPU kernels" in refused.stderr


def test_missing_toolkit_costs_the_cuda_library_alone(tmp_path):
    record = build(tmp_path / "built", LEGO_FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert record["_C_cpu"] == {"status": "built"}
    assert record["_C_cuda"]["status"] == "failed"
    assert f"must hold nvcc, headers and libcudart, got {tmp_path}" in record["_C_cuda"]["reason"]


@pytest.mark.skipif(bool(toolkit_problem()), reason=toolkit_problem())
def test_both_libraries_use_the_stable_abi_alone(tmp_path, capfd):
    built = tmp_path / "built"
    arches = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    record = build(built, LEGO_FORCE_CUDA="1", **arches)
    assert record == {"_C_cpu": {"status": "built"}, "_C_cuda": {"status": "built"}}
    for name in SETUP["NAMES"]:
        assert_stable_abi(built / "lego_kernels" / f"{name}.abi3.so")
    output = capfd.readouterr().out
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in output
    assert "for 'sm_80'" in output and "for 'sm_90'" in output
    spills = re.findall(r"(\d+) bytes spill", output)
    assert spills and set(spills) == {"0"}, output


def test_toolkit_is_not_guessed_from_a_wrapper(tmp_path, monkeypatch):
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert shutil.which("nvcc") == str(wrapper)
    if not (problem := toolkit_problem()):
        assert SETUP["find_cuda_home"]() != tmp_path
    else:
        assert str(tmp_path) in problem


def test_backend_asks_for_torch_only_where_there_is_none():
    code = "import sys; sys.path.insert(0, 'build_backend'); import lego_build as b; print({})"
    hook = "b.get_requires_for_build_wheel()"
    command = [sys.executable, "-c", code.format(hook)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    hidden = f"(setattr(b.importlib.util, 'find_spec', lambda name: None), {hook})[1]"
    command = [sys.executable, "-c", code.format(hidden)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch>=2.10']"
