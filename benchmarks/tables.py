"""What the decode benchmarks share: one thread, and a table of each measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lego.timed_generation import num_threads
from lego.timing import Spread


@pytest.fixture
def one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


Measure = Callable[[Callable[[], dict[str, Any]]], None]


@pytest.fixture
def measured(benchmark: Any, capsys: Any, request: pytest.FixtureRequest) -> Measure:
    """Run a measurement once, keep what it returns in the JSON, and show its `rows`."""

    def measure(work: Callable[[], dict[str, Any]]) -> None:
        results = benchmark.pedantic(work)
        benchmark.extra_info |= results
        table = Table(*results["rows"][0], title=request.node.name)
        for row in results["rows"]:
            table.add_row(*map(_text, row.values()))
        with capsys.disabled():
            Console(width=150).print("", table)

    return measure


def milliseconds(seconds: Sequence[float]) -> list[float]:
    """Median and quartiles."""
    spread = Spread.of([1e3 * s for s in seconds])
    return [spread.median, spread.low, spread.high]


def _text(value: Any) -> str:
    """A cell of a table; three numbers are a median and its quartiles."""
    if isinstance(value, list):
        median, low, high = (f"{v:.3g}" for v in value)
        return f"{median} ({low} to {high})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
