"""All that only a GPU can show, in one command: python -m benchmarks.gpu_check --out FOLDER

Builds the native libraries, runs the tests marked `gpu`, compute-sanitizer over the ops, and the
benchmarks of ops and decode step. Needs a checkout, a CUDA build of torch, the CUDA toolkit, and
what `pip install -e .[dev]` installs. Each part is a process with a time limit, and leaves
FOLDER/part.json, also if it fails or is cut off; then the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import gpu_machine
from lego.environment import environment

ROOT = Path(__file__).parents[1]
LOG_CHARACTERS = 100_000  # of a part's output, from its end
OUTCOMES = "{outcomes}"  # in a command: the file for benchmarks.outcomes
SANITIZED_WORKERS = 4
# what a sanitizer says last of each process, and at once of what it finds
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_FOUND = re.compile(
    r"^=+ (?:Error|Invalid|Misaligned|Program hit|Race|Warning: Race)", re.MULTILINE
)
# those with kernels for CUDA
OPS = (
    *("compact", "decode_attention", "exit_decision", "exit_gate", "kv_append", "rms_norm"),
    *("rope_kv_append", "swiglu"),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command with a limit in seconds; `problem` says what is wrong with what it left, "" if
    nothing, from its output and the outcomes of its tests."""

    command: Sequence[str]
    limit: float
    problem: Callable[[str, Sequence[Mapping[str, Any]]], str]
    variables: Mapping[str, str] = field(default_factory=dict)


def problem_of_tests(output: str, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Tests that failed, or none that ran."""
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    if counts["failed"]:
        return f"{counts['failed']} failed"
    return "" if counts["passed"] else "no test ran"


def problem_of_sanitizer(output: str, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """What was found, a worker without a summary, or what is wrong with the tests."""
    summaries = [int(count) for count in _SUMMARY.findall(output)]
    if found := max(sum(summaries), len(_FOUND.findall(output))):
        return f"the sanitizer found {found} errors or hazards"
    if len(summaries) < SANITIZED_WORKERS:
        return f"the sanitizer gave {len(summaries)} summaries for {SANITIZED_WORKERS} workers"
    return problem_of_tests(output, outcomes)


def problem_of_build(output: str, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Libraries that are not built: the build itself goes on without them."""
    path = ROOT / "lego_kernels" / "build_record.json"
    if not path.exists():
        return "the build left no record"
    libraries = json.loads(path.read_text(encoding="utf-8"))["libraries"]
    missing = [name for name, each in libraries.items() if each["status"] != "built"]
    return f"{', '.join(missing)} not built" if missing else ""


def pytest_command(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
    return [*command, "-p", "benchmarks.outcomes", "--outcomes", OUTCOMES, *options]


def _sanitized(tool: str, limit: float) -> Part:
    """Every fifth op test, without torch's caching allocator, which would hide the ends of tensors;
    CUDA graphs need it, and property tests take too long."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
    tests = ["-m", "gpu", "-k", "not graph and not any_shape", "--every", "5", "tests/ops"]
    return Part(
        command=[*sanitizer, *pytest_command("-n", str(SANITIZED_WORKERS), *tests)],
        limit=limit,
        problem=problem_of_sanitizer,
        variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _benchmarks(*options: str, limit: float) -> Part:
    return Part(
        command=pytest_command("--benchmark-only", "--full", *options),
        limit=limit,
        problem=problem_of_tests,
    )


_OP_BENCHMARKS = [f"benchmarks/bench_{op}.py" for op in OPS]
# In this order; the limits add up to 8 minutes. The tests run the ops' benchmarks too, untimed, in
# parallel: that checks them, and leaves what they compile in the caches of torch and Triton.
PARTS: Mapping[str, Part] = {
    "build": Part(
        # a record of an older build would say nothing of this one
        command=[
            *("sh", "-c", 'rm -f lego_kernels/build_record.json && exec "$0" "$@"'),
            *(sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
        ],
        limit=90,
        problem=problem_of_build,
    ),
    "tests": Part(
        command=pytest_command(
            *("-m", "gpu", "-n", "6", "--full", *_OP_BENCHMARKS),
            *("tests/decoder", "tests/layers", "tests/ops"),
        ),
        limit=110,
        problem=problem_of_tests,
        variables={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
    ),
    "memcheck": _sanitized("memcheck", 50),
    "racecheck": _sanitized("racecheck", 40),
    "exits": _benchmarks("benchmarks/bench_device_decode.py", limit=100),
    "ops": _benchmarks("-k", "cuda", *_OP_BENCHMARKS, limit=90),
}


def run_part(name: str, part: Part, out: Path, commit: str | None = None) -> dict[str, Any]:
    """Run one part, and leave what is known of it in out/name.json.

    status: passed, failed, or timed out. `log` is the end of its output. commit: Of a copy of a
    checkout, which cannot tell itself.
    """
    outcomes_path, log_path = (out / f"{name}.{kind}" for kind in ("jsonl", "log"))
    command = [str(outcomes_path) if word == OUTCOMES else word for word in part.command]
    start, code = time.perf_counter(), _run(command, part, log_path)
    output = log_path.read_text(encoding="utf-8", errors="replace")
    outcomes = _outcomes(outcomes_path)
    problem = part.problem(output, outcomes)
    if isinstance(code, OSError):
        problem = str(code)
    elif code is None:
        problem = f"cut off after {part.limit:.0f} s" + (f"; {problem}" if problem else "")
    elif code != 0 and not problem:
        problem = f"exit code {code}"
    machine = environment() | {"command": shlex.join(command)} | gpu_machine()
    machine["commit"] = machine["commit"] or commit
    result = {
        "part": name,
        "status": "timed out" if code is None else "failed" if problem else "passed",
        "problem": problem,
        "seconds": time.perf_counter() - start,
        "environment": machine,
        "counts": Counter(outcome["outcome"] for outcome in outcomes),
        "outcomes": outcomes,
        "log": output[-LOG_CHARACTERS:],
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for path in (outcomes_path, log_path):
        path.unlink(missing_ok=True)
    return result


def _run(command: Sequence[str], part: Part, log_path: Path) -> int | OSError | None:
    """The exit code, or why it did not start, or None if the time was up: then all that it has
    started is ended too."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), f"{toolkit}/bin"))
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PATH": path} | part.variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return error
        try:
            return process.wait(part.limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # its group is not ours, so that Ctrl-C would leave it running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _outcomes(path: Path) -> list[dict[str, Any]]:
    """The tests that ended; a last line may have been cut."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for a JSON of each part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, help="seconds for each part, not its own limit")
    parser.add_argument("--commit", help="what this is a copy of, where it has no .git")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu_check: needs a CUDA GPU; torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    console = Console(width=120)
    for name in options.parts:
        part = PARTS[name]
        if options.limit:
            part = Part(**vars(part) | {"limit": options.limit})
        console.print(f"{name}, {part.limit:.0f} s at most", highlight=False)
        results.append(run_part(name, part, options.out.resolve(), options.commit))
    console.print(summary(results))
    return int(any(result["status"] != "passed" for result in results))


def summary(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("part", "status", "seconds", "passed", "skipped", "problem")
    for result in results:
        counts = result["counts"]
        table.add_row(
            result["part"],
            result["status"],
            f"{result['seconds']:.0f}",
            *(str(counts.get(outcome, 0)) for outcome in ("passed", "skipped")),
            result["problem"],
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
