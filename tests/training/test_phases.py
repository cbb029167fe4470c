"""The recipes end to end: kills, frozen blocks, baselines."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lego.training.phases as phases
from lego.training.phases import Phases, new_model, train_dense, train_lego
from tests.runs import (
    MODEL,
    TRAIN,
    Silent,
    frozen_copy,
    in_process,
    same_tensors,
    tiny_windows,
    train_and_record,
)

# tiny_windows makes 37 windows, 33 to train on: 9 steps an epoch, 18 a phase, 4 evaluations
LEGO = replace(TRAIN, patience=100)
JOINT = replace(LEGO, recipe="joint", layer_dropout=0.5)


def outcome(folder):
    weights = load_file(folder / "weights.safetensors")
    return weights, json.loads((folder / "history.json").read_text())


@pytest.mark.parametrize(
    ("train", "kills"),
    [
        (LEGO, [("phase1", 5), ("phase1", 18), ("phase2_exit_state", 12)]),
        (JOINT, [("joint_exit_state", 3), ("joint_exit_state", 18)]),
    ],
    ids=["lego", "joint"],
)
def test_killed_training_goes_on_bit_for_bit(tmp_path, train, kills):
    """Killed again and again, each time from where the last kill left off; then to the end."""
    for name in ("whole", "often", "never"):
        (tmp_path / name).mkdir()
    assert in_process(train_and_record, tmp_path / "whole", MODEL, train, None) == 0
    whole_weights, whole_history = outcome(tmp_path / "whole")
    # saved after every step, and only when a phase ends: then a kill loses the whole phase
    for name, seconds in (("often", 0.0), ("never", 1e6)):
        saving = replace(train, checkpoint_seconds=seconds)
        for kill in kills:
            code = in_process(train_and_record, tmp_path / name, MODEL, saving, kill)
            assert code == -signal.SIGKILL
            assert not (tmp_path / name / "weights.safetensors").exists()
        assert in_process(train_and_record, tmp_path / name, MODEL, saving, None) == 0
        weights, history = outcome(tmp_path / name)
        assert same_tensors(weights, whole_weights)
        assert history == whole_history
    assert len(whole_history[0][kills[-1][0]]) == 4


def test_finished_phases_are_only_loaded(tmp_path, monkeypatch):
    windows = tiny_windows()
    first = train_lego(MODEL, LEGO, windows, tmp_path, Silent)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in files} == {"phase1.safetensors", "phase2_exit_state.safetensors"}
    watchers = []

    def watch(name):
        watchers.append(Silent(name))
        return watchers[-1]

    again = train_lego(MODEL, LEGO, windows, tmp_path, watch)
    assert same_tensors(again.model.state_dict(), first.model.state_dict())
    assert (again.history, again.hard_threshold) == (first.history, first.hard_threshold)
    assert [w.phase for w in watchers] == ["phase1", "phase2_exit_state"]
    for watcher in watchers:
        assert watcher.calls == [("started", 18, 18), ("finished", 18)]
        assert watcher.losses == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_upper_kv_shares_phase_1(tmp_path):
    windows, names = tiny_windows(), []
    one = train_lego(MODEL, LEGO, windows, tmp_path, Silent)
    own = replace(MODEL, upper_kv="own")

    def watch(name):
        watcher = Silent(name)
        names.append(watcher)
        return watcher

    other = train_lego(own, LEGO, windows, tmp_path, watch)
    assert {w.phase: bool(w.losses) for w in names} == {"phase1": False, "phase2_own": True}
    assert same_tensors(
        {k: v.detach() for k, v in one.model.lower_parameters().items()},
        {k: v.detach() for k, v in other.model.lower_parameters().items()},
    )


@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
def test_phase_2_trains_the_upper_block_alone(tmp_path, monkeypatch, upper_kv):
    seen = []
    run = Phases.run

    def spying(self, name, trained, parameters, objective):
        def checking(index, step):
            """A frozen parameter takes no gradient: that of the head would be most of the work."""
            assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters)
            return objective(index, step)

        seen.append((name, frozen_copy(model.state_dict()), set(parameters)))
        run(self, name, trained, parameters, checking)
        assert all(p.requires_grad for p in model.parameters())
        seen.append((name, frozen_copy(model.state_dict()), set(parameters)))

    config = replace(MODEL, upper_kv=upper_kv, tie_embeddings=False, qk_norm=True)
    model = new_model(config, 0)
    monkeypatch.setattr(phases, "new_model", lambda *args: model)
    monkeypatch.setattr(Phases, "run", spying)
    trained = train_lego(config, LEGO, tiny_windows(), tmp_path, Silent)
    (_, start, names1), (_, one, _), (_, two, names2), (_, three, _) = seen
    everything = set(dict(model.named_parameters()))
    gate = {"gate.weight", "gate.bias"}
    assert names1 | names2 == everything - gate and not names1 & names2
    kv = {"kv_norm.weight", "upper_kv_proj.weight"} if upper_kv == "exit_state" else set()
    assert kv | {"final_norm.weight"} == {n for n in names2 if not n.startswith("upper.")}

    def changed(before, after):
        return {name for name in everything if not torch.equal(before[name], after[name])}

    assert changed(start, one) == names1
    # phase 2 starts from the exit norm of phase 1
    assert torch.equal(two["final_norm.weight"], one["exit_norm.weight"])
    assert changed(two, three) == names2
    assert changed(three, frozen_copy(trained.model.state_dict())) == gate


def test_phase_2_is_better_where_it_learned(tmp_path):
    """On the held-out windows, hard tokens alone: the start is phase 1, the end is lower."""
    train = replace(LEGO, epochs=6, learning_rate=1e-2)
    trained = train_lego(MODEL, train, tiny_windows(num_ids=2400), tmp_path, Silent)
    first, *_, last = trained.history["phase2_exit_state"]
    assert last.holdout_loss < first.holdout_loss
    assert last.train_loss < first.train_loss
    assert 0 < trained.hard_threshold < 1


@pytest.mark.parametrize("train", [LEGO, JOINT], ids=["lego", "joint"])
def test_baselines(tmp_path, monkeypatch, train):
    """Dense models of both depths see the batches of a phase, for as many passes as LEGO makes."""
    batches = {}

    def recording(name, objective):
        def recorded(index, step):
            if step is not None:
                batches.setdefault(name, []).append(index.tolist())
            return objective(index, step)

        return recorded

    run = Phases.run
    monkeypatch.setattr(
        Phases,
        "run",
        lambda self, name, m, p, objective: run(self, name, m, p, recording(name, objective)),
    )
    windows = tiny_windows()
    train_lego(MODEL, train, windows, tmp_path, Silent)
    (first, *_) = ours = list(batches)
    for depth in (MODEL.exit_layer, MODEL.num_layers):
        dense = train_dense(MODEL, depth, train, windows, tmp_path, Silent)
        assert (len(dense.lower), len(dense.upper)) == (depth, 0)
        assert not dense.training
        seen = batches[f"dense_{depth}"]
        assert seen[:18] == batches[first]
        assert len(seen) == sum(len(batches[name]) for name in ours)
        assert {i for index in seen for i in index} == set(range(windows.num_train))


def test_seed_decides_the_weights_and_nothing_else_does():
    state = torch.get_rng_state()
    one, two, other = (new_model(MODEL, seed).state_dict() for seed in (3, 3, 4))
    assert same_tensors(one, two) and not same_tensors(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_joint_trains_both_exits(tmp_path):
    train = replace(JOINT, epochs=1)
    before = new_model(MODEL, train.seed).state_dict()
    trained = train_lego(MODEL, train, tiny_windows(), tmp_path, Silent)
    after = trained.model.state_dict()
    assert list(trained.history) == ["joint_exit_state"]
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert np.isfinite(trained.hard_threshold)
