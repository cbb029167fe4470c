"""Tables as data: what a cell shows, and the number behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

NOT_MEASURED = "not measured"
UNDEFINED = "\N{EM DASH}"  # such as the perplexity of no tokens
_SPACE = "\N{NO-BREAK SPACE}"


class Cell(NamedTuple):
    """What is shown, and the unrounded number if there is one; words are not aligned as numbers."""

    text: str
    value: float | None = None
    words: bool = False


Row = tuple[str, *tuple[Cell, ...]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A caption, column headings, rows that begin with their heading, and a note below."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""

    @property
    def words(self) -> set[int]:
        """The columns that hold words; the headings are column 0."""
        return {0} | {
            place
            for _, *cells in self.rows
            for place, cell in enumerate(cells, start=1)
            if cell.words
        }


# stands for a key that is not there, as null stands for what is undefined
MISSING: Any = object()


def dig(values: Any, *keys: str) -> Any:
    """values[key][key]...; MISSING where there is no such key."""
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return MISSING
        values = values[key]
    return values


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 2, unit: str = "", scale: float = 1.0) -> Cell:
    """A number of results.json, with its unit."""
    if value is MISSING:
        return Cell(NOT_MEASURED)
    if not is_number(value):
        return Cell(UNDEFINED if value is None else str(value))
    text = f"{scale * value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return Cell(f"{text}{_SPACE}{unit}" if unit else text, value)


def percent(value: Any, digits: int = 1) -> Cell:
    return number(value, digits, "%", 100.0)


def change(old: Any, new: Any) -> Cell:
    """By how many percent of the old one the new one is larger."""
    if not (is_number(old) and is_number(new)) or old == 0:
        return Cell(UNDEFINED)
    cell = percent(new / old - 1)
    return Cell(f"+{cell.text}" if new > old else cell.text, cell.value)


def spread(value: Any, quartiles: Any, unit: str = "\N{MULTIPLICATION SIGN}") -> Cell:
    """A median with its quartiles."""
    if not is_number(value):
        return number(value)
    text = f"{value:.2f}{unit}"
    if isinstance(quartiles, Sequence) and len(quartiles) == 2 and all(map(is_number, quartiles)):
        low, high = quartiles
        text += f" ({low:.2f} to {high:.2f})"
    return Cell(text, value)


def plain(value: Any) -> Cell:
    """Any value as a person would write it."""
    if value is MISSING or value is None:
        return Cell(NOT_MEASURED if value is MISSING else UNDEFINED)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int):
        return Cell(f"{value:,}", value)
    if is_number(value):
        return Cell(f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}", value)
    return Cell(str(value), words=True)


def significant(value: Any) -> Cell:
    """A number by three digits, zeros included, so that a column lines up; else as `plain`."""
    if not isinstance(value, float) or not is_number(value):
        return plain(value)
    return Cell(f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip("."), value)
