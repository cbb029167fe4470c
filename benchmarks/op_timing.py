"""How long one call of an op takes, on one CPU thread or on a GPU."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from lego_kernels.decoder.graph_step import captured

Call = Callable[[], object]
Providers = Callable[[], Mapping[str, Call]]  # each time over tensors of its own

ROUND_SECONDS = 2e-3  # of calls at least, so that neither the timer nor one synchronisation counts
MAX_SETS = 64
IN_GRAPH = ", in a graph"


class OpRounds(NamedTuple):
    """By provider a round of calls, which returns the seconds of one; and what goes with them."""

    rounds: dict[str, Callable[[], float]]
    num_sets: int  # of tensors that the calls take turns over
    not_in_graph: dict[str, str]  # providers without such rounds, and why


def op_rounds(providers: Providers, *, device: str, moved_bytes: int) -> OpRounds:
    """Rounds of plain calls, launched one by one, and on a GPU of a CUDA graph of them too.

    There the calls take turns over sets of tensors that are four times its L2 together, as far as
    64 sets reach, so that large operands come from memory. Flushing the cache instead would leave
    it full of what has to be written back while the op is timed.
    """
    if device == "cpu":
        rounds = {name: _cpu_round(call) for name, call in providers().items()}
        return OpRounds(rounds, 1, {})
    sets = [providers() for _ in range(num_sets(moved_bytes, l2_bytes()))]
    rounds, not_in_graph = {}, {}
    for name in sets[0]:
        calls = [each[name] for each in sets]
        run = functools.partial(_run, calls)
        rounds[name] = gpu_round(run, len(calls))
        try:
            if waits(calls[0]):
                not_in_graph[name] = "the host waits for the device"
            else:
                rounds[name + IN_GRAPH] = gpu_round(captured(run), len(calls))
        except RuntimeError as error:
            not_in_graph[name] = str(error)
    return OpRounds(rounds, len(sets), not_in_graph)


def num_sets(moved_bytes: int, l2_bytes: int) -> int:
    return max(2, min(MAX_SETS, math.ceil(4 * l2_bytes / moved_bytes)))


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def waits(call: Call) -> bool:
    """Whether it makes the host wait for the device, which no graph can hold."""
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


@functools.cache
def read_bandwidth(device: str) -> float:
    """Bytes per second that a float32 sum reads; the best of five."""
    x = torch.ones(_large(device), device=device)
    return x.nbytes / _best(x.sum, device)


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes, both counted; the best of five."""
    x = torch.ones(_large(device), device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _best(lambda: y.copy_(x), device)


def _large(device: str) -> int:
    return 64 << 20 if device == "cpu" else 256 << 20


def _best(call: Call, device: str) -> float:
    timed = _timed_on_cpu if device == "cpu" else _timed_on_gpu
    call()
    return min(timed(call, 8) for _ in range(5))  # a launch counts for nothing then


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _cpu_round(call: Call) -> Callable[[], float]:
    call()
    times = _times(_timed_on_cpu(call, 1))
    return lambda: _timed_on_cpu(call, times)


def gpu_round(work: Call, num_calls: int) -> Callable[[], float]:
    """Rounds of work that is so many calls."""
    work()
    times = _times(_timed_on_gpu(work, 1))
    return lambda: _timed_on_gpu(work, times) / num_calls


def _times(seconds: float) -> int:
    return max(1, min(1000, round(ROUND_SECONDS / seconds)))


def _timed_on_cpu(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _timed_on_gpu(call: Call, times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times
