"""`lego evaluate --frontier`: measure, print, write frontier.json and frontier.svg."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lego.checkpoint import load_checkpoint
from lego.environment import environment
from lego.files import to_json, write_text
from lego.frontier import BASELINES, FrontierOptions, measure_frontier
from lego.model import LegoModel
from lego.plots import save_frontier
from lego.run_folder import RunFolder

_WIDTH = 100


def evaluate_frontier(path: Path, options: FrontierOptions, console: Console) -> dict[str, Any]:
    """Measure a run that `lego run` has finished; returns what frontier.json holds."""
    folder = RunFolder(path)
    config = folder.config()
    model, baselines = load_checkpoint(folder.checkpoint).model, _load_baselines(path)
    corpus = folder.corpus()
    bars = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    def watch(name: str, total: int) -> Callable[[], None]:
        task = bars.add_task(name, total=total)
        return lambda: bars.advance(task)

    with bars:
        found = measure_frontier(model, baselines, corpus, config, options, watch)
    found["environment"] = environment()
    save_frontier(found, path)
    write_text(path / "frontier.json", to_json(found))
    print_frontier(console, found)
    console.print(f"frontier.json and frontier.svg are in {path}", highlight=False, markup=False)
    return found


def _load_baselines(path: Path) -> dict[str, LegoModel]:
    found = {}
    for name in BASELINES:
        folder = path / "baselines" / name
        if not folder.is_dir():
            raise ValueError(
                f"evaluate: --frontier needs the dense baselines, got no {folder}; "
                f"`lego run --out {path}` with the run's options trains them"
            )
        found[name] = load_checkpoint(folder).model
    return found


def print_frontier(console: Console, found: Mapping[str, Any]) -> None:
    """All tables, 100 columns wide at most, and the verdict."""
    policies = dict.fromkeys(setting["kv_policy"] for setting in found["settings"])
    tables = [
        _criteria_table(found),
        _models_table(found),
        *(_settings_table(found, policy) for policy in policies),
        *_risk_tables(found["settings"]),
        _break_even_table(found["break_even"]),
    ]
    for table in tables:
        # a file has no width: rich would take it for a terminal of 80 columns
        console.print(table, width=None if console.is_terminal else _WIDTH)
    for line in frontier_verdict(found):
        console.print(line, highlight=False)


def frontier_verdict(found: Mapping[str, Any]) -> list[str]:
    """LEGO against dense models at equal true cost. Whatever it says, it is printed."""
    settings = [setting for setting in found["settings"] if setting["shallow_ratio"] > 0]
    if not settings:
        return ["No token exited: there is nothing to compare with dense models."]
    key = "minus_dense_at_equal_cost"
    better = sum(setting[f"{key}_interval"][1] < 0 for setting in settings)
    worse = sum(setting[f"{key}_interval"][0] > 0 for setting in settings)
    alike = len(settings) - better - worse
    best = min(settings, key=lambda setting: setting[key])
    low, high = best[f"{key}_interval"]
    lines = [
        f"LEGO against dense models at equal true cost, {len(settings)} settings: better in "
        f"{better}, as good in {alike}, worse in {worse}.",
        f"Its best: {best['criterion']}, {best['kv_policy']}, {_percent(best['shallow_ratio'])} "
        f"shallow, {best[key]:+.4f} bits per byte against dense ({low:+.4f} to {high:+.4f}).",
    ]
    if worse == len(settings):
        lines.append("A dense model is better at equal true cost, at every setting.")
    shares = [(s["shallow_ratio"], s["generation"]["shallow_ratio"]) for s in settings]
    far = sum(abs(scored - timed) > 0.05 for scored, timed in shares)
    if far:
        lines.append(
            f"In {far} of them no threshold was found at which the share of generated tokens that "
            "exit is within 5 points of the share scored: cost and time are of another share."
        )
    return lines


def _criteria_table(found: Mapping[str, Any]) -> Table:
    share = _percent(found["agreement_of_exits"])
    table = _table(
        f"Does the criterion know when both exits agree? They do on {share} of the tokens.",
        "criterion",
        "disagreement, area",
        "lost nats, area",
        "best F1",
        "calibration error",
    )
    for name, values in found["criteria"].items():
        table.add_row(
            name,
            f"{values['disagreement_area']:.4f}",
            f"{values['lost_nats_area']:+.4f}",
            f"{values['best_f1']:.3f}",
            f"{values['calibration_error']:.3f}",
        )
    return table


def _models_table(found: Mapping[str, Any]) -> Table:
    seconds = f"tokens/s ({found['engine']})"
    table = _table(
        f"Full depth and dense models, {found['num_windows']} windows, 95 % intervals over them",
        *("model", "layers", "bits per byte", "true cost", seconds, "speedup"),
    )
    for name, values in found["models"].items():
        table.add_row(
            name.replace("_", "-"),
            str(values["num_layers"]),
            _plus_minus(values, "bits_per_byte"),
            _percent(values["true_cost"]),
            f"{values['tokens_per_second']:,.0f}",
            _quartiles(values, "speedup"),
        )
    return table


def _settings_table(found: Mapping[str, Any], policy: str) -> Table:
    table = _table(
        f"Early exit after {found['exit_layer']} of {found['num_layers']} layers, policy {policy}",
        *("criterion", "shallow", "bits/\nbyte", "against full", "agree-\nment", "layers"),
        *("layer\ncost", "true\ncost", "tokens\n/s", "speed-\nup", "against dense"),
    )
    for setting in found["settings"]:
        if setting["kv_policy"] != policy or setting["risk"] is not None:
            continue
        generation = setting["generation"]
        table.add_row(
            setting["criterion"],
            _percent(setting["shallow_ratio"]),
            f"{setting['bits_per_byte']:.3f}",
            _plus_minus(setting, "minus_full_depth", sign="+"),
            _percent(setting["agreement"]),
            f"{setting['mean_layers']:.2f}",
            _percent(generation["layer_cost"]),
            _percent(generation["true_cost"]),
            f"{generation['tokens_per_second']:,.0f}",
            f"{generation['speedup']:.2f}x",
            _plus_minus(setting, "minus_dense_at_equal_cost", sign="+"),
        )
    table.caption = (
        "against: bits per byte above full depth, and above dense models at equal true cost"
    )
    return table


def _risk_tables(settings: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The criteria at equal risk, if any was asked for: one table."""
    settings = [setting for setting in settings if setting["risk"] is not None]
    if not settings:
        return []
    table = _table(
        "Criteria at equal risk: the share of calibration tokens that leave with another token",
        *("risk", "criterion", "policy", "other\ntokens", "shallow"),
        *("against full", "true\ncost", "tokens\n/s", "speedup (quartiles)"),
    )
    for setting in sorted(settings, key=lambda setting: setting["risk"]):
        generation = setting["generation"]
        table.add_row(
            _percent(setting["risk"]),
            setting["criterion"],
            setting["kv_policy"],
            _percent(1 - setting["agreement"]),
            _percent(setting["shallow_ratio"]),
            _plus_minus(setting, "minus_full_depth", sign="+"),
            _percent(generation["true_cost"]),
            f"{generation['tokens_per_second']:,.0f}",
            _quartiles(generation, "speedup"),
        )
    return [table]


