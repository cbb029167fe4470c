"""`lego doctor`: what is installed, which backend each op runs on and why, and what to repair."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from json import dumps
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lego.self_tests import SELF_TESTS

REINSTALL = "repair what the build record names, then run `pip install -e .` again"


@dataclass(frozen=True, kw_only=True)
class OpReport:
    """One op on one device: what runs it, why, and how its self-test went."""

    op: str
    device: str
    backend: str
    why: str
    error: str  # empty if the op agrees with its reference in lego.ops


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """How the native engine steps on one device, and why not better."""

    device: str
    mode: str
    why: str
    error: str  # empty if it generates what the reference does


@dataclass(frozen=True, kw_only=True)
class Problem:
    what: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    versions: dict[str, str]
    build: dict[str, Any]  # setup.py's record of the native build; empty if there is none
    ops: list[OpReport]
    engines: list[EngineReport]
    problems: list[Problem]


def diagnose() -> Diagnosis:
    """Look at the installation and run every op once against its reference in lego.ops."""
    diagnosis = Diagnosis(versions=_versions(), build={}, ops=[], engines=[], problems=[])
    problems = diagnosis.problems
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        what = "an NVIDIA driver is installed, but torch sees no GPU"
        problems.append(Problem(what=what, fix="install a torch with CUDA that suits the driver"))
    try:
        import lego_kernels
        from lego_kernels import library
    except (ImportError, ValueError) as error:
        fix = "unset LEGO_BACKEND, then run `lego doctor` again"
        problems.append(Problem(what=str(error), fix=fix))
        return diagnosis

    diagnosis.versions["CPU kernels run on"] = library.cpu_isa() or "not loaded"
    diagnosis.build.update(library.build_record())
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        unloaded = library.NOT_LOADED[device.upper()]
        if unloaded and library.BACKEND != "reference":
            what = f"the native {device} library is not loaded: {unloaded}"
            problems.append(Problem(what=what, fix=REINSTALL))
        for op, self_test in SELF_TESTS.items():
            report = OpReport(
                op=op,
                device=device,
                backend=library.backend_of(op, device),
                why=library.why_backend(op, device),
                error=_error(self_test, getattr(lego_kernels, op), device),
            )
            diagnosis.ops.append(report)
            if report.error:
                what = f"{op} on {device} ({report.backend}): {report.error}"
                problems.append(Problem(what=what, fix="set LEGO_BACKEND=reference, and report it"))
        engine = _engine_report(device)
        diagnosis.engines.append(engine)
        if engine.error:
            what = f"the native engine on {device}: {engine.error}"
            problems.append(Problem(what=what, fix="use --engine reference, and report it"))
    return diagnosis


def _engine_report(device: str) -> EngineReport:
    from lego.engine import agrees_with_reference, native_mode

    mode, why = native_mode(device)
    error = _error(agrees_with_reference, device) if mode else ""
    return EngineReport(device=device, mode=mode or "none", why=why, error=error)


def print_diagnosis(diagnosis: Diagnosis, json: bool = False) -> int:
    """Print for people, or as one JSON object; return 1 if there is a problem, else 0."""
    if json:
        print(dumps(asdict(diagnosis), indent=2))
    else:
        _print_tables(diagnosis, Console())
    return 1 if diagnosis.problems else 0


def _print_tables(diagnosis: Diagnosis, console: Console) -> None:
    libraries = diagnosis.build.get("libraries", {})
    console.print(
        _table("Versions", ("what", "version"), diagnosis.versions.items()),
        _table(
            "Native build",
            ("library", "status", "reason"),
            ((name, made["status"], made.get("reason", "")) for name, made in libraries.items()),
        ),
        _table(
            "Ops",
            ("op", "device", "backend", "why", "self-test"),
            ((r.op, r.device, r.backend, r.why, r.error or "agrees") for r in diagnosis.ops),
        ),
        _table(
            "Native engine",
            ("device", "mode", "why", "self-test"),
            (
                (r.device, r.mode, r.why, "-" if r.mode == "none" else r.error or "agrees")
                for r in diagnosis.engines
            ),
        ),
    )
    for name, made in libraries.items():
        if made.get("output"):
            console.print(Text(f"What the compiler said about {name}", style="bold"))
            console.print(Text("\n".join(made["output"])))
    for problem in diagnosis.problems:
        console.print(Text(f"Problem: {problem.what}", style="red"))
        console.print(Text(f"    Fix: {problem.fix}"))
    if not diagnosis.problems:
        console.print(Text("No problem found.", style="green"))


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # Text, since rich reads brackets in a str as markup
    return table


def _versions() -> dict[str, str]:
    return {
        "lego": _installed("lego-early-exit"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "compiler": _output(*os.environ.get("CXX", "g++").split(), "--version")[0],
        "nvcc": _output("nvcc", "--version")[-1],
        "CUDA of torch": torch.version.cuda or "none",
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible",
    }


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"not usable: {error}"]
    return done.stdout.splitlines() or [""]


def _error(self_test: Callable[..., bool], *arguments: Any) -> str:
    try:
        return "" if self_test(*arguments) else "differs from its reference"
    except (RuntimeError, ValueError) as error:
        return str(error)
