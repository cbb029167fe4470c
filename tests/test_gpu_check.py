"""benchmarks/gpu_check.py and what it runs, as far as a CPU shows it."""

import json
import os
import sys

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.decode_cases import random_prompt
from benchmarks.device_exits import exit_race
from benchmarks.gpu_check import (
    PARTS,
    Part,
    problem_of_build,
    problem_of_sanitizer,
    problem_of_tests,
)
from benchmarks.op_timing import MAX_SETS, num_sets, op_rounds
from tests.models import tiny_model

TESTS = """
import os
import pytest

def test_passes(): pass
def test_fails(): assert os.environ["WHO"] == "nobody", "as planned"
@pytest.mark.skip(reason="here")
def test_skipped(): pass
"""


def run_pytest(tmp_path, choose):
    path = tmp_path / "test_samples.py"
    path.write_text(TESTS)
    command = gpu_check.pytest_command("--rootdir", str(tmp_path), "-k", choose, str(path))
    part = Part(command=command, limit=60, problem=problem_of_tests, variables={"WHO": "me"})
    result = gpu_check.run_part("sample", part, tmp_path)
    assert json.loads((tmp_path / "sample.json").read_text()) == json.loads(json.dumps(result))
    assert {p.name for p in tmp_path.glob("sample*")} == {"sample.json"}
    return result


def test_a_failure_is_kept_with_its_message(tmp_path):
    result = run_pytest(tmp_path, "test")
    assert result["status"] == "failed" and result["problem"] == "1 failed"
    assert result["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    (failed,) = (each for each in result["outcomes"] if each["outcome"] == "failed")
    assert failed["test"].endswith("::test_fails") and "as planned" in failed["message"]
    assert result["environment"]["torch"] == torch.__version__
    assert "-k test" in result["environment"]["command"]


def test_all_that_passed(tmp_path):
    result = run_pytest(tmp_path, "passes")
    assert (result["status"], result["problem"]) == ("passed", "")
    assert "1 passed" in result["log"]


def test_skipping_everything_is_no_pass(tmp_path):
    result = run_pytest(tmp_path, "skipped")
    assert (result["status"], result["problem"]) == ("failed", "no test ran")


def test_what_ran_is_kept_when_the_time_is_up(tmp_path):
    """But not a line that was cut."""
    script = """if True:
        import pathlib, sys, time
        lines = '{"test": "a", "outcome": "passed"}\\n{"test": "b", "out'
        pathlib.Path(sys.argv[1]).write_text(lines)
        time.sleep(60)
    """
    command = [sys.executable, "-I", "-S", "-c", script, gpu_check.OUTCOMES]
    result = gpu_check.run_part(
        "long", Part(command=command, limit=5, problem=problem_of_tests), tmp_path
    )
    assert (result["status"], result["problem"]) == ("timed out", "cut off after 5 s")
    assert result["counts"] == {"passed": 1}
    assert result["seconds"] < 50


def test_a_crash_without_a_failed_test_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "environment", lambda: {"commit": None})
    script = "print('so far'); raise SystemExit(3)"
    part = Part(command=[sys.executable, "-c", script], limit=60, problem=lambda *_: "")
    result = gpu_check.run_part("crash", part, tmp_path, "abc1234")
    assert result["environment"]["commit"] == "abc1234"
    assert (result["status"], result["problem"]) == ("failed", "exit code 3")
    assert result["log"] == "so far\n"


PASSED = [{"outcome": "passed"}]
CLEAN = "========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "outcomes", "problem"),
    [
        (4 * CLEAN, PASSED, ""),
        (4 * CLEAN + "========= ERROR SUMMARY: 3 errors", PASSED, "found 3 errors"),
        (
            4 * "=== RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n",
            PASSED,
            "found 8 errors or hazards",
        ),
        ("========= Invalid __global__ write of size 4 bytes\n", [], "found 1 errors"),
        ("no such device", PASSED, "gave 0 summaries for 4 workers"),
        (3 * CLEAN, PASSED, "gave 3 summaries"),
        (4 * CLEAN, [{"outcome": "failed"}], "1 failed"),
        (4 * CLEAN, [], "no test ran"),
    ],
)
def test_what_a_sanitizer_says(output, outcomes, problem):
    found = problem_of_sanitizer(output, outcomes)
    assert problem in found and bool(problem) == bool(found)


