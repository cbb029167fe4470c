"""The training loop: schedule, early stopping, states on disk."""

import json
import math
import struct
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lego.training import loop
from lego.training.loop import Evaluation, Progress, fit
from lego.training.objectives import exit_objective
from lego.training.phases import new_model
from tests.runs import (
    MODEL,
    TRAIN,
    Silent,
    frozen_copy,
    same_tensors,
    tiny_windows,
)

WINDOWS = tiny_windows()  # 33 to train on, 4 held out: 9 steps an epoch
STEPS = 18


class Interrupting(Silent):
    """Stops training after a step, as an error would."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def stepped(self, step, loss, tokens):
        super().stepped(step, loss, tokens)
        if step == self.at:
            raise KeyboardInterrupt


def fit_model(path, config=TRAIN, watcher=None, windows=WINDOWS):
    model = new_model(MODEL, 0)
    objective, parameters = exit_objective(model, windows), model.lower_parameters()
    watcher = watcher or Silent()
    progress = fit(parameters, objective, windows, config, state_path=path, watcher=watcher)
    return frozen_copy(parameters), progress, watcher


def fit_scripted(path, config, losses):
    """Train one number; the held-out losses, the first before any step, are given."""
    parameter, values, losses = nn.Parameter(torch.zeros(())), [], list(losses)

    def objective(index, step):
        if step is not None:
            return parameter * index.numel(), index.numel()
        values.append(float(parameter.detach()))
        return torch.tensor(losses[len(values) - 1] * 4.0), 4

    progress = fit({"x": parameter}, objective, WINDOWS, config, state_path=path, watcher=Silent())
    return float(parameter.detach()), values, progress


def test_early_stopping_restores_the_best(tmp_path):
    config = replace(TRAIN, epochs=9, patience=2)
    best, values, progress = fit_scripted(tmp_path / "a", config, [9, 3, 2, 2.5, 1.5, 1.5, 4, 0])
    # 1.5 again is not better, so the fifth and sixth are bad and the seventh is never measured
    assert [e.holdout_loss for e in progress.history] == [3, 2, 2.5, 1.5, 1.5, 4]
    assert progress.done and (progress.step, progress.best_step) == (30, 20)
    assert (progress.best_loss, best) == (1.5, values[4])
    assert len(set(values)) == 7  # the parameter moved between all evaluations


def test_without_early_stopping_every_epoch_is_run(tmp_path):
    config = replace(TRAIN, epochs=2, patience=4)
    best, values, progress = fit_scripted(tmp_path / "a", config, [5, 1, 2, 3, 4])
    assert (progress.step, progress.best_step, len(values)) == (STEPS, 5, 5)
    assert best == values[1] != values[-1]


def test_a_phase_does_not_end_worse_than_it_began(tmp_path):
    best, values, progress = fit_scripted(tmp_path / "a", TRAIN, [1, 2, 3, 4])
    assert (best, values[0], progress.best_step, progress.best_loss) == (0.0, 0.0, 0, 1.0)
    assert progress.done and progress.step == 15  # patience 3


def test_learning_rate(tmp_path, monkeypatch):
    """Linear warm-up, then a cosine to a tenth, by hand; Adam's steps are as long as the rate."""
    config = replace(TRAIN, weight_decay=0.0, epochs=4, evals_per_epoch=1, grad_clip=1e9)
    rates = []
    step = torch.optim.AdamW.step

    def spying(self, *args, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spying)
    fit_scripted(tmp_path / "a", config, [5, 4, 3, 2, 1])
    total, warmup = 36, 4
    wanted = [(i + 1) / 5 for i in range(warmup)]
    for i in range(total - warmup):
        wanted.append(0.1 + 0.9 * (1 + math.cos(math.pi * i / (total - warmup))) / 2)
    assert [group[0] for group in rates] == pytest.approx([2e-3 * w for w in wanted])
    assert all(group[0] == group[1] for group in rates)
    assert max(rates) == rates[4] and rates[4][0] == 2e-3
    # a resume takes the same rates
    rates.clear()
    saving = replace(config, checkpoint_seconds=0.0)
    monkeypatch.setattr(loop._Trainer, "_evaluate", lambda self: None)

    def stopped(at):
        parameter = nn.Parameter(torch.zeros(()))
        objective = lambda index, step: (parameter * index.numel(), index.numel())  # noqa: E731
        with pytest.raises(KeyboardInterrupt):
            fit(
                {"x": parameter},
                objective,
                WINDOWS,
                saving,
                state_path=tmp_path / "b",
                watcher=Interrupting(at),
            )

    stopped(3)  # the state of step 2 is saved: step 3 comes again
    stopped(20)
    rates = [group[0] for group in rates]
    assert rates[:3] + rates[4:] == pytest.approx([2e-3 * w for w in [*wanted[:3], *wanted[3:20]]])
    assert rates[3] == rates[2]


def test_short_training_warms_up_for_a_quarter(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)),
    )
    fit_scripted(tmp_path / "a", replace(TRAIN, warmup_steps=10_000), [5, 4, 3, 2, 1])
    assert rates.index(max(rates)) == STEPS // 4


def test_weight_decay_spares_vectors():
    model = new_model(MODEL, 0)
    optimizer = loop._adamw(model.lower_parameters(), TRAIN)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for parameter in model.lower_parameters().values():
        assert decay[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0)


def test_gradient_is_clipped(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spying(self):
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spying)
    fit_model(tmp_path / "a", replace(TRAIN, grad_clip=0.25))
    assert norms == pytest.approx([0.25] * STEPS, rel=1e-4)