def _break_even_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        "Shallow ratio from which early exit saves anything",
        *("criterion", "policy", "weights say", "bytes read say", "time says (quartiles)"),
    )
    for row in rows:
        low, high = (break_even_ratio(row, share) for share in row["measured_quartiles"])
        table.add_row(
            row["criterion"],
            row["kv_policy"],
            _percent(row["expected"]),
            break_even_ratio(row, row["counted"]),
            f"{break_even_ratio(row, row['measured'])} ({low} to {high})",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _plus_minus(values: Mapping[str, Any], key: str, sign: str = "") -> str:
    """The mean and half the width of its interval."""
    low, high = values[f"{key}_interval"]
    return f"{values[key]:{sign}.3f} \N{PLUS-MINUS SIGN}{(high - low) / 2:.3f}"


def _quartiles(values: Mapping[str, Any], key: str) -> str:
    low, high = values[f"{key}_quartiles"]
    return f"{values[key]:.2f}x ({low:.2f} to {high:.2f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def break_even_ratio(row: Mapping[str, Any], share: float | None) -> str:
    """A share of tokens found for a row of break_even; inf, which JSON has as None, is never."""
    if share is None or share > 1:
        return "never"
    # no lower one was measured
    return f"<= {_percent(share)}" if 0 < share == row["lowest"] else _percent(share)
