"""Plots of a run, as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lego.config import Criterion, ModelConfig
from lego.cost import expected_true_cost
from lego.evaluation import TokenScores, perplexity, routed
from lego.experiment import Outcome
from lego.training.loop import Evaluation

_SIZE = (6.4, 4.0)  # inches
_POLICY_LINES = {"exact": "-", "recompute": "-", "propagate": "--", "hole": ":"}
_SWEEP = np.linspace(0, 1, 41)  # shallow ratios of the cost plot


def save_plots(outcome: Outcome, folder: Path) -> None:
    """Write loss.svg, confidence.svg and cost.svg."""
    results, scores = outcome.results, outcome.scores
    criterion: Criterion = results["criterion"]
    # text stays text: it can be searched, and the files are small
    with matplotlib.rc_context({"svg.fonttype": "none", "axes.spines.top": False}):
        plot_loss(outcome.history).savefig(folder / "loss.svg")
        plot_confidence(scores, criterion, results["threshold"]).savefig(folder / "confidence.svg")
        model_config = outcome.checkpoint.model.config
        plot_cost(scores, model_config, results).savefig(folder / "cost.svg")


def plot_loss(history: Mapping[str, list[Evaluation]]) -> Figure:
    """Held-out (solid) and training (dotted) loss of every phase."""
    figure, axes = new_axes("step", "loss (nats per token)")
    for phase, evaluations in history.items():
        steps = [e.step for e in evaluations]
        (line,) = axes.plot(steps, [e.holdout_loss for e in evaluations], marker="o", label=phase)
        color = line.get_color()
        axes.plot(steps, [e.train_loss for e in evaluations], linestyle=":", color=color)
    axes.set_title("Held-out loss (dotted: training; phase 2: hard tokens)")
    axes.legend()
    return figure


def plot_confidence(scores: TokenScores, criterion: Criterion, threshold: float) -> Figure:
    """Confidence of the validation tokens, right and wrong ones apart, with the threshold."""
    figure, axes = new_axes(f"confidence ({criterion})", "validation tokens")
    confidence = scores.confidence[criterion].numpy()
    correct = scores.correct_shallow.numpy()
    axes.hist(
        [confidence[correct], confidence[~correct]],
        bins=np.linspace(0, 1, 41).tolist(),
        stacked=True,
        label=["shallow token right", "shallow token wrong"],
    )
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set_title("Tokens right of the threshold exit")
    axes.legend()
    return figure


def plot_cost(scores: TokenScores, config: ModelConfig, results: Mapping[str, Any]) -> Figure:
    """Routed perplexity against true cost over all thresholds, with the dense models."""
    figure, axes = new_axes("true cost (full depth = 1)", "validation PPL")
    for criterion in ("max_prob", "gate"):
        confidence = np.sort(scores.confidence[criterion].numpy())[::-1]
        costs, ppls = [], []
        for ratio in _SWEEP:
            count = round(ratio * len(confidence))
            threshold = float(confidence[count - 1]) if count else float("inf")
            nll, _ = routed(scores, criterion, threshold)
            costs.append(expected_true_cost(config, float(ratio), criterion))
            ppls.append(perplexity(nll))
        axes.plot(costs, ppls, label=f"LEGO, {criterion}")
        used = results["criteria"][criterion]
        axes.plot(used["true_cost"], used["routed_ppl"], marker="o", color="black", zorder=3)
    for name, dense in results["baselines"].items():
        axes.plot(
            dense["true_cost"],
            dense["val_ppl"],
            marker="s",
            linestyle="none",
            label=f"{name.replace('_', '-')} ({dense['num_layers']} layers)",
        )
    axes.set_title("Quality against cost (dots: calibrated thresholds)")
    axes.legend()
    return figure


def save_frontier(found: Mapping[str, Any], folder: Path) -> None:
    """Write frontier.svg from what frontier.json holds."""
    with matplotlib.rc_context({"svg.fonttype": "none", "axes.spines.top": False}):
        plot_frontier(found).savefig(folder / "frontier.svg")


def plot_frontier(found: Mapping[str, Any]) -> Figure:
    """Bits per byte of every setting against time, and against true cost, with the dense models."""
    figure = Figure(figsize=(2 * _SIZE[0], _SIZE[1]), layout="constrained")
    sides = zip(
        figure.subplots(1, 2, sharey=True),
        ("ms_per_token", "true_cost"),
        ("ms per token", "true cost (full depth = 1)"),
        strict=True,
    )
    for axes, key, x_label in sides:
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
        for (criterion, policy), rows in _curves(found["settings"]).items():
            axes.plot(
                [row["generation"][key] for row in rows],
                [row["bits_per_byte"] for row in rows],
                color=f"C{list(found['criteria']).index(criterion)}",
                linestyle=_POLICY_LINES[policy],
                marker=".",
                label=f"{criterion}, {policy}",
            )
        for (name, model), marker in zip(found["models"].items(), "*sD", strict=True):
            axes.plot(
                model[key],
                model["bits_per_byte"],
                marker=marker,
                color="black",
                linestyle="none",
                label=f"{name.replace('_', '-')} ({model['num_layers']} layers)",
            )
        axes.set_ylabel("bits per byte")
    figure.suptitle("Quality against time, and against bytes read (generation at equal exit rates)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def _curves(
    settings: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Settings by criterion and KV policy."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for setting in settings:
        curves.setdefault((setting["criterion"], setting["kv_policy"]), []).append(setting)
    return curves


def new_axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    # Figure without pyplot: no global state, no window
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes
