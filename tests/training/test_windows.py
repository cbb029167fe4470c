"""Training windows: where they lie, which are held out, in what order they come."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lego.config import TrainConfig
from lego.training.windows import Windows
from tests.runs import TRAIN, tiny_windows, token_ids

CPU = torch.device("cpu")


@pytest.mark.parametrize("total", [2, 3, 7, 36, 37])
def test_spread_evenly(total):
    windows = Windows.split(token_ids(600), replace(TRAIN, max_tokens=total * 16))
    assert windows.num_windows == total
    place = windows.place.tolist()
    gaps = set(np.diff(place).tolist())
    assert place[0] == 0 and max(gaps) - min(gaps) <= 1
    assert abs(37 - place[-1] - min(gaps)) <= 1  # as far from the end as from one another


@pytest.mark.parametrize("max_tokens", [0, 599, 600, 10_000])
def test_all_of_them(max_tokens):
    windows = Windows.split(token_ids(600), replace(TRAIN, max_tokens=max_tokens))
    assert windows.place.tolist() == list(range(37))


def test_batch_is_the_text():
    ids = token_ids(600)
    windows = Windows.split(ids, replace(TRAIN, max_tokens=8 * 16))
    index = torch.tensor([7, 0, 3])
    inputs, targets = windows.batch(index, CPU)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, i in enumerate(index.tolist()):
        start = int(windows.place[i]) * 16
        assert inputs[row].tolist() == ids[start : start + 16].tolist()
        assert targets[row].tolist() == ids[start + 1 : start + 17].tolist()


@pytest.mark.parametrize(("ratio", "held_out"), [(0.001, 1), (0.04, 1), (0.1, 4), (0.5, 18)])
def test_held_out_windows_are_never_in_the_order(ratio, held_out):
    windows = tiny_windows(replace(TRAIN, holdout_ratio=ratio))
    assert windows.num_windows - windows.num_train == held_out
    for epoch in range(5):
        order = windows.epoch_order(0, epoch)
        assert sorted(order.tolist()) == list(range(windows.num_train))


def test_order_depends_on_seed_and_epoch_alone():
    windows = tiny_windows()
    state = torch.get_rng_state()
    orders = {(s, e): tuple(windows.epoch_order(s, e).tolist()) for s in (0, 1, 2) for e in (0, 1)}
    assert len(set(orders.values())) == 6
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(9)
    again = Windows.split(windows.ids, TRAIN)
    assert all(tuple(again.epoch_order(*key).tolist()) == order for key, order in orders.items())


def test_too_few():
    with pytest.raises(ValueError, match="must be 2 windows of 16 tokens to train, got 1"):
        Windows.split(token_ids(32), TRAIN)
    with pytest.raises(ValueError, match="must be 2 windows of 16 tokens to train, got 1"):
        Windows.split(token_ids(600), replace(TRAIN, max_tokens=31))
    with pytest.raises(ValueError, match="must hold >= 17 ids for seq_len=16, got 16"):
        Windows.split(token_ids(16), TRAIN)
    assert Windows.split(token_ids(33), TRAIN).num_train == 1


@pytest.mark.parametrize("num_windows", [2, 3, 37])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.999])
def test_one_window_at_least_is_trained_on(num_windows, ratio):
    config = TrainConfig(seq_len=16, holdout_ratio=ratio)
    windows = Windows.split(token_ids(num_windows * 16 + 1), config)
    assert 1 <= windows.num_train < num_windows


def test_order_depends_on_all_of_the_seed():
    """torch's CPU generator takes 32 bits of its seed."""
    windows = tiny_windows()
    orders = {tuple(windows.epoch_order(seed, 0).tolist()) for seed in (0, 4096, 2**20)}
    assert len(orders) == 3
