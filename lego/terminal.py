"""What a person sees in the terminal: training progress, the result tables, a shaded sample."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from lego.generation import GeneratedToken
from lego.tokenizer import Tokenizer
from lego.training.loop import Evaluation
from lego.training.loop import Progress as PhaseProgress

# legible on dark and light backgrounds
SHALLOW_STYLE, DEEP_STYLE = "green", "bold magenta"
_SMOOTHING = 0.95  # of the shown loss, per step


class TrainingDisplay:
    """Progress bars with loss, speed and ETA, a line for each finished phase, TensorBoard events.

    Without a terminal the lines alone are printed.
    """

    def __init__(self, console: Console, events_folder: Path) -> None:
        self.console, self.events_folder = console, events_folder
        self.bars = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:>6}/{task.total} steps"),
            TextColumn("loss {task.fields[loss]:6.3f}"),
            TextColumn("{task.fields[speed]:>7,.0f} tokens/s"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def watch(self, phase: str) -> PhaseWatcher:
        return PhaseWatcher(self, phase)


class PhaseWatcher:
    """Shows one phase; see lego.training.loop.Watcher."""

    def __init__(self, display: TrainingDisplay, phase: str) -> None:
        self.display, self.phase = display, phase
        self.smooth_loss, self.tokens = math.nan, 0

    def started(self, total_steps: int, step: int) -> None:
        folder = str(self.display.events_folder / self.phase)
        # later steps, which a kill cut off, will be written again
        self.events = SummaryWriter(folder, purge_step=step + 1)
        self.start = time.monotonic()
        self.first_step = step
        self.task = self.display.bars.add_task(
            self.phase, total=total_steps, completed=step, loss=math.nan, speed=0.0
        )

    def stepped(self, step: int, loss: float, tokens: int) -> None:
        self.tokens += tokens
        if math.isnan(self.smooth_loss):
            self.smooth_loss = loss
        self.smooth_loss += (1 - _SMOOTHING) * (loss - self.smooth_loss)
        self.display.bars.update(
            self.task, completed=step, loss=self.smooth_loss, speed=self._speed()
        )

    def evaluated(self, evaluation: Evaluation) -> None:
        for name in ("train_loss", "holdout_loss"):
            self.events.add_scalar(name, getattr(evaluation, name), evaluation.step)
        self.events.add_scalar("tokens_per_second", self._speed(), evaluation.step)

    def finished(self, progress: PhaseProgress) -> None:
        self.events.close()
        self.display.bars.remove_task(self.task)
        if progress.step == self.first_step:
            how = "done before"
        else:
            seconds = time.monotonic() - self.start
            how = f"{seconds:.0f} s, {self._speed():,.0f} tokens/s"
        self.display.console.print(
            f"{self.phase:<18} {progress.step} steps, held-out loss {progress.best_loss:.3f} "
            f"({how})",
            highlight=False,
        )

    def _speed(self) -> float:
        return self.tokens / max(time.monotonic() - self.start, 1e-9)


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """The tables of the two experiments, row for row, then what they lacked."""
    _print_experiments(console, results, f"upper K/V {_kv_name(results)}")
    if "comparison" in results:
        other = results["comparison"]
        _print_experiments(console, other, f"comparison: upper K/V {_kv_name(other)}")
    _print_baselines(console, results)


def _kv_name(results: Mapping[str, Any]) -> str:
    return f"{results['upper_kv']}, policy {results['kv_policy']}"


def _print_experiments(console: Console, results: Mapping[str, Any], title: str) -> None:
    first, second = results["experiment_001"], results["experiment_002"]
    console.rule(title, style="dim")
    console.print(_phase_table(results))
    cache = first["kv_cache"]
    inexact = results["kv_policy"] in ("hole", "propagate")
    # those two decode otherwise: the line "step by step" says how far
    title = f"Two-stage inference (validation{', all K/V present' if inexact else ''})"
    two_stage = _table(title, "metric", "value")
    for name, text in (
        ("shallow ratio", _percent(first["two_stage"]["shallow_ratio"])),
        ("compute cost (layers)", _percent(first["two_stage"]["layer_cost"])),
        ("true cost (with head and gate)", _percent(first["two_stage"]["true_cost"])),
        ("routed PPL", _number(first["two_stage"]["routed_ppl"])),
    ):
        two_stage.add_row(name, text)
    console.print(two_stage)
    kv_cache = _table("KV cache performance", "method", "ms per token", "speedup by the cache")
    for name, key, speedup in (
        ("without cache", "uncached_ms_per_token", "speedup"),
        ("without cache, head on the last", "uncached_last_ms_per_token", "speedup_over_last"),
    ):
        kv_cache.add_row(name, f"{cache[key]:.3f}", _speedup_text(cache, speedup))
    kv_cache.add_row("with cache", f"{cache['cached_ms_per_token']:.3f}", "")
    console.print(kv_cache)
    console.print(_early_exit_table(second, results["experiment_002_gate"], results["criterion"]))
    _print_native_engine(console, results["native_engine"], results["criterion"], second)
    step = results["stepwise"]
    console.print(
        f"Step by step against parallel, {step['tokens']} tokens, teacher-forced: PPL "
        f"{step['stepwise_ppl']:.4f} - {step['routed_ppl']:.4f} = {step['difference']:+.4f}",
        highlight=False,
    )


def _phase_table(results: Mapping[str, Any]) -> Table:
    one, two = results["experiment_001"]["phase1"], results["experiment_001"]["phase2"]
    # joint training has no phases: the figures are those of its two exits
    names = ("phase 1", "phase 2") if results["recipe"] == "lego" else ("shallow", "deep")
    table = _table("Experiment 001: results on validation", "metric", *names, "change")
    for key, name in (
        ("val_ppl", "val PPL"),
        ("val_acc", "val accuracy"),
        ("hard_ppl", "hard PPL"),
        ("easy_ppl", "easy PPL"),
    ):
        if one[key] is None or two[key] is None:
            table.add_row(name, _number(one[key]), _number(two[key]), "-")
        elif key == "val_acc":
            change = f"{100 * (two[key] - one[key]):+.2f} points"
            table.add_row(name, _percent(one[key], 2), _percent(two[key], 2), change)
        else:
            change = f"{100 * (two[key] / one[key] - 1):+.1f} %"
            table.add_row(name, _number(one[key]), _number(two[key]), change)
    return table


def _early_exit_table(softmax: Mapping[str, Any], gate: Mapping[str, Any], criterion: str) -> Table:
    table = _table("Experiment 002: true early exit in generation", "metric", criterion, "gate")
    columns = (softmax, gate)
    total = softmax["shallow_tokens"] + softmax["deep_tokens"]

    def row(name: str, *texts: str) -> None:
        table.add_row(name, *texts)

    row("shallow exits", *(f"{c['shallow_tokens']} / {total}" for c in columns))
    row("deep exits", *(f"{c['deep_tokens']} / {total}" for c in columns))
    for key, name in (
        ("shallow_ratio", "shallow ratio"),
        ("layer_cost", "actual compute cost (layers)"),
        ("layer_savings", "compute savings (layers)"),
        ("true_cost", "true cost (bytes read)"),
    ):
        row(name, *(_percent(c[key]) for c in columns))
    row("standard, ms per token", *(f"{c['full_ms_per_token']:.3f}" for c in columns))
    row("early exit, ms per token", *(f"{c['exit_ms_per_token']:.3f}" for c in columns))
    row("speedup", *(_speedup_text(c) for c in columns))
    row("realised savings", *(_number(c["realised_savings"]) for c in columns))
    row("time efficiency", *(_number(c["time_efficiency"]) for c in columns))
    return table


def _print_native_engine(
    console: Console, native: Mapping[str, Any], criterion: str, reference: Mapping[str, Any]
) -> None:
    if "why_not" in native:
        console.print(f"No native engine: {native['why_not']}", highlight=False, markup=False)
        return
    names = ("exit", "gate", "speculative")
    table = _table("Native engine: the same model and prompts", "metric", criterion, *names[1:])
    columns = [native[name] for name in names]
    total = columns[0]["shallow_tokens"] + columns[0]["deep_tokens"]
    table.add_row("native true cost", *(_percent(c["true_cost"]) for c in columns))
    table.add_row("native full, ms per token", *(f"{c['full_ms_per_token']:.3f}" for c in columns))
    table.add_row("native, ms per token", *(f"{c['exit_ms_per_token']:.3f}" for c in columns))
    table.add_row("native speedup", *map(_speedup_text, columns))
    table.add_row("native realised savings", *(_number(c["realised_savings"]) for c in columns))
    table.add_row("native time efficiency", *(_number(c["time_efficiency"]) for c in columns))
    console.print(table)
    console.print(
        f"Full depth is {_speedup_text(native, 'speedup_over_reference')} as fast as the reference "
        f"({reference['full_ms_per_token']:.3f} ms); {native['same_tokens']} of {total} tokens "
        f"agree up to the first difference, {native['speculative']['same_tokens']} between "
        "speculative and full depth.",
        highlight=False,
    )


def _print_baselines(console: Console, results: Mapping[str, Any]) -> None:
    table = _table(
        "LEGO against dense models trained on the same tokens",
        "model",
        "val PPL",
        "bits per byte",
        "true cost",
    )
    for name, found in results["baselines"].items():
        table.add_row(
            f"{name.replace('_', '-')}, {found['num_layers']} layers",
            _number(found["val_ppl"]),
            f"{found['bits_per_byte']:.4f}",
            _percent(found["true_cost"]),
        )
    for criterion, found in results["criteria"].items():
        table.add_row(
            f"LEGO by {criterion}, {_percent(found['shallow_ratio'])} shallow",
            _number(found["routed_ppl"]),
            f"{found['bits_per_byte']:.4f}",
            _percent(found["true_cost"]),
        )
    console.print(table)
    for line in verdict(results):
        console.print(line, highlight=False)


def print_evaluation(console: Console, found: Mapping[str, Any]) -> None:
    """Both exits alone, then routing by each criterion."""
    exits = _table("Exits (validation)", "exit", "PPL", "word PPL", "bits per byte", "accuracy")
    for name, values in found["exits"].items():
        exits.add_row(
            name,
            _number(values["ppl"]),
            _number(values["word_ppl"]),
            f"{values['bits_per_byte']:.4f}",
            _percent(values["accuracy"]),
        )
    console.print(exits)
    columns = ("threshold", "shallow ratio", "layer cost", "true cost", "routed PPL")
    routing = _table("Two-stage inference (validation)", "criterion", *columns)
    for name, values in found["criteria"].items():
        routing.add_row(
            name,
            f"{values['threshold']:.4f}",
            _percent(values["shallow_ratio"]),
            _percent(values["layer_cost"]),
            _percent(values["true_cost"]),
            _number(values["routed_ppl"]),
        )
    console.print(routing)


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Is it worth it here? One sentence against each dense model, for the cheapest criterion.

    A difference within two standard errors is none. It pays to be better and not dearer, or as good
    and cheaper.
    """
    name = results["compared_by"]
    ours = results["criteria"][name]
    lines = []
    for baseline, dense in results["baselines"].items():
        nats, error = dense["lego_minus_dense_nats"], dense["standard_error"]
        alike = error is None or abs(nats) <= 2 * error
        quality = "as good as" if alike else "better than" if nats < 0 else "worse than"
        costs = ours["true_cost"], dense["true_cost"]
        pays = costs[0] < costs[1] if alike else nats < 0 and costs[0] <= costs[1]
        lines.append(
            f"LEGO by {name} {'pays' if pays else 'does not pay'} against "
            f"{baseline.replace('_', '-')}: {quality} it ({_number(ours['routed_ppl'])} against "
            f"{_number(dense['val_ppl'])} PPL), at a true cost of "
            f"{_percent(ours['true_cost'])} against {_percent(dense['true_cost'])}."
        )
    return lines


