"""A decode step whose later parts run only if the device says so, with and without CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor

from lego_kernels.library import LIB, NOT_LOADED, backend_of

# Best first.
# conditional: one graph, the later parts in IF nodes, whose predicate a kernel sets on the device.
# segments: a graph for each part; the host waits for the flags, and the device then for the host.
# host_branch: plain calls, on any device; the host waits for the flags.
Mode = Literal["conditional", "segments", "host_branch"]
MODES: tuple[Mode, ...] = get_args(Mode)

# what a step calls that may run as plain torch, which allocates
OPS = ("rms_norm", "rope_kv_append", "decode_attention", "swiglu", "exit_gate", "exit_decision")

# csrc/cuda/conditional.cu, which is their only kernel. The current stream captures; depth counts
# the IF nodes around this one, and the body is captured on if_stream(predicate, depth).
LIB.define("if_stream(Tensor predicate, int depth) -> int")
LIB.define("begin_if(Tensor predicate, int depth) -> ()")
LIB.define("end_if(Tensor predicate, int depth) -> ()")
_ops = torch.ops.lego_kernels


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """`before`; if flags[0] `fill`, and then, if flags[1] too, `deep`; `after`.

    flags: bool [2], which `before` writes; None where every part always runs. With CUDA graphs no
    part may allocate, wait or do on the host what has to be done in each step.
    """

    before: Callable[[], None]
    fill: Callable[[], None]
    deep: Callable[[], None]
    after: Callable[[], None]
    flags: Tensor | None

    def all(self) -> None:
        for part in (self.before, self.fill, self.deep, self.after):
            part()


def choose_mode(mode: str, device: torch.device, *, filters: bool = False) -> tuple[Mode, str]:
    """The mode to use, and why it is not a better one.

    mode: a Mode, or `auto` for the best that works. filters: tokens are drawn with top_k or top_p.
    Raises: ValueError if the mode is unknown, or does not work here.
    """
    problems = mode_problems(device, filters=filters)
    if mode != "auto" and mode not in MODES:
        raise ValueError(f"DeviceDecoder: mode must be auto or one of {MODES}, got {mode!r}")
    if problem := problems.get(mode, ""):  # type: ignore[call-overload]
        raise ValueError(f"DeviceDecoder: mode {mode} must work here, but {problem}")
    chosen = next(name for name in MODES if mode == name or (mode == "auto" and not problems[name]))
    better = MODES[: MODES.index(chosen)]
    missed = [f"not {name}: {problems[name] or 'another was asked for'}" for name in better]
    return chosen, "; ".join(missed) or "IF nodes work here"


def mode_problems(device: torch.device, *, filters: bool = False) -> dict[Mode, str]:
    """Why each mode does not work, "" for one that does."""
    plain = [op for op in OPS if backend_of(op, device.type) == "reference"]
    problem = ""
    if device.type != "cuda":
        problem = f"a CUDA graph needs a CUDA device, got {device.type}"
    elif filters:
        problem = "top_k and top_p allocate, which a captured step must not"
    elif plain:
        problem = f"{', '.join(plain)} run as plain torch, which allocates"
    conditional = problem or conditional_problem(device)
    return {"conditional": conditional, "segments": problem, "host_branch": ""}


@functools.cache
def conditional_problem(device: torch.device) -> str:
    """Why IF nodes do not work on a CUDA device, "" if a graph with two does what it should."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lego_kernels::begin_if", "CUDA"):
        return NOT_LOADED["CUDA"] or "the CUDA library was compiled by a CUDA before 12.4"
    if torch._C._cuda_getDriverVersion() < 12040:  # type: ignore[attr-defined]
        return "the driver is older than CUDA 12.4"
    try:
        with torch.cuda.device(device):
            return _problem_of_if_nodes(device)
    except torch.cuda.OutOfMemoryError:
        raise  # says nothing about IF nodes
    except RuntimeError as error:
        return str(error).partition("\n")[0]


