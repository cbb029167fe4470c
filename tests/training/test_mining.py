"""Which tokens are hard."""

import numpy as np
import pytest
import torch

from lego.training import mining
from lego.training.mining import mine_hard_tokens
from lego.training.phases import new_model
from tests.runs import MODEL, tiny_windows

WINDOWS = tiny_windows()


def confidences(model):
    index = torch.arange(WINDOWS.num_windows)
    ids, _ = WINDOWS.batch(index, torch.device("cpu"))
    with torch.no_grad():
        return model.exit_logits(model(ids).exit_state).softmax(-1).amax(-1).numpy()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [5, 37, 64])
def test_the_least_confident_share_is_hard(ratio, batch_size):
    model = new_model(MODEL, 0)
    hard = mine_hard_tokens(model, WINDOWS, ratio, batch_size=batch_size)
    assert (hard.mask.shape, hard.mask.dtype) == ((37, 16), np.bool_)
    train = hard.mask[: WINDOWS.num_train]
    assert train.mean() == pytest.approx(ratio, abs=1 / train.size)
    exact = confidences(model)
    # up to the rounding of another batch size
    assert exact[hard.mask].max() <= exact[~hard.mask].min() * (1 + 1e-5)
    assert exact[hard.mask].max() <= hard.threshold * (1 + 1e-5)
    assert exact[~hard.mask].min() >= hard.threshold * (1 - 1e-5)


def test_the_upper_block_is_not_run():
    model = new_model(MODEL, 0)
    model.run_upper = model.upper_kv = model.final_logits = None
    mine_hard_tokens(model, WINDOWS, 0.5, batch_size=8)


def test_held_out_windows_do_not_move_the_threshold(monkeypatch):
    """They are all but certain, and measured, but the quantile is that of the others."""
    model = new_model(MODEL, 0)
    before = mine_hard_tokens(model, WINDOWS, 0.5, batch_size=1)
    real, calls = mining.softmax_confidence, []

    def certain(logits, criterion):
        calls.append(criterion)
        found = real(logits, criterion)
        return torch.ones_like(found) if len(calls) > WINDOWS.num_train else found

    monkeypatch.setattr(mining, "softmax_confidence", certain)
    after = mine_hard_tokens(model, WINDOWS, 0.5, batch_size=1)
    assert set(calls) == {"max_prob"} and len(calls) == WINDOWS.num_windows
    assert after.threshold == before.threshold
    assert before.mask[WINDOWS.num_train :].any() and not after.mask[WINDOWS.num_train :].any()


def test_ties_are_not_hard(monkeypatch):
    tied = lambda logits, criterion: torch.full(logits.shape[:1], 0.25)  # noqa: E731
    monkeypatch.setattr(mining, "softmax_confidence", tied)
    hard = mine_hard_tokens(new_model(MODEL, 0), WINDOWS, 0.5, batch_size=8)
    assert hard.threshold == 0.25 and not hard.mask.any()
