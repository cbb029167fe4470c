"""How every op is timed: all providers in turn, in one process, checked first (`compare`)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import gpu_machine
from benchmarks.op_timing import IN_GRAPH, Providers, copy_bandwidth, op_rounds, read_bandwidth
from lego.environment import environment
from lego.timing import Spread, paired_seconds, ratio_spread
from tests.conftest import pytest_collection_modifyitems

__all__ = ["compare", "pytest_collection_modifyitems"]  # the latter skips what needs a GPU

ROUNDS = 9

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

    compare(providers, device=..., moved_bytes=...): `providers` makes tensors and returns calls
    over them by name, without arguments, "ours" among them; moved_bytes is what one call must read
    and write at least. Medians, quartiles, GB/s, the shares of the measured read and copy
    bandwidths and the paired speed-up of ours over each provider (in a graph, of ours in a graph)
    go to extra_info and to a table at the end.
    """

    def run(providers: Providers, *, device: str, moved_bytes: int) -> None:
        timed = op_rounds(providers, device=device, moved_bytes=moved_bytes)
        if not benchmark.enabled:
            return
        seconds = paired_seconds(timed.rounds, num_rounds=ROUNDS)
        benchmark.pedantic(lambda: None)  # pytest-benchmark wants something to time
        bandwidths = read_bandwidth(device), copy_bandwidth(device)
        benchmark.extra_info |= {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread",
            "bytes": moved_bytes,
            "sets": timed.num_sets,
            "not_in_graph": timed.not_in_graph,
            "read_gb_per_s": bandwidths[0] / 1e9,
            "copy_gb_per_s": bandwidths[1] / 1e9,
            "providers": {},
        }
        for name, taken in seconds.items():
            ours = "ours" + IN_GRAPH if name.endswith(IN_GRAPH) else "ours"
            spread, speedup = Spread.of(taken), ratio_spread(taken, seconds[ours])
            speed = moved_bytes / spread.median
            of_read, of_copy = (speed / bandwidth for bandwidth in bandwidths)
            benchmark.extra_info["providers"][name] = {
                "us": [s * 1e6 for s in (spread.median, spread.low, spread.high)],
                "gb_per_s": speed / 1e9,
                "share_of_read_bandwidth": of_read,
                "share_of_copy_bandwidth": of_copy,
                "ours_is_faster_by": [speedup.median, speedup.low, speedup.high],
            }
            _rows.append(
                (
                    request.node.name.removeprefix("test_"),
                    name,
                    f"{spread.median * 1e6:,.1f}",
                    f"{speed / 1e9:.1f}",
                    f"{of_read:.0%}",
                    f"{of_copy:.0%}",
                    f"{speedup.median:.2f} ({speedup.low:.2f} to {speedup.high:.2f})",
                )
            )

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one on a shared machine swings 5x
    # torch.compile gives up, and runs eager, after 8 shapes of one function
    torch.compiler.reset()
    yield run
    torch.set_num_threads(num_threads)
    torch.cuda.empty_cache()


def pytest_terminal_summary() -> None:
    if not _rows:
        return
    columns = ("case", "provider", "us", "GB/s", "of read", "of copy", "ours is faster by")
    table = Table(*columns, title="Paired, one process; medians (quartiles)")
    for row in _rows:
        table.add_row(*row)
    Console(width=150).print(table)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Note the machine as every result of this project does; ours alone is not worth its rounds."""
    command = shlex.join(["pytest", *sys.argv[1:]])
    machine = environment() | {"command": command, "cpu_threads": 1} | gpu_machine()
    output_json["environment"] = machine
    del output_json["machine_info"]
    for row in output_json["benchmarks"]:
        del row["stats"], row["options"]
