"""The one torch.library.Library, the loading of the native libraries, and the choice of backend.

Every op has its schema, its fake and a plain torch implementation in Python; the torch one serves
any device (CompositeExplicitAutograd). A native library, or Triton, adds a kernel for one device
key, which the dispatcher then prefers. So choosing a backend means loading a library or not:

LEGO_BACKEND=auto       load what is there and say once, in the log, why something is not (default)
LEGO_BACKEND=native     a library that this machine could use but cannot load is an ImportError
LEGO_BACKEND=reference  load nothing: every op runs its plain torch implementation

The native CPU kernels take the best instruction set that this CPU has; LEGO_CPU_ISA=scalar, avx2,
avx512 or avx512_bf16 names another, and is a ValueError where the CPU lacks it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

BACKENDS = ("auto", "native", "reference")
CPU_ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")  # each includes those before it
LIB = torch.library.Library("lego_kernels", "DEF")
LIB.define("cpu_isa(str name) -> str")

_log = logging.getLogger("lego_kernels")
_folder = Path(__file__).parent


def _requested_backend() -> str:
    backend = os.environ.get("LEGO_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"LEGO_BACKEND: must be one of {', '.join(BACKENDS)}, got {backend}")
    return backend


def build_record() -> dict[str, Any]:
    """Return what setup.py noted about the native build; empty if nothing was ever built here."""
    path = _folder / "build_record.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> str:
    """Load one native library; return why it is not loaded, or an empty string."""
    if BACKEND == "reference":
        return "LEGO_BACKEND=reference"
    path = _folder / f"{name}.abi3.so"
    if not path.exists():
        outcome = build_record().get("libraries", {}).get(name, {})
        return outcome.get("reason", "it was never built")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error)
    return ""


def _load_native() -> dict[str, str]:
    unloaded = {"CPU": _load("_C_cpu")}
    # the CUDA library links libtorch_cuda, which a torch without CUDA lacks
    cuda = torch.version.cuda is not None
    unloaded["CUDA"] = _load("_C_cuda") if cuda else "torch is built without CUDA"
    usable = ["CPU"] + ["CUDA"] * torch.cuda.is_available()
    for key in usable:
        if not unloaded[key] or BACKEND == "reference":
            continue
        _miss(f"the native {key} kernels are not loaded ({unloaded[key]})")
    if torch.cuda.is_available() and TRITON_PROBLEM and BACKEND != "reference":
        _miss(f"the Triton kernels are not registered ({TRITON_PROBLEM})")
    return unloaded


def _triton_problem() -> str:
    """Why the Triton kernels are not registered for CUDA, "" if they are."""
    if BACKEND == "reference":
        return "LEGO_BACKEND=reference"
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _miss(problem: str) -> None:
    """Raise for a kernel that this machine could use, if the backend is `native`; log it else."""
    if BACKEND == "native":
        raise ImportError(f"LEGO_BACKEND=native: {problem}; see `lego doctor`")
    _log.warning("%s: those ops run as plain PyTorch; see `lego doctor`", problem)


BACKEND = _requested_backend()
TRITON_PROBLEM = _triton_problem()  # "" where lego_kernels.triton serves CUDA tensors
NOT_LOADED = _load_native()  # by dispatch key: why its native library is absent, "" if loaded
if not NOT_LOADED["CPU"]:
    _BEST_CPU_ISA = torch.ops.lego_kernels.cpu_isa("best")
    torch.ops.lego_kernels.cpu_isa(os.environ.get("LEGO_CPU_ISA", "best"))


def define_op(schema: str, plain_torch: Callable[..., None]) -> Any:
    """Define an op that writes to its arguments and returns nothing; return its overload.

    plain_torch serves each device that no kernel is added for. The fake has nothing to make.
    """
    name = schema.partition("(")[0]
    LIB.define(schema)
    LIB.impl(name, plain_torch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lego_kernels::{name}", lambda *arguments: None, lib=LIB)
    return getattr(torch.ops.lego_kernels, name).default


def cpu_isa() -> str:
    """Return the instruction set that the native CPU kernels run on; empty if not loaded."""
    return "" if NOT_LOADED["CPU"] else torch.ops.lego_kernels.cpu_isa("")


def cpu_isas() -> tuple[str, ...]:
    """Return what the native CPU kernels can run on here, best last; empty if not loaded."""
    if NOT_LOADED["CPU"]:
        return ()
    return CPU_ISAS[: CPU_ISAS.index(_BEST_CPU_ISA) + 1]


@contextlib.contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Make the native CPU kernels of the whole process run on one instruction set for a while.

    Raises: ValueError if this CPU lacks it; RuntimeError if the CPU kernels are not loaded.
    """
    if NOT_LOADED["CPU"]:
        raise RuntimeError(f"use_cpu_isa: needs the CPU kernels, got {NOT_LOADED['CPU']}")
    before = cpu_isa()
    torch.ops.lego_kernels.cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.lego_kernels.cpu_isa(before)


def backend_of(op: str, device_type: str) -> Literal["native", "reference"]:
    """Say whether a kernel of its own or the plain torch implementation serves `op` there."""
    own = torch._C._dispatch_has_kernel_for_dispatch_key(f"lego_kernels::{op}", device_type.upper())
    return "native" if own else "reference"


def why_backend(op: str, device_type: str) -> str:
    """Say in a few words why backend_of is what it is."""
    if BACKEND == "reference":
        return "LEGO_BACKEND=reference"
    if backend_of(op, device_type) == "native":
        return "has a kernel of its own"
    unloaded = NOT_LOADED.get(device_type.upper(), "")
    if not unloaded and device_type == "cuda":
        unloaded = TRITON_PROBLEM
    return unloaded or f"plain torch is its kernel on {device_type}"


def refuse_grad(op: str, *tensors: Tensor) -> None:
    """Raise RuntimeError in grad mode if an input requires grad: it would silently get none."""
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if tensor.requires_grad:
            raise RuntimeError(
                f"{op}: is inference only, so no input may require grad in grad mode"
            )
