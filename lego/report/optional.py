"""What a run folder may hold besides its results: a frontier and a certificate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lego.report.cells import MISSING, Cell, Row, Table, dig, is_number, number, percent, plain

# key, heading, format
_FRONTIER_COLUMNS = (
    ("kv_policy", "KV policy", plain),
    ("threshold", "threshold", plain),
    ("shallow_ratio", "shallow", percent),
    ("bits_per_byte", "bits per byte", lambda value: number(value, 4)),
    ("agreement", "agreement", percent),
    ("true_cost", "true cost", percent),
    ("tokens_per_second", "tokens/s", lambda value: number(value, 0)),
)
_BOUNDS = (("low", "high"), ("lower", "upper"))


class Estimate(NamedTuple):
    """A figure with its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def read_json(path: Path) -> Any:
    """What the file holds; None if there is none.

    Raises: ValueError if it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: {path} must be JSON, got {error}") from error


def frontier_points(found: Any) -> list[Mapping[str, Any]]:
    """The points of a frontier.json: a list of objects, or one under `points`.

    Raises: ValueError if there are none.
    """
    points = dig(found, "points") if isinstance(found, Mapping) else found
    if not isinstance(points, list) or not points:
        raise ValueError(f"report: frontier.json must hold a list of points, got {_short(found)}")
    if not all(isinstance(point, Mapping) for point in points):
        raise ValueError("report: every point of frontier.json must be an object, got another")
    return points


def estimate(point: Mapping[str, Any], key: str) -> Estimate | None:
    """A figure of a point: a number, [value, low, high], or an object with value, low and high.

    The interval may also stand beside a number, as KEY_interval or KEY_quartiles: [low, high].
    """
    found = point.get(key)
    if isinstance(found, Mapping):
        value = found.get("value", found.get("median"))
        pairs = [(found.get(low), found.get(high)) for low, high in _BOUNDS]
    elif isinstance(found, Sequence) and len(found) == 3:
        value, *bounds = found
        pairs = [tuple(bounds)]
    else:
        beside = (point.get(f"{key}_{name}") for name in ("interval", "quartiles"))
        value = found
        pairs = [tuple(b) for b in beside if isinstance(b, Sequence) and len(b) == 2]
    if not is_number(value):
        return None
    for low, high in pairs:
        if is_number(low) and is_number(high):
            return Estimate(value, low, high)
    return Estimate(value)


def frontier_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """Every point, with the columns that any of them has."""
    known = [column for column in _FRONTIER_COLUMNS if any(column[0] in p for p in points)]
    rows: list[Row] = []
    for point in points:
        cells = []
        for key, _, show in known:
            found = estimate(point, key)
            if found is None:
                cells.append(plain(point.get(key, MISSING)))
                continue
            text = show(found.value).text
            if found.low is not None:
                text += f" ({show(found.low).text} to {show(found.high).text})"
            cells.append(Cell(text, found.value))
        rows.append((str(point.get("criterion", "not named")), *cells))
    columns = ["criterion", *(heading for _, heading, _ in known)]
    return Table(caption="Every point of the frontier", columns=columns, rows=rows)


class Certificate(NamedTuple):
    """A certificate in one sentence, and its entries."""

    sentence: str
    table: Table


def certificate(found: Any) -> Certificate:
    """What a certificate.json says.

    Raises: ValueError if it is no object.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"report: certificate.json must hold an object, got {_short(found)}")
    rows = [(key.replace("_", " "), _entry(value)) for key, value in found.items()]
    table = Table(caption="The certificate", columns=("entry", "value"), rows=rows)
    return Certificate(_certified(found), table)


def _certified(found: Mapping[str, Any]) -> str:
    epsilon, delta, threshold = (found.get(key) for key in ("epsilon", "delta", "threshold"))
    if not (is_number(epsilon) and is_number(delta)):
        return ""
    risk = found["risk"] if isinstance(found.get("risk"), str) else "risk"
    tail = f"at most {plain(epsilon).text}, with confidence {percent(1 - delta).text}"
    if is_number(found.get("n")):
        tail += f", from {plain(found['n']).text} calibration samples"
    if not is_number(threshold):
        return f"No threshold was certified to keep the {risk.replace('_', ' ')} {tail}."
    by = f"{found.get('criterion', 'confidence')} >= {plain(threshold).text}"
    return f"Exiting at {by} keeps the {risk.replace('_', ' ')} {tail}."


def _entry(value: Any) -> Cell:
    """A list is given by its length and ends: a grid of thresholds has hundreds of entries."""
    if isinstance(value, list) and len(value) > 4 and all(map(is_number, value)):
        ends = f"{plain(value[0]).text} to {plain(value[-1]).text}"
        return Cell(f"{len(value):,} values, {ends}")
    return plain(value if not isinstance(value, list | dict) else _short(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
