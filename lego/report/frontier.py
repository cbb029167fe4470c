"""The frontier of a run, as `lego evaluate --frontier` left it in frontier.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lego.frontier_command import break_even_ratio, frontier_verdict
from lego.report import figures
from lego.report.cells import Cell, Row, Table, number, percent, spread

Values = Mapping[str, Any]


class FrontierSection(NamedTuple):
    """Sentences, a figure for each KV policy by its name, and tables."""

    sentences: list[str]
    figures: dict[str, figures.Scatter]
    tables: list[Table]


def frontier_section(path: Path) -> FrontierSection | None:
    """What a frontier.json says; None if there is none.

    Raises: ValueError if it is not as `lego evaluate --frontier` wrote it.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        drawn = {policy: _figure(found, policy) for policy in _policies(found)}
        tables = [_settings(found), _criteria(found), _break_even(found)]
        return FrontierSection(frontier_verdict(found), drawn, tables)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"report: {path} must be as `lego evaluate --frontier` wrote it, got {error!r}; "
            "run that again"
        ) from error


def _policies(found: Values) -> list[str]:
    return list(dict.fromkeys(setting["kv_policy"] for setting in found["settings"]))


def _figure(found: Values, policy: str) -> figures.Scatter:
    """A line for each criterion, from cheap to dear, among the dense models and full depth."""
    lines: dict[str, list[figures.Point]] = {}
    for name, model in found["models"].items():
        kind = "full depth" if name == "full" else "dense"
        label = f"{kind}, {model['num_layers']} layers"
        lines[label] = [_point(model, model["true_cost"])]
    for setting in found["settings"]:
        if setting["kv_policy"] == policy:
            point = _point(setting, setting["generation"]["true_cost"])
            lines.setdefault(setting["criterion"], []).append(point)
    drawn = figures.scatter({name: sorted(line) for name, line in lines.items()})
    assert drawn is not None  # the models are there
    return drawn


def _point(values: Values, true_cost: float) -> figures.Point:
    low, high = values["bits_per_byte_interval"]
    return figures.Point(true_cost, values["bits_per_byte"], None, (low, high))


def _settings(found: Values) -> Table:
    rows: list[Row] = []
    for setting in found["settings"]:
        generation = setting["generation"]
        rows.append(
            (
                setting["criterion"],
                Cell(setting["kv_policy"], words=True),
                percent(setting["risk"]),
                percent(setting["shallow_ratio"]),
                _interval(setting, "bits_per_byte", lambda value: number(value, 3)),
                _interval(setting, "agreement", percent),
                percent(generation["true_cost"]),
                number(generation["tokens_per_second"], 0),
                spread(generation["speedup"], generation["speedup_quartiles"]),
                _interval(setting, "minus_dense_at_equal_cost", lambda value: number(value, 3)),
            )
        )
    return Table(
        caption="Every setting of the frontier",
        columns=(
            *("criterion", "KV policy", "at a risk of", "shallow", "bits per byte", "agreement"),
            *("true cost", "tokens/s", "speedup", "bits per byte above dense at equal cost"),
        ),
        rows=rows,
        note=f"Bits per byte and agreement: {found['num_windows']} windows, 95 % intervals over "
        "them. Cost and time: generation at the same shallow ratio, medians and quartiles.",
    )


def _criteria(found: Values) -> Table:
    rows: list[Row] = [
        (
            name,
            number(values["disagreement_area"], 4),
            number(values["lost_nats_area"], 4),
            number(values["best_f1"], 3),
            number(values["calibration_error"], 3),
        )
        for name, values in found["criteria"].items()
    ]
    share = percent(found["agreement_of_exits"]).text
    return Table(
        caption="Does the criterion know when both exits agree?",
        columns=("criterion", "disagreement, area", "lost nats, area", "best F1", "calibration"),
        rows=rows,
        note=f"They agree on {share} of the tokens. An area is the mean risk over all true costs.",
    )


def _break_even(found: Values) -> Table:
    rows: list[Row] = []
    for row in found["break_even"]:
        low, high = (break_even_ratio(row, share) for share in row["measured_quartiles"])
        measured = break_even_ratio(row, row["measured"])
        rows.append(
            (
                row["criterion"],
                Cell(row["kv_policy"], words=True),
                percent(row["expected"]),
                Cell(break_even_ratio(row, row["counted"]), row["counted"]),
                Cell(f"{measured} ({low} to {high})", row["measured"]),
            )
        )
    return Table(
        caption="Shallow ratio from which early exit saves anything",
        columns=("criterion", "KV policy", "by weights", "by bytes read", "by time"),
        rows=rows,
    )


def _interval(values: Values, key: str, show: Callable[[float], Cell]) -> Cell:
    low, high = (show(value).text for value in values[f"{key}_interval"])
    return Cell(f"{show(values[key]).text} ({low} to {high})", values[key])
