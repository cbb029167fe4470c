"""Experiments 001 and 002 as tables, from results.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lego.report.cells import (
    Cell,
    Row,
    Table,
    change,
    dig,
    is_number,
    number,
    percent,
    plain,
    spread,
)

Results = Mapping[str, Any]

# the two experiments that LEGO repeats
_SOURCE = {
    "phase1": {"val_ppl": 986.43, "hard_ppl": 2763.69},
    "phase2": {"val_ppl": 829.78, "hard_ppl": 668.08},
}
_SOURCE_EXIT = {
    "shallow_tokens": 21,
    "deep_tokens": 11,
    "shallow_ratio": 0.656,
    "layer_cost": 0.672,
    "layer_savings": 0.328,
    "speedup": 1.08,
}
_SOURCE_NOTE = (
    "The source measured on WikiText-2 with its train split, a vocabulary of some 70,000 words and "
    "hard tokens mined from the validation set: its perplexities are not of this text."
)
_PHASE_ROWS = (
    ("PPL", "val_ppl", number),
    ("accuracy", "val_acc", percent),
    ("PPL of hard tokens", "hard_ppl", number),
    ("PPL of easy tokens", "easy_ppl", number),
    ("PPL per word", "word_ppl", number),
    ("bits per byte", "bits_per_byte", lambda value: number(value, 4)),
)
_COST_NOTE = (
    "True cost: bytes read, LM head and gate included, against full depth. Realised savings: share "
    "of the saved bytes that became saved time, undefined above a true cost of 90 %. "
    "Time efficiency: true cost times speedup. Both are 1 when time follows bytes exactly."
)
_Format = Callable[[Any], Cell]
_EXIT_ROWS: Sequence[tuple[str, str, _Format]] = (
    ("shallow tokens", "shallow_tokens", plain),
    ("deep tokens", "deep_tokens", plain),
    ("shallow ratio", "shallow_ratio", percent),
    ("layers run", "layer_cost", percent),
    ("layers saved", "layer_savings", percent),
    ("true cost", "true_cost", percent),
    ("full depth, ms per token", "full_ms_per_token", lambda value: number(value, 3)),
    ("early exit, ms per token", "exit_ms_per_token", lambda value: number(value, 3)),
)
_REALISED_ROWS: Sequence[tuple[str, str, _Format]] = (
    ("realised savings", "realised_savings", number),
    ("time efficiency", "time_efficiency", number),
)


def training_tables(results: Results, *, with_source: bool) -> list[Table]:
    """Experiment 001: both phases, then routing between them by every criterion."""
    return [_phase_table(results, with_source), _routing_table(results)]


def generation_tables(results: Results, *, with_source: bool) -> list[Table]:
    """Experiment 002: the KV cache, early exit by the reference and by the native engine."""
    tables = [_kv_cache_table(results), _early_exit_table(results, with_source)]
    native = dig(results, "native_engine")
    if isinstance(native, Mapping) and "why_not" not in native:
        tables.append(_native_table(results, native))
    return tables


def no_native_engine(results: Results) -> str:
    """Why there is no table of the native engine; empty if there is one."""
    native = dig(results, "native_engine")
    if not isinstance(native, Mapping):
        return "not measured in this run"
    return str(native.get("why_not", ""))


def _phase_table(results: Results, with_source: bool) -> Table:
    rows: list[Row] = []
    # joint training has no phases: the figures are those of its two exits
    joint = results.get("recipe") == "joint"
    names = ("shallow exit", "deep exit") if joint else ("phase 1", "phase 2")
    for name, key, show in _PHASE_ROWS:
        one, two = (dig(results, "experiment_001", phase, key) for phase in ("phase1", "phase2"))
        cells = [show(one), show(two), _phase_change(key, one, two)]
        if with_source:
            cells += [number(dig(_SOURCE, phase, key)) for phase in ("phase1", "phase2")]
        rows.append((name, *cells))
    share = percent(dig(results, "experiment_001", "hard_share")).text
    columns = ["on validation", *names, "change"]
    return Table(
        caption="Experiment 001: training",
        columns=columns + [f"source, {name}" for name in names] * with_source,
        rows=rows,
        note=f"Hard tokens, {share} of the split, are those of which the shallow exit was unsure: "
        "the same ones in every column." + f" {_SOURCE_NOTE}" * with_source,
    )


def _phase_change(key: str, one: Any, two: Any) -> Cell:
    if key != "val_acc" or not (is_number(one) and is_number(two)):
        return change(one, two)
    cell = number(two - one, 2, "points", 100.0)
    return Cell(f"+{cell.text}" if two > one else cell.text, cell.value)


def _routing_table(results: Results) -> Table:
    rows = []
    criteria = dig(results, "criteria")
    for name, found in criteria.items() if isinstance(criteria, Mapping) else ():
        rows.append(
            (
                name,
                number(dig(found, "threshold"), 3),
                percent(dig(found, "shallow_ratio")),
                percent(dig(found, "layer_cost")),
                percent(dig(found, "true_cost")),
                number(dig(found, "routed_ppl")),
                number(dig(found, "bits_per_byte"), 4),
            )
        )
    note = "Every validation token takes one exit. PPL is that of the exit it took."
    if results.get("kv_policy") in ("hole", "propagate"):
        note += " Scored with all keys and values present; generation lacks some of them."
    step = dig(results, "stepwise", "difference")
    if is_number(step):
        tokens = plain(dig(results, "stepwise", "tokens")).text
        note += f" Decoding {tokens} of these tokens step by step changes PPL by {step:+.4f}."
    columns = ("criterion", "threshold", "shallow", "layers run", "true cost", "PPL")
    return Table(
        caption="Two-stage inference",
        columns=(*columns, "bits per byte"),
        rows=rows,
        note=note,
    )


def _kv_cache_table(results: Results) -> Table:
    cache = dig(results, "experiment_001", "kv_cache")
    rows = []
    for name, key, faster in (
        ("without cache", "uncached_ms_per_token", "speedup"),
        (
            "without cache, head on the last position",
            "uncached_last_ms_per_token",
            "speedup_over_last",
        ),
        ("with cache", "cached_ms_per_token", ""),
    ):
        gain = spread(dig(cache, faster), dig(cache, f"{faster}_quartiles")) if faster else Cell("")
        rows.append((name, number(dig(cache, key), 3), gain))
    columns = ("full depth", "ms per token", "speedup by the cache (quartiles)")
    return Table(caption="KV cache", columns=columns, rows=rows)


def _exit_rows(found: Sequence[Any], more: Sequence[Any] = ()) -> list[Row]:
    """A row for each figure; the columns of `more` come last and without quartiles."""
    columns = [*found, *more]

    def rows(wanted: Sequence[tuple[str, str, _Format]]) -> list[Row]:
        return [(name, *(show(dig(c, key)) for c in columns)) for name, key, show in wanted]

    speedups = (spread(dig(c, "speedup"), dig(c, "speedup_quartiles")) for c in columns)
    return [*rows(_EXIT_ROWS), ("speedup (quartiles)", *speedups), *rows(_REALISED_ROWS)]


def _early_exit_table(results: Results, with_source: bool) -> Table:
    found = {str(results.get("criterion")): dig(results, "experiment_002")}
    found.setdefault("gate", dig(results, "experiment_002_gate"))
    return Table(
        caption="Experiment 002: early exit in generation, PyTorch reference",
        columns=["generated tokens", *found, *["source"] * with_source],
        rows=_exit_rows(list(found.values()), [_SOURCE_EXIT] * with_source),
        note=_COST_NOTE,
    )


def _native_table(results: Results, native: Results) -> Table:
    found = {str(results.get("criterion")): dig(native, "exit")}
    for name in ("gate", "speculative"):
        found.setdefault(name, dig(native, name))
    gain = spread(
        dig(native, "speedup_over_reference"), dig(native, "speedup_over_reference_quartiles")
    )
    total = sum(
        v for k in ("shallow", "deep") if is_number(v := dig(native, "exit", f"{k}_tokens"))
    )
    same = plain(dig(native, "same_tokens")).text
    drafted = plain(dig(native, "speculative", "same_tokens")).text
    return Table(
        caption="Experiment 002: the same prompts, native engine",
        columns=["generated tokens", *found],
        rows=_exit_rows(list(found.values())),
        note=f"Full depth is {gain.text} as fast as the reference; {same} of {total} tokens agree "
        f"with it up to the first difference, {drafted} between speculative and full depth.",
    )