def test_history_holds_mean_losses(tmp_path):
    _, progress, watcher = fit_model(tmp_path / "a")
    assert [e.step for e in progress.history] == [5, 10, 15, 18]
    starts = [0, 5, 10, 15]
    for evaluation, start in zip(progress.history, starts, strict=True):
        losses = watcher.losses[start : evaluation.step]
        assert evaluation.train_loss == pytest.approx(sum(losses) / len(losses))
    assert progress.history[-1].holdout_loss < progress.history[0].holdout_loss
    assert watcher.calls[0] == ("started", STEPS, 0) and watcher.calls[-1] == ("finished", STEPS)


@pytest.mark.parametrize("at", [1, 5, 6, 17, 18])
def test_interrupted_goes_on_bit_for_bit(tmp_path, at):
    """As the kill tests of test_phases.py, at more steps and in this process."""
    whole, progress, _ = fit_model(tmp_path / "whole")
    saving = replace(TRAIN, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        fit_model(tmp_path / "cut", saving, Interrupting(at))
    weights, resumed, watcher = fit_model(tmp_path / "cut", saving)
    assert watcher.calls[0] == ("started", STEPS, at - 1)
    assert same_tensors(weights, whole)
    assert resumed == progress


def test_state_saved_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    steps = []

    class Clock(Silent):
        def stepped(self, step, loss, tokens):
            now[0] += 4.0

    save = loop._Trainer._save
    monkeypatch.setattr(
        loop._Trainer, "_save", lambda self: (steps.append(self.progress.step), save(self))
    )
    fit_model(tmp_path / "a", replace(TRAIN, checkpoint_seconds=10.0), Clock())
    assert steps == [3, 6, 9, 12, 15, 18]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_finished_state_holds_the_best_alone(tmp_path):
    weights, _, _ = fit_model(tmp_path / "a")
    state = load_file(tmp_path / "a")
    assert same_tensors(state, {f"best.{name}": tensor for name, tensor in weights.items()})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_not_finite(tmp_path, bad):
    """The state of the last good step stays, and training can go on from it."""
    model, path = new_model(MODEL, 0), tmp_path / "state"
    objective = exit_objective(model, WINDOWS)

    def exploding(index, step):
        loss, count = objective(index, step)
        return (loss * bad if step == 6 else loss), count

    saving = replace(TRAIN, checkpoint_seconds=0.0)
    parameters = model.lower_parameters()
    with pytest.raises(FloatingPointError, match=f"loss must be finite, got {bad} at 7"):
        fit(parameters, exploding, WINDOWS, saving, state_path=path, watcher=Silent())
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert all(t.isfinite().all() for t in load_file(path).values())
    resumed, _, watcher = fit_model(path, saving)
    assert watcher.calls[0] == ("started", STEPS, 6)
    assert same_tensors(resumed, fit_model(tmp_path / "whole")[0])


def unfinished(path):
    with pytest.raises(KeyboardInterrupt):
        fit_model(path, replace(TRAIN, checkpoint_seconds=0.0), Interrupting(8))


def damage(path, kind):
    content, tensors = path.read_bytes(), load_file(path)
    metadata = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "one byte short":
        path.write_bytes(content[:-1])
    elif kind == "not a state":
        path.write_bytes(b"\xff" * 4000)
    elif kind == "damaged header":
        path.write_bytes(content[:9] + b"\xff" + content[10:])
    elif kind == "no progress":
        save_file(tensors, path)
    elif kind == "no history":
        save_file(tensors, path, {"progress": json.dumps({"step": 3})})
    elif kind == "progress cut":
        save_file(tensors, path, {"progress": '{"step": 3, "his'})
    elif kind == "tensor missing":
        del tensors["best.embedding.weight"]
        save_file(tensors, path, metadata)
    elif kind == "moment missing":
        del tensors["adam.exp_avg.exit_norm.weight"]
        save_file(tensors, path, metadata)
    elif kind == "another shape":
        for name in ("best.embedding.weight", "now.embedding.weight"):
            tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "half",
        "one byte short",
        "not a state",
        "damaged header",
        "no progress",
        "no history",
        "progress cut",
        "tensor missing",
        "moment missing",
        "another shape",
    ],
)
def test_damaged_state(tmp_path, kind):
    path = tmp_path / "phase.safetensors"
    unfinished(path)
    damage(path, kind)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="fit: training state must be whole") as error:
        fit_model(path)
    assert str(path) in str(error.value) and "delete it" in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_finished_state_of_another_shape(tmp_path):
    path = tmp_path / "phase.safetensors"
    fit_model(path)
    model = new_model(replace(MODEL, vocab_size=301), 0)
    with pytest.raises(ValueError, match="fit: training state must be whole and of this model"):
        fit(
            model.lower_parameters(),
            exit_objective(model, WINDOWS),
            WINDOWS,
            TRAIN,
            state_path=path,
            watcher=Silent(),
        )


def test_progress_round_trip():
    history = [Evaluation(step=5, train_loss=0.1 + 0.2, holdout_loss=1 / 3)]
    progress = Progress(step=7, best_loss=math.inf, loss_sum=1e-17, history=history)
    assert Progress.from_json(json.dumps(asdict(progress))) == progress


def test_disk_full_keeps_the_last_state(tmp_path, monkeypatch):
    path = tmp_path / "state"
    unfinished(path)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lego.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit_model(path, replace(TRAIN, checkpoint_seconds=0.0))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert path.read_bytes() == before