@pytest.mark.parametrize(("status", "problem"), [("built", ""), ("failed", "_C_cuda not built")])
def test_a_library_that_is_not_built_is_a_failure(tmp_path, monkeypatch, status, problem):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "lego_kernels").mkdir()
    libraries = {"_C_cpu": {"status": "built"}, "_C_cuda": {"status": status}}
    record = tmp_path / "lego_kernels" / "build_record.json"
    record.write_text(json.dumps({"libraries": libraries}))
    assert problem_of_build("", []) == problem
    record.unlink()
    assert problem_of_build("", []) == "the build left no record"


def test_a_missing_program_is_a_failure(tmp_path):
    part = Part(command=["no-such-sanitizer"], limit=60, problem=problem_of_sanitizer)
    result = gpu_check.run_part("memcheck", part, tmp_path)
    assert result["status"] == "failed" and "no-such-sanitizer" in result["problem"]
    assert (tmp_path / "memcheck.json").exists()


def test_each_nth_test(tmp_path):
    path = tmp_path / "test_many.py"
    path.write_text("import pytest\n@pytest.mark.parametrize('n', range(7))\ndef test(n): pass\n")
    command = gpu_check.pytest_command("--every", "3", "--rootdir", str(tmp_path), str(path))
    part = Part(command=command, limit=60, problem=problem_of_tests)
    outcomes = gpu_check.run_part("many", part, tmp_path)["outcomes"]
    assert [each["test"][-3:] for each in outcomes] == ["[0]", "[3]", "[6]"]


def test_needs_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_main_runs_the_parts_that_are_asked_for(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-c", "import os; raise SystemExit(int(os.environ['CODE']))"]
    parts = {
        str(code): Part(
            command=command, limit=60, problem=lambda *_: "", variables={"CODE": str(code)}
        )
        for code in (0, 1)
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "gpu_machine", dict)
    assert gpu_check.main(["--out", str(tmp_path), "--parts", "0"]) == 0
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert "exit code 1" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"0.json", "1.json"}


def test_parts_fit_8_minutes_and_name_what_exists():
    assert sum(part.limit for part in PARTS.values()) <= 8 * 60
    for part in PARTS.values():
        for word in part.command:
            if word.startswith(("tests", "benchmarks/")):
                assert os.path.exists(gpu_check.ROOT / word), word


def test_exit_race_of_every_ratio():
    model = tiny_model(dtype=torch.float32)
    race = exit_race(
        model,
        random_prompt(model.config, 8),
        24,
        criterion="gate",
        ratios=(0, 0.5, 1),
        modes=("host_branch",),
        num_rounds=2,
    )
    assert race["full_mode"] == "host_branch"
    assert [row["shallow_ratio"] for row in race["rows"]][::2] == [0, 1]
    costs = [row["true_cost"] for row in race["rows"]]
    assert costs == sorted(costs, reverse=True) and costs[0] > 1 > costs[-1]
    assert [row["over_host_branch"] for row in race["rows"]] == [[1, 1, 1]] * 3


def test_op_rounds_on_the_cpu():
    calls = []
    timed = op_rounds(lambda: {"ours": lambda: calls.append(1)}, device="cpu", moved_bytes=8)
    assert list(timed.rounds) == ["ours"] and timed.rounds["ours"]() > 0 and len(calls) > 10


@pytest.mark.parametrize(("moved_bytes", "sets"), [(1 << 30, 2), (10 << 20, 20), (1000, MAX_SETS)])
def test_sets_are_four_times_the_l2(moved_bytes, sets):
    assert num_sets(moved_bytes, 50 << 20) == sets
