"""What a result was measured on."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch


def environment() -> dict[str, Any]:
    """Versions, machine and command, to be written beside every result."""
    return {
        "lego": _lego_version(),
        "commit": _commit(),
        "command": shlex.join(["lego", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "device": "cpu",
    }


def _lego_version() -> str:
    try:
        return version("lego-early-exit")
    except PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, its architecture otherwise."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that lego runs from, marked if it has changes; None without."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