class ShadedText:
    """Tokens to text in the colour of the layer they left at, piece by piece.

    A token may hold part of a character, so a piece is what the text grew by.
    """

    def __init__(self, tokenizer: Tokenizer, num_layers: int, prompt: list[int]) -> None:
        self.tokenizer, self.num_layers = tokenizer, num_layers
        self.ids, self.length = list(prompt), len(tokenizer.decode(prompt))

    def piece(self, new: GeneratedToken) -> Text:
        """The text that this token adds; empty while a character is incomplete."""
        self.ids.append(new.token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return Text("")
        added, self.length = text[self.length :], len(text)
        return Text(added, SHALLOW_STYLE if new.exit_layer < self.num_layers else DEEP_STYLE)


def legend(exit_layer: int, num_layers: int) -> Text:
    """Which colour is which exit."""
    return Text.assemble(
        ("shallow", SHALLOW_STYLE),
        f" (left after layer {exit_layer}), ",
        ("deep", DEEP_STYLE),
        f" (ran all {num_layers})",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


# None stands for what is undefined, such as the PPL of no tokens


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _speedup_text(found: Mapping[str, Any], key: str = "speedup") -> str:
    low, high = found[f"{key}_quartiles"]
    return f"{found[key]:.2f}x ({low:.2f} to {high:.2f})"