def _problem_of_if_nodes(device: torch.device) -> str:
    flags = torch.zeros(2, dtype=torch.bool, device=device)
    runs = torch.zeros(4, dtype=torch.int64, device=device)

    def counted(part: int) -> Callable[[], None]:
        def run() -> None:
            runs[part].add_(1)

        return run

    before, fill, deep, after = map(counted, range(4))
    step = _conditional(
        StepParts(before=before, fill=fill, deep=deep, after=after, flags=flags), flags
    )
    for fills, stays in product((False, True), repeat=2):
        flags.copy_(torch.tensor([fills, stays]))
        runs.zero_()
        step()
        got, wanted = runs.tolist(), [1, int(fills), int(fills and stays), 1]
        if got != wanted:
            return f"the parts of a graph with IF nodes ran {got} times, not {wanted}"
    return ""


def step_in_mode(mode: Mode, parts: StepParts) -> Callable[[], None]:
    """A call that runs one step, on the current device; CUDA graphs run each part before that.

    Graphs of a device share the workspaces of cuBLAS: their steps must not run at the same time.
    """
    if mode == "host_branch":
        return functools.partial(_run_on_host, parts)
    if parts.flags is None:
        return captured(parts.all)
    return _segments(parts) if mode == "segments" else _conditional(parts, parts.flags)


def _run_on_host(parts: StepParts) -> None:
    parts.before()
    _run_rest(parts, (True, True) if parts.flags is None else parts.flags.tolist())


def _run_rest(parts: StepParts, flags: tuple[bool, bool] | list[bool]) -> None:
    fill, deep = flags
    if fill:
        parts.fill()
        if deep:
            parts.deep()
    parts.after()


def _segments(parts: StepParts) -> Callable[[], None]:
    assert parts.flags is not None
    flags = parts.flags
    seen = torch.zeros(2, dtype=torch.bool, pin_memory=True)
    arrived = torch.cuda.Event()
    graphs = StepParts(
        before=captured(parts.before),
        fill=captured(parts.fill),
        deep=captured(parts.deep),
        after=captured(parts.after),
        flags=flags,
    )

    def step() -> None:
        graphs.before()
        seen.copy_(flags, non_blocking=True)
        arrived.record()
        arrived.synchronize()
        _run_rest(graphs, seen.tolist())

    return step


def _conditional(parts: StepParts, flags: Tensor) -> Callable[[], None]:
    must_fill, must_deepen = flags[:1], flags[1:]

    def capture() -> None:
        parts.before()
        with if_node(must_fill, 0):
            parts.fill()
            with if_node(must_deepen, 1):
                parts.deep()
        parts.after()

    # where cuBLAS has no workspace for a stream yet it would allocate one in the body's capture
    torch.cuda.synchronize()
    for part, predicate, depth in ((parts.fill, must_fill, 0), (parts.deep, must_deepen, 1)):
        with torch.cuda.stream(body_stream(predicate, depth)):
            part()
        torch.cuda.synchronize()
    return captured(capture, warm_up=parts.all)


def captured(
    work: Callable[[], None], *, warm_up: Callable[[], None] | None = None
) -> Callable[[], None]:
    """A replay of a graph of the work, captured after one run of it, or of warm_up."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        (warm_up or work)()
    # what other threads do meanwhile, such as pinning memory, is no error
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


@functools.cache
def _capture_stream(device_index: int) -> torch.cuda.Stream:
    """One for all graphs of a device: cuBLAS keeps some 32 MiB for each stream it has seen."""
    return torch.cuda.Stream(device_index)


def body_stream(predicate: Tensor, depth: int) -> torch.cuda.ExternalStream:
    address = _ops.if_stream.default(predicate, depth)
    return torch.cuda.ExternalStream(address, device=predicate.device)


@contextmanager
def if_node(predicate: Tensor, depth: int) -> Iterator[None]:
    """What is launched inside becomes the body of an IF node of the graph being captured."""
    _ops.begin_if.default(predicate, depth)
    try:
        with torch.cuda.stream(body_stream(predicate, depth)):
            yield
    finally:
        _ops.end_if.default(predicate, depth)
