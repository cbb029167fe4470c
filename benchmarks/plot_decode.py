"""Plots of bench_decode.py: python -m benchmarks.plot_decode results.json ... into docs/."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lego.plots import new_axes

Row = Mapping[str, Any]
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def main() -> None:
    results: dict[str, Row] = {}
    for path in sys.argv[1:]:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["benchmarks"]
        # what was measured again counts
        results |= {row["name"]: row for row in found}
    folder = Path("docs")
    for name, figure in plots(list(results.values())).items():
        # text stays text, as in the plots of a run
        with matplotlib.rc_context({"svg.fonttype": "none", "axes.spines.top": False}):
            figure.savefig(folder / f"decode_{name}.svg")


def plots(results: Sequence[Row]) -> dict[str, Figure]:
    """By name: speedup over the exit rate for two criteria, and time over context and depth."""
    return {
        "gate": plot_speedup(results, "gate"),
        "max_prob": plot_speedup(results, "max_prob"),
        "context": plot_growth(results, "context"),
        "depth": plot_growth(results, "depth"),
    }


def plot_speedup(results: Sequence[Row], criterion: str) -> Figure:
    """Measured speedup with quartiles, and what the bytes that are left allow (dashed)."""
    figure, axes = new_axes("shallow ratio", "speedup over full depth")
    for label, rows in _cases(results, "test_early_exit"):
        chosen = sorted(
            (r for r in rows if r["criterion"] == criterion), key=lambda r: r["shallow_ratio"]
        )
        if len(chosen) < 3:  # one ratio alone is no curve
            continue
        ratios = [r["shallow_ratio"] for r in chosen]
        color = _with_quartiles(axes, ratios, [r["speedup"] for r in chosen], label)
        axes.plot(ratios, [r["ideal_speedup"] for r in chosen], linestyle="--", color=color)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(f"Early exit by {criterion} (dashed: bytes saved, all of them)")
    axes.legend()
    return figure


def plot_growth(results: Sequence[Row], name: str) -> Figure:
    """Milliseconds of a token, with plain reading of its bytes (dotted)."""
    x_label = {"context": "tokens before", "depth": "layers"}[name]
    figure, axes = new_axes(x_label, "ms per token")
    for label, rows in _cases(results, f"test_{name}"):
        if not label.startswith("wide"):
            continue
        values = [r[name] for r in rows]
        color = _with_quartiles(axes, values, [r["engine_ms"] for r in rows], f"engine, {label}")
        axes.plot(values, [r["reading_ms"][0] for r in rows], linestyle=":", color=color)
        if "reference_ms" in rows[0] and "fp32" in label:
            _with_quartiles(axes, values, [r["reference_ms"] for r in rows], f"reference, {label}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [r[name] for _, rows in _cases(results, f"test_{name}") for r in rows]
    axes.set_xticks(sorted(set(ticks)), labels=map(str, sorted(set(ticks))))
    axes.set_title("One token, one thread (dotted: plain reading of its bytes)")
    axes.legend()
    return figure


def _with_quartiles(
    axes: Axes, x: Sequence[float], spreads: Sequence[Sequence[float]], label: str
) -> Any:
    """A line through medians with bars to the quartiles; returns its colour."""
    median, low, high = zip(*spreads, strict=True)
    down = [m - q for m, q in zip(median, low, strict=True)]
    up = [q - m for m, q in zip(median, high, strict=True)]
    bars = axes.errorbar(x, median, yerr=[down, up], marker="o", capsize=3, label=label)
    return bars.lines[0].get_color()


def _cases(results: Sequence[Row], test: str) -> Iterator[tuple[str, Sequence[Row]]]:
    """(shape and dtype, rows) of each case of a test."""
    for result in results:
        if result["name"].startswith(f"{test}["):
            shape, dtype, *_ = result["params"]["decode_case"]
            yield f"{shape} {_DTYPES[dtype]}", result["extra_info"]["rows"]


if __name__ == "__main__":
    main()
