"""What each phase minimises, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lego.training.objectives import (
    _dropped_layers,
    exit_objective,
    hard_token_objective,
    joint_objective,
)
from lego.training.phases import new_model
from lego.training.windows import Windows
from tests.runs import MODEL, TRAIN, tiny_windows

WINDOWS = tiny_windows()
INDEX = torch.tensor([3, 0, 30])
KINDS = [
    pytest.param({"upper_kv": "exit_state"}, id="exit_state"),
    pytest.param({"upper_kv": "own"}, id="own"),
]


def hard_mask(share=0.4):
    draw = np.random.default_rng(0).random((WINDOWS.num_windows, WINDOWS.seq_len))
    return draw < share


def refuse(*args, **kwargs):
    raise AssertionError("must not be run")


def make(changes, seed=0):
    return new_model(replace(MODEL, **changes), seed)


def targets():
    return WINDOWS.batch(INDEX, torch.device("cpu"))


@pytest.mark.parametrize("changes", KINDS)
def test_phase_1_never_runs_the_upper_block(changes):
    model = make(changes)
    for name in ("run_upper", "upper_kv", "final_logits", "attend_upper_within"):
        setattr(model, name, refuse)
    for block in model.upper:
        block.forward = refuse
    loss, count = exit_objective(model, WINDOWS)(INDEX, 0)
    loss.backward()
    assert count == 3 * 16
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == set(model.lower_parameters())
    ids, target = targets()
    with torch.no_grad():
        logits = model.exit_logits(make(changes)(ids).exit_state)
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert float(loss.detach()) == pytest.approx(48 * float(nll), rel=1e-5)


@pytest.mark.parametrize("changes", KINDS)
def test_phase_2_moves_the_upper_block_alone(changes):
    """In full context: queries and keys have a gradient, which windows of one token lack."""
    model = make(changes | {"num_kv_heads": 2})
    loss, count = hard_token_objective(model, WINDOWS, hard_mask())(INDEX, 0)
    loss.backward()
    assert count == hard_mask()[INDEX.numpy()].sum()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    shared = {"head.weight", "embedding.weight"}  # the optimizer does not hold the tied head
    assert moved - shared == set(model.upper_parameters())
    width = model.config.num_heads * model.config.head_dim
    for layer, block in enumerate(model.upper):
        grad = block.attention.in_proj.weight.grad
        parts = {"q": grad[:width]}
        if changes["upper_kv"] == "own":
            parts |= {"k": grad[width : 2 * width], "v": grad[2 * width :]}
        else:
            packed = model.upper_kv_proj.weight.grad.unflatten(0, (2, 2, width))[layer]
            parts |= {"k": packed[0], "v": packed[1]}
        for name, part in parts.items():
            assert part.shape == (width, 16) and bool(part.any()), name


@pytest.mark.parametrize("changes", KINDS)
def test_phase_2_loss_is_that_of_the_hard_tokens(changes):
    model, hard = make(changes), hard_mask()
    loss, count = hard_token_objective(model, WINDOWS, hard)(INDEX, None)
    ids, target = targets()
    nll = F.cross_entropy(
        model.final_logits(model(ids).final_state).transpose(1, 2), target, reduction="none"
    )
    chosen = nll[torch.from_numpy(hard[INDEX.numpy()])]
    assert count == len(chosen)
    assert float(loss.detach()) == pytest.approx(float(chosen.detach().sum()), rel=1e-5)


def test_phase_2_target_of_an_easy_token_changes_nothing():
    """The last id of a window is a target alone: hard, it counts; easy, it does not."""
    hard = hard_mask()
    for last_is_hard in (True, False):
        hard[5, -1] = last_is_hard
        found = []
        for change in (0, 1):
            ids = np.array(WINDOWS.ids)
            ids[6 * 16] = (ids[6 * 16] + change) % 50
            windows = Windows.split(ids, TRAIN)
            model = make({})
            loss, _ = hard_token_objective(model, windows, hard)(torch.tensor([5]), 0)
            loss.backward()
            grads = [p.grad for p in model.upper_parameters().values()]
            found.append((loss.detach(), torch.cat([grad.flatten() for grad in grads])))
        same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
        assert same == [not last_is_hard] * 2


def test_phase_2_without_hard_tokens():
    model = make({})
    nothing = np.zeros((WINDOWS.num_windows, WINDOWS.seq_len), dtype=bool)
    loss, count = hard_token_objective(model, WINDOWS, nothing)(INDEX, 0)
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)
    assert not any(bool(p.grad.any()) for p in model.upper_parameters().values())


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_joint_loss_weighs_both_exits(changes, weight):
    model = make(changes)
    config = replace(TRAIN, recipe="joint", joint_exit_weight=weight, layer_dropout=0.9)
    loss, count = joint_objective(model, WINDOWS, config)(INDEX, None)  # held out: no dropout
    ids, target = targets()
    states = model(ids)
    shallow, deep = (
        F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        for logits in (model.exit_logits(states.exit_state), model.final_logits(states.final_state))
    )
    wanted = weight * float(shallow.detach()) + (1 - weight) * float(deep.detach())
    assert count == 48 and float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    missing = {n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert missing == {"gate.weight", "gate.bias"}


DROPOUT = replace(TRAIN, recipe="joint", layer_dropout=0.6)


def drawn(config, steps=range(400)):
    return [_dropped_layers(4, config, step) for step in steps]


def test_layer_dropout_is_a_function_of_the_step():
    state = torch.get_rng_state()
    found = drawn(DROPOUT)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(DROPOUT, reversed(range(400))) == found[::-1]
    assert _dropped_layers(4, DROPOUT, None) == frozenset()
    assert not any(drawn(replace(DROPOUT, layer_dropout=0.0)))
    rates = [sum(layer in step for step in found) / 400 for layer in range(4)]
    # deeper layers more often: 0.15, 0.3, 0.45, 0.6, each within 4 standard deviations
    assert rates == pytest.approx([0.15, 0.3, 0.45, 0.6], abs=0.1)


@pytest.mark.parametrize("seed", [1, 4096])
def test_layer_dropout_is_a_function_of_the_seed(seed):
    assert drawn(replace(DROPOUT, seed=seed)) != drawn(DROPOUT)


def test_dropped_layers_are_not_run(monkeypatch):
    config = replace(TRAIN, recipe="joint", layer_dropout=0.9)
    step = next(s for s in range(99) if _dropped_layers(2, config, s) == {1})
    model = make({})
    model.upper[1].forward = refuse
    loss, _ = joint_objective(model, WINDOWS, config)(INDEX, step)
    loss.backward()
    assert all(p.grad is None for p in model.upper[1].parameters())
    assert all(p.grad is not None for p in model.upper[0].parameters())
    with pytest.raises(AssertionError, match="must not be run"):
        joint_objective(model, WINDOWS, config)(INDEX, None)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_large_seeds(seed):
    assert _dropped_layers(2, replace(TRAIN, seed=seed, layer_dropout=0.5), 7) <= {0, 1}
    assert len(WINDOWS.epoch_order(seed, 3)) == WINDOWS.num_train
