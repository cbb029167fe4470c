"""How long one call of an op takes, on one CPU thread or on a GPU."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from lego_kernels.decoder.graph_step import captured

Call = Callable[[], object]
Providers = Callable[[], Mapping[str, Call]]  # each time over tensors of its own

ROUND_SECONDS = 2e-3  # of calls at least, so that neither the timer nor one synchronisation counts
MAX_SETS = 64
IN_GRAPH = ", in a graph"


def op_rounds(
    providers: Providers, *, device: str, moved_bytes: int
) -> dict[str, Callable[[], float]]:
    """A round of calls of each provider, which returns the seconds of one.

    On a GPU the calls take turns over sets of tensors that are twice its L2 together (64 sets at
    most), so that operands come from memory; flushing the cache instead would leave it full of
    what has to be written back while the op is timed. Besides plain calls, launched one by one,
    there is a graph of them for every provider that does not wait for the device.
    """
    if device == "cpu":
        return {name: _cpu_round(call) for name, call in providers().items()}
    sets = [providers() for _ in range(num_sets(moved_bytes, _l2_bytes()))]
    rounds = {}
    for name in sets[0]:
        calls = [each[name] for each in sets]
        run = functools.partial(_run, calls)
        rounds[name] = gpu_round(run, len(calls))
        if not waits(calls[0]):
            rounds[name + IN_GRAPH] = gpu_round(captured(run), len(calls))
    return rounds


def num_sets(moved_bytes: int, l2_bytes: int) -> int:
    return max(2, min(MAX_SETS, math.ceil(2 * l2_bytes / moved_bytes)))


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
    return min(timed(call, 1) for _ in range(5))


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


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
