"""Plots of a run: SVG files that can be parsed and searched."""

from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import pytest
import torch

from lego.cost import expected_true_cost
from lego.evaluation import TokenScores, perplexity
from lego.plots import plot_confidence, plot_cost, plot_loss, save_plots
from lego.training.loop import Evaluation
from tests.runs import MODEL, finished_run

NUM = 200
HISTORY = {
    name: [Evaluation(step=s, train_loss=5.0 / s, holdout_loss=6.0 / s) for s in (1, 2, 3)]
    for name in ("phase1", "phase2_exit_state")
}
BASELINES = {
    "dense_shallow": {"num_layers": 2, "val_ppl": 9.0, "true_cost": 0.6},
    "dense_deep": {"num_layers": 4, "val_ppl": 8.0, "true_cost": 1.0},
}
USED = {"true_cost": 0.8, "routed_ppl": 7.0}
RESULTS = {
    "criterion": "max_prob",
    "threshold": 0.25,
    "criteria": {"max_prob": USED, "gate": USED},
    "baselines": BASELINES,
}


@pytest.fixture
def scores():
    draw = torch.Generator().manual_seed(0)
    shallow, deep, *confidence = torch.rand(4, NUM, generator=draw)
    correct = confidence[0] > 0.4
    return TokenScores(
        nll_shallow=shallow + 2,
        nll_deep=deep + 1,
        correct_shallow=correct,
        correct_deep=correct,
        agree=correct,
        confidence=dict(zip(("max_prob", "gate"), confidence, strict=True)),
    )


def texts(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return {"".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")}


WANTED = {
    "loss.svg": {
        "Held-out loss (dotted: training; phase 2: hard tokens)",
        "step",
        "phase1",
        "phase2_exit_state",
    },
    "confidence.svg": {
        "Tokens right of the threshold exit",
        "confidence (max_prob)",
        "shallow token right",
        "shallow token wrong",
        "threshold 0.250",
    },
    "cost.svg": {
        "Quality against cost (dots: calibrated thresholds)",
        "LEGO, max_prob",
        "LEGO, gate",
        "dense-shallow (2 layers)",
        "dense-deep (4 layers)",
    },
}


def test_files_are_svg(tmp_path, scores):
    before = dict(matplotlib.rcParams)
    model = SimpleNamespace(config=MODEL)
    outcome = SimpleNamespace(
        results=RESULTS,
        scores=scores,
        history=HISTORY,
        checkpoint=SimpleNamespace(model=model),
    )
    save_plots(outcome, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(WANTED)
    for name, wanted in WANTED.items():
        assert wanted <= texts(tmp_path / name)
    assert dict(matplotlib.rcParams) == before


def test_a_real_run_has_them():
    folder = finished_run()[0]
    for name, wanted in WANTED.items():
        assert any(title in texts(folder / name) for title in wanted)
    assert {"phase1", "phase2_exit_state"} <= texts(folder / "loss.svg")


def test_loss_lines():
    (axes,) = plot_loss(HISTORY).axes
    solid, dotted, *_ = axes.get_lines()
    assert (solid.get_linestyle(), dotted.get_linestyle()) == ("-", ":")
    assert solid.get_xdata().tolist() == [1, 2, 3]
    assert solid.get_ydata().tolist() == [6.0, 3.0, 2.0]
    assert dotted.get_ydata().tolist() == [5.0, 2.5, 5 / 3]
    assert solid.get_color() == dotted.get_color() and len(axes.get_lines()) == 4


def test_confidence_bars_hold_every_token(scores):
    (axes,) = plot_confidence(scores, "gate", 0.25).axes
    assert sum(bar.get_height() for bar in axes.patches) == NUM
    (line,) = axes.get_lines()
    assert line.get_xdata() == [0.25, 0.25]


@pytest.mark.parametrize("threshold", [0.0, float("inf")])
def test_confidence_at_odd_thresholds(tmp_path, scores, threshold):
    plot_confidence(scores, "max_prob", threshold).savefig(tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")


def test_cost_sweep_goes_from_deep_to_shallow(scores):
    (axes,) = plot_cost(scores, MODEL, RESULTS).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for criterion in ("max_prob", "gate"):
        line = lines[f"LEGO, {criterion}"]
        costs, ppls = line.get_xdata(), line.get_ydata()
        assert len(costs) == 41
        ends = [expected_true_cost(MODEL, ratio, criterion) for ratio in (0.0, 1.0)]
        assert [costs[0], costs[-1]] == pytest.approx(ends)
        assert ppls[0] == pytest.approx(perplexity(scores.nll_deep))
        assert ppls[-1] == pytest.approx(perplexity(scores.nll_shallow))
    assert list(lines["dense-shallow (2 layers)"].get_xdata()) == [0.6]
    assert list(lines["dense-deep (4 layers)"].get_ydata()) == [8.0]
