"""The exit gate: logistic regression of agreement on the exit state."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lego.training import gate
from lego.training.gate import fit_gate
from lego.training.phases import new_model
from tests.runs import (
    MODEL,
    TRAIN,
    frozen_copy,
    tiny_windows,
)

WINDOWS = tiny_windows()


def agreement(model, windows=WINDOWS):
    ids, _ = windows.batch(torch.arange(windows.num_train), torch.device("cpu"))
    with torch.no_grad():
        states = model(ids)
        shallow = model.exit_logits(states.exit_state).argmax(-1)
        deep = model.final_logits(states.final_state).argmax(-1)
        score = model.gate_score(states.exit_state.flatten(0, 1))
    return score, (shallow == deep).flatten().float()


def model_that_agrees(upper_kv="exit_state"):
    """A model whose exits agree where one direction of the exit state says so."""
    model = new_model(replace(MODEL, upper_kv=upper_kv), 0)
    direction = torch.randn(MODEL.dim, generator=torch.Generator().manual_seed(1))

    def final_logits(state):
        agree = model.exit_norm(state) @ direction > 1.0
        return torch.where(agree[..., None], 1, -1) * model.exit_logits(state)

    model.run_upper, model.final_logits = lambda state, *args, **kwargs: state, final_logits
    return model


@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
def test_better_than_a_constant(upper_kv):
    model = model_that_agrees(upper_kv)
    before = frozen_copy(model.state_dict())
    fit_gate(model, WINDOWS, batch_size=8)
    score, agrees = agreement(model)
    share = agrees.mean()
    assert 0.2 < share < 0.8
    loss = F.binary_cross_entropy(score, agrees)
    assert loss < 0.25 * F.binary_cross_entropy(share.expand_as(agrees), agrees)
    assert ((score > 0.5) == (agrees == 1)).float().mean() > 0.97
    assert float(score.mean()) == pytest.approx(float(share), abs=0.01)  # a fitted bias does that
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"gate.weight", "gate.bias"}


def test_the_fit_is_the_minimum():
    """No neighbour is better: the fit is done, whatever was there before."""
    model = model_that_agrees()
    fit_gate(model, WINDOWS, batch_size=8)
    found = frozen_copy(model.gate.state_dict())
    with torch.no_grad():
        model.gate.weight.fill_(7.0)
        model.gate.bias.fill_(-3.0)
    fit_gate(model, WINDOWS, batch_size=8)
    for name, value in model.gate.state_dict().items():
        assert torch.equal(value, found[name])

    def penalised():
        score, agrees = agreement(model)
        weight = model.gate.weight.detach()
        return F.binary_cross_entropy(score, agrees) + gate._L2 * weight.square().sum()

    best = penalised()
    for index in range(MODEL.dim):
        for step in (-0.3, 0.3):
            with torch.no_grad():
                model.gate.weight[0, index] += step
                assert penalised() > best
                model.gate.weight[0, index] -= step


@pytest.mark.parametrize("always", [True, False])
def test_no_two_classes(always):
    model = model_that_agrees()
    sign = 1 if always else -1
    model.final_logits = lambda state: sign * model.exit_logits(state)
    fit_gate(model, WINDOWS, batch_size=8)
    score, agrees = agreement(model)
    assert agrees.unique().tolist() == [float(always)]
    assert all(tensor.isfinite().all() for tensor in model.gate.state_dict().values())
    assert torch.all(score > 0.99 if always else score < 0.01)


def test_spread_over_the_training_windows(monkeypatch):
    """With fewer tokens than the split holds, windows from end to end of it, none held out."""
    seen = []
    batch = type(WINDOWS).batch

    def spying(self, index, device):
        seen.extend(index.tolist())
        return batch(self, index, device)

    monkeypatch.setattr(type(WINDOWS), "batch", spying)
    fit_gate(new_model(MODEL, 0), WINDOWS, batch_size=4)
    assert seen == list(range(WINDOWS.num_train))
    seen.clear()
    monkeypatch.setattr(gate, "_MAX_TOKENS", 5 * TRAIN.seq_len)
    fit_gate(new_model(MODEL, 0), WINDOWS, batch_size=4)
    assert seen == [0, 8, 16, 24, 32]
