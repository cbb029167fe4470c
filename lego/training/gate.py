"""Fitting the exit gate: will the shallow token be the deep one?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lego.model import LegoModel
from lego.training.windows import Windows

# the probe has dim + 1 weights: more tokens than this move it by less than its own noise
_MAX_TOKENS = 100_000
_L2 = 1e-4


def fit_gate(model: LegoModel, windows: Windows, *, batch_size: int) -> None:
    """Set model.gate to the logistic regression of "shallow token = deep token" on the exit state.

    The input is the normalised exit state that the head sees; the fit is full-batch L-BFGS in
    float64 on training windows spread evenly, so it needs no seed.
    """
    inputs_ND, agrees_N = _agreement(model, windows, batch_size)
    weight = torch.zeros(inputs_ND.size(1), dtype=torch.float64, requires_grad=True)
    mean_agreement = agrees_N.mean().clamp(1e-6, 1 - 1e-6)
    bias = torch.logit(mean_agreement).clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        score_N = inputs_ND @ weight + bias
        loss = F.binary_cross_entropy_with_logits(score_N, agrees_N) + _L2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        model.gate.weight.copy_(weight[None])
        model.gate.bias.copy_(bias[None])


@torch.no_grad()
def _agreement(model: LegoModel, windows: Windows, batch_size: int) -> tuple[Tensor, Tensor]:
    """Normalised exit states [N, D] and agreement [N], 0 or 1, float64 on the CPU."""
    wanted = max(1, min(windows.num_train, _MAX_TOKENS // windows.seq_len))
    chosen = torch.linspace(0, windows.num_train - 1, wanted).long()
    inputs, agrees = [], []
    for index in chosen.split(batch_size):
        ids_BT, _ = windows.batch(index, model.device)
        states = model(ids_BT)
        shallow = model.exit_logits(states.exit_state).argmax(-1)
        deep = model.final_logits(states.final_state).argmax(-1)
        inputs.append(model.exit_norm(states.exit_state).flatten(0, 1).double().cpu())
        agrees.append((shallow == deep).flatten().double().cpu())
    return torch.cat(inputs), torch.cat(agrees)
