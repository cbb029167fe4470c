"""The sentence that matters: what was saved, what it cost, and whether it is worth it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lego.report.cells import (
    MISSING,
    UNDEFINED,
    Cell,
    Row,
    Table,
    change,
    dig,
    is_number,
    number,
    percent,
    spread,
)
from lego.terminal import verdict

Results = Mapping[str, Any]


class Measured(NamedTuple):
    """Early exit in generation, as one engine and one criterion had it."""

    name: str
    criterion: str
    found: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What stands at the top of a run; tiles are (name, figure, what it is of)."""

    saved: str  # and what it cost
    verdict: str
    reason: str
    worth: str  # worth, trade, not or unknown
    tiles: list[tuple[str, Cell, str]]
    lines: list[str]  # against each dense model


def measured(results: Results) -> list[Measured]:
    """Every measurement of early exit in generation, the reference's first."""
    criterion = str(results.get("criterion"))
    places = (
        ("reference", criterion, ("experiment_002",)),
        ("reference", "gate", ("experiment_002_gate",)),
        ("native engine", criterion, ("native_engine", "exit")),
        ("native engine", "gate", ("native_engine", "gate")),
        ("native engine", "speculative", ("native_engine", "speculative")),
    )
    found = {}  # a run by gate has it twice: the first is the run's own
    for name, by, keys in places:
        values = dig(results, *keys)
        if isinstance(values, Mapping) and (name, by) not in found:
            found[name, by] = Measured(name, by, values)
    return list(found.values())


def summarise(results: Results) -> Summary:
    """From the measurement of the criterion that the dense models are compared with.

    The native engine's if it was timed, else the reference's.
    """
    by = results.get("compared_by", results.get("criterion"))
    # the last one is the native engine's
    ours = next((m for m in reversed(measured(results)) if m.criterion == by), None)
    routed, full = dig(results, "criteria", str(by)), dig(results, "experiment_001", "phase2")
    ppl, full_ppl = dig(routed, "routed_ppl"), dig(full, "val_ppl")
    found = ours.found if ours else {}
    engine = ours.name if ours else "not timed"
    worth, sentence, reason = _verdict(results)
    lacking = results.get("kv_policy") in ("hole", "propagate")
    inexact = " (scored with keys and values that generation lacks)" if lacking else ""
    return Summary(
        saved=f"{_saved(found, str(by))}, at a perplexity of {number(ppl).text} against "
        f"{number(full_ppl).text} at full depth{inexact}",
        verdict=sentence,
        reason=reason,
        worth=worth,
        tiles=[
            ("layers saved", percent(dig(found, "layer_savings")), "generation"),
            ("bytes saved", _less(dig(found, "true_cost")), "head and gate included"),
            ("time saved", time_saved(found), f"{engine}, {_speedup(found)}" if ours else engine),
            ("perplexity", change(full_ppl, ppl), "against full depth"),
        ],
        lines=[] if worth == "unknown" else verdict(results),
    )


def time_saved(found: Mapping[str, Any]) -> Cell:
    """The share of a token's time that early exit saved, from the median of paired speedups."""
    speedup = dig(found, "speedup")
    return percent(1 - 1 / speedup) if is_number(speedup) and speedup > 0 else percent(speedup)


def baseline_table(results: Results) -> Table:
    """Quality and cost of the dense models and of LEGO by every criterion."""
    rows: list[Row] = []
    none = Cell(UNDEFINED)
    for name, found in _items(results, "baselines"):
        heading = f"{name.replace('_', '-')}, {found.get('num_layers')} layers"
        rows.append((heading, none, *_quality(found, "val_ppl"), _difference(found)))
    for name, found in _items(results, "criteria"):
        shallow = percent(dig(found, "shallow_ratio"))
        rows.append((f"LEGO by {name}", shallow, *_quality(found, "routed_ppl"), none))
    by = results.get("compared_by", results.get("criterion"))
    return Table(
        caption="LEGO against dense models trained on the same tokens",
        columns=(
            "model",
            "shallow",
            "PPL",
            "bits per byte",
            "true cost",
            f"LEGO by {by} is worse by, nats",
        ),
        rows=rows,
        note="Nats per token, with the standard error over windows; a difference within two of "
        "them counts as none. Each dense model saw the tokens as often as both phases together.",
    )


