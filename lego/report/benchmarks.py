"""Tables of a pytest-benchmark JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lego.report.cells import MISSING, Cell, Table, is_number, percent, plain, significant

# headings of keys whose unit is not in their name
_HEADINGS = {
    "ms": "ms",
    "us": "\N{GREEK SMALL LETTER MU}s",
    "engine_ms": "engine, ms",
    "reading_ms": "plain reading, ms",
    "reference_ms": "reference, ms",
    "gb_per_s": "GB/s",
    "gflop_per_s": "GFLOP/s",
    "tokens_per_second": "tokens/s",
    "over_engine": "takes times the engine's",
    "ours_is_faster_by": "ours is faster by, times",
    "seconds": "s (median, quartiles)",
}
_SHARES = ("share_", "true_cost")


@dataclass(frozen=True, kw_only=True)
class BenchmarkFile:
    """A file's tables, one for each test function, and what it was measured on."""

    name: str
    environment: dict[str, str]
    tables: list[Table]


def read_benchmarks(path: Path) -> BenchmarkFile:
    """Read what `pytest --benchmark-json=FILE` wrote.

    Raises: ValueError, with the remedy, if the file is not that; OSError if it cannot be read.
    """
    remedy = "make it with pytest --benchmark-json=FILE"
    if not path.is_file():
        raise ValueError(f"report: benchmarks file must exist, got {path}; {remedy}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tests: dict[str, list[dict[str, Any]]] = {}
        for benchmark in found["benchmarks"]:
            test, _, _ = str(benchmark["fullname"]).partition("[")
            tests.setdefault(test, []).extend(_rows(benchmark))
        tables = [_table(test, rows) for test, rows in tests.items() if rows]
        environment = _environment(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"report: {path} must hold pytest-benchmark's JSON, got {reason}; {remedy}"
        ) from error
    if not tables:
        raise ValueError(f"report: {path} must hold at least one benchmark, got none; {remedy}")
    return BenchmarkFile(name=path.name, environment=environment, tables=tables)


def _rows(benchmark: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Ours keep rows, or figures by provider, in extra_info; any other has its statistics."""
    extra = benchmark.get("extra_info") or {}
    case = {"case": _case(benchmark)}
    if "rows" in extra:
        yield from (case | row for row in extra["rows"])
    elif "providers" in extra:
        moved = {"bytes": extra["bytes"]}
        for provider, figures in extra["providers"].items():
            yield case | {"provider": provider} | moved | figures
    else:
        stats = benchmark["stats"]
        yield case | {"seconds": [stats["median"], stats["q1"], stats["q3"]]} | extra


def _case(benchmark: Mapping[str, Any]) -> str:
    return str(benchmark.get("param") or benchmark["name"])


def _table(test: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "case"]
    name = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    return Table(
        caption=name,
        columns=["case", *(_HEADINGS.get(key, key.replace("_", " ")) for key in keys)],
        rows=[(row["case"], *(_cell(key, row.get(key, MISSING)) for key in keys)) for row in rows],
        note="Three numbers are a median and its quartiles.",
    )


def _cell(key: str, value: Any) -> Cell:
    show = percent if key.startswith(_SHARES) else significant
    if isinstance(value, list) and len(value) == 3 and all(map(is_number, value)):
        median, low, high = (show(v).text for v in value)
        return Cell(f"{median} ({low} to {high})", value[0])
    return show(value)


def _environment(found: Mapping[str, Any]) -> dict[str, str]:
    """Ours has versions, commit and command; pytest-benchmark's own the machine alone."""
    machine = found.get("environment")
    if machine is None:
        own = found.get("machine_info", {})
        cpu = own.get("cpu") or {}
        machine = {
            "cpu": cpu.get("brand_raw"),
            "system": own.get("system"),
            "python": own.get("python_version"),
        }
    return {key: plain(value).text for key, value in machine.items()}
