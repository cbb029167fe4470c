"""How every op is timed: all providers in turn, in one process, checked first (`compare`)."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from lego.environment import environment
from lego.timing import Spread, paired_seconds, ratio_spread
from tests.conftest import pytest_collection_modifyitems

__all__ = ["compare", "pytest_collection_modifyitems"]  # the latter skips what needs a GPU

ROUNDS = 9
ROUND_SECONDS = 2e-3  # of calls at least, so that neither the timer nor one synchronisation counts
L2_BYTES = 256 << 20  # more than any GPU's; writing as much empties it

_rows: list[tuple[str, ...]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every shape, not the usual ones alone")
    parser.addoption("--run", help="a run folder, for what needs a trained model")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark takes `case` from its module's CASES; with --full also from MORE_CASES."""
    if "case" in metafunc.fixturenames:
        more = getattr(metafunc.module, "MORE_CASES", [])
        cases = metafunc.module.CASES + (more if metafunc.config.getoption("--full") else [])
        metafunc.parametrize("case", cases, ids=lambda case: "x".join(map(str, case)))


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Time providers against each other, on one CPU thread or on the GPU.

    compare(providers, device=..., moved_bytes=...): `providers` maps names to calls without
    arguments, "ours" among them; moved_bytes is what must be read and written at least. Medians,
    quartiles, GB/s, the share of the measured read bandwidth and the paired speed-up of ours over
    each provider go to extra_info and to a table at the end.
    """

    def run(providers: dict[str, Callable[[], object]], *, device: str, moved_bytes: int) -> None:
        if not benchmark.enabled:
            return
        calls = _calls_per_round(providers["ours"], device)
        variants = {name: _timed(call, calls, device) for name, call in providers.items()}
        seconds = paired_seconds(variants, num_rounds=ROUNDS)
        benchmark.pedantic(providers["ours"], rounds=3, iterations=calls)
        bandwidth = read_bandwidth(device)
        benchmark.extra_info |= {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread",
            "bytes": moved_bytes,
            "read_gb_per_s": bandwidth / 1e9,
            "providers": {},
        }
        for name, taken in seconds.items():
            time_spread, speedup = Spread.of(taken), ratio_spread(taken, seconds["ours"])
            speed = moved_bytes / time_spread.median
            benchmark.extra_info["providers"][name] = {
                "us": [s * 1e6 for s in (time_spread.median, time_spread.low, time_spread.high)],
                "gb_per_s": speed / 1e9,
                "share_of_read_bandwidth": speed / bandwidth,
                "ours_is_faster_by": [speedup.median, speedup.low, speedup.high],
            }
            _rows.append(
                (
                    request.node.name.removeprefix("test_"),
                    name,
                    f"{time_spread.median * 1e6:,.1f}",
                    f"{speed / 1e9:.1f}",
                    f"{speed / bandwidth:.0%}",
                    f"{speedup.median:.2f} ({speedup.low:.2f} to {speedup.high:.2f})",
                )
            )

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one on a shared machine swings 5x
    yield run
    torch.set_num_threads(num_threads)


def pytest_terminal_summary() -> None:
    if not _rows:
        return
    columns = ("case", "provider", "us", "GB/s", "of read bandwidth", "ours is faster by")
    table = Table(*columns, title="Paired, one process; medians (quartiles)")
    for row in _rows:
        table.add_row(*row)
    Console(width=150).print(table)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Note the machine as every result of this project does; ours alone is not worth its rounds."""
    command = shlex.join(["pytest", *sys.argv[1:]])
    output_json["environment"] = environment() | {"command": command, "cpu_threads": 1}
    del output_json["machine_info"]
    for row in output_json["benchmarks"]:
        del row["stats"], row["options"]


def _calls_per_round(call: Callable[[], object], device: str) -> int:
    call()
    once = _timed(call, 1, device)()
    return max(1, min(1000, round(ROUND_SECONDS / once)))


def _timed(call: Callable[[], object], calls: int, device: str) -> Callable[[], float]:
    """A round of calls that returns the seconds of one."""

    def on_cpu() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def on_gpu() -> float:
        flushed = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
        events = []
        for _ in range(calls):
            flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3

    return on_gpu if device == "cuda" else on_cpu


@functools.cache
def read_bandwidth(device: str) -> float:
    """Bytes per second that summing 256 MiB of float32 reads; the best of five."""
    x = torch.ones(64 << 20, device=device)
    return x.nbytes / min(_timed(x.sum, 1, device)() for _ in range(5))
