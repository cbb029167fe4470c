"""What each phase minimises. An objective maps windows to a summed loss and its token count."""

# Shape letters: B = windows, T = tokens, N = tokens that count, D = model width.

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lego.config import TrainConfig
from lego.kv_cache import attend_within
from lego.model import LegoModel
from lego.seeding import generator
from lego.training.windows import Windows

# (window indices, training step or None on held-out windows) -> (loss summed over tokens, tokens)
Objective = Callable[[Tensor, int | None], tuple[Tensor, int]]


def _sum_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum")


def exit_objective(model: LegoModel, windows: Windows) -> Objective:
    """Phase 1, and dense baselines: next-token loss at the exit; the upper block is not run."""

    def objective(index: Tensor, step: int | None) -> tuple[Tensor, int]:
        ids_BT, target_BT = windows.batch(index, model.device)
        exit_state = model.run_lower(ids_BT, model.positions(ids_BT), lambda layer: attend_within)
        return _sum_loss(model.exit_logits(exit_state), target_BT), target_BT.numel()

    return objective


def hard_token_objective(model: LegoModel, windows: Windows, hard_NT: np.ndarray) -> Objective:
    """Phase 2: the upper block, in full context, learns from hard tokens alone.

    hard_NT: bool [windows, seq_len], true where the target is hard. The lower block is frozen.
    """

    def objective(index: Tensor, step: int | None) -> tuple[Tensor, int]:
        ids_BT, target_BT = windows.batch(index, model.device)
        hard_BT = torch.from_numpy(hard_NT[index.numpy()]).to(model.device)
        position_BT = model.positions(ids_BT)
        with torch.no_grad():
            exit_state = model.run_lower(ids_BT, position_BT, lambda layer: attend_within)
        attend = model.attend_upper_within(exit_state, position_BT)
        final_BTD = model.run_upper(exit_state, position_BT, attend)
        # the head reads hard tokens alone: with a large vocabulary it is most of the work
        return (
            _sum_loss(model.final_logits(final_BTD[hard_BT]), target_BT[hard_BT]),
            int(hard_BT.sum()),
        )

    return objective


def joint_objective(model: LegoModel, windows: Windows, config: TrainConfig) -> Objective:
    """Recipe `joint`: both exits at once, upper layers dropped at random while training.

    Source: Elhoushi et al. 2024, arXiv:2404.16710 (early-exit loss, depth-growing layer dropout).
    """

    def objective(index: Tensor, step: int | None) -> tuple[Tensor, int]:
        ids_BT, target_BT = windows.batch(index, model.device)
        position_BT = model.positions(ids_BT)
        exit_state = model.run_lower(ids_BT, position_BT, lambda layer: attend_within)
        final = model.run_upper(
            exit_state,
            position_BT,
            model.attend_upper_within(exit_state, position_BT),
            skip=_dropped_layers(len(model.upper), config, step),
        )
        weight = config.joint_exit_weight
        loss = weight * _sum_loss(model.exit_logits(exit_state), target_BT)
        loss = loss + (1 - weight) * _sum_loss(model.final_logits(final), target_BT)
        return loss, target_BT.numel()

    return objective


def _dropped_layers(num_layers: int, config: TrainConfig, step: int | None) -> frozenset[int]:
    """Upper layers to skip: a function of seed and step, so that a resume repeats them."""
    if step is None:
        return frozenset()
    draw = torch.rand(num_layers, generator=generator(config.seed, step)).tolist()
    chance = [config.layer_dropout * (layer + 1) / num_layers for layer in range(num_layers)]
    return frozenset(i for i in range(num_layers) if draw[i] < chance[i])