def _items(results: Results, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    values = dig(results, key)
    return list(values.items()) if isinstance(values, Mapping) else []


def _quality(found: Mapping[str, Any], ppl: str) -> tuple[Cell, Cell, Cell]:
    bits = number(dig(found, "bits_per_byte"), 4)
    return number(dig(found, ppl)), bits, percent(dig(found, "true_cost"))


def _difference(found: Mapping[str, Any]) -> Cell:
    nats, error = number(dig(found, "lego_minus_dense_nats"), 3), found.get("standard_error")
    text = f"{nats.text} \N{PLUS-MINUS SIGN} {error:.3f}" if is_number(error) else nats.text
    return Cell(text, nats.value)


def _less(true_cost: Any) -> Cell:
    return percent(1 - true_cost) if is_number(true_cost) else percent(true_cost)


def _speedup(found: Mapping[str, Any]) -> str:
    return spread(dig(found, "speedup"), dig(found, "speedup_quartiles")).text


def _saved(found: Mapping[str, Any], by: str) -> str:
    """What of the bytes and of the time; a loss is called one."""
    parts = []
    for what, cell in (("bytes", _less(dig(found, "true_cost"))), ("time", time_saved(found))):
        if cell.value is None:
            parts.append(f"did not have its {what} measured")
        elif cell.value >= 0:
            parts.append(f"saved {cell.text} of the {what}")
        else:
            parts.append(f"spent {percent(-cell.value).text} more {what}")
    text = " and ".join(parts)
    return f"Early exit by {by} {text.replace(' and saved ', ' and ')}"


def _verdict(results: Results) -> tuple[str, str, str]:
    """(worth, trade, not or unknown; the verdict; why), for the criterion that is compared.

    Not worth it: a dense model is as good, by two standard errors, and no dearer. Worth it: there
    is none, and LEGO is as good as one and cheaper. A trade: neither.
    """
    name = dig(results, "compared_by")
    dense = [found for _, found in _items(results, "baselines")]
    if name is MISSING or not dense:
        return "unknown", "Nobody knows whether it is worth it", "no dense model was measured"
    ours = results["criteria"][name]
    beaten_by = [found for found in dense if _as_good_and_cheap(found, ours, sign=1)]
    if beaten_by:
        best = min(beaten_by, key=lambda found: found["val_ppl"])
        return "not", "Not worth it here", _first_and_second(_dense(best), ("LEGO", ours))
    beats = [found for found in dense if _as_good_and_cheap(found, ours, sign=-1)]
    if beats:
        best = min(beats, key=lambda found: found["val_ppl"])
        return "worth", "Worth it here", _first_and_second(("LEGO", ours), _dense(best))
    why = "every dense model is either better and dearer than LEGO, or worse and cheaper"
    return "trade", "A trade here", why


def _as_good_and_cheap(dense: Mapping[str, Any], ours: Mapping[str, Any], *, sign: int) -> bool:
    """Is the dense model (sign 1), or LEGO (-1), no worse and no dearer than the other?"""
    error = dense["standard_error"]
    alike = error is None or abs(dense["lego_minus_dense_nats"]) <= 2 * error
    better = sign * dense["lego_minus_dense_nats"] > 0
    return (alike or better) and sign * (ours["true_cost"] - dense["true_cost"]) >= 0


_Named = tuple[str, Mapping[str, Any]]


def _dense(found: Mapping[str, Any]) -> _Named:
    return f"a dense model with {found['num_layers']} layers", found


def _first_and_second(first: _Named, second: _Named) -> str:
    """Which perplexity each has, and at what cost."""

    def figures(found: Mapping[str, Any], unit: str = "") -> str:
        ppl = found.get("val_ppl", found.get("routed_ppl"))
        return f"{number(ppl).text} at {percent(found['true_cost']).text}{unit}"

    one, two = figures(first[1], " of the bytes"), figures(second[1])
    return f"{first[0]} has a perplexity of {one}, {second[0]} {two}"
