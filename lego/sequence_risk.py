"""The risk of early exit: one number in [0, 1] for every sequence and threshold.

Sequences are the unit, not tokens: the tokens of one depend on each other. Each risk is measured as
generation will run: same criterion, same KV policy, greedy, same length.
"""

# Shape letters: G = thresholds, N = sequences, B = some of them, P = prompt tokens, T = new tokens,
# L = P + T, D = model width, V = vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lego.calibration import calibrate_by_quantile
from lego.config import Criterion
from lego.data import num_windows, window_batch
from lego.decoding import CachedDecoder
from lego.generation import Engine, generate
from lego.model import LegoModel
from lego.ops.exit_decision import softmax_confidence
from lego.seeding import generator
from lego.strategies import EarlyExit

_MAX_ROWS = 32  # of a batch: 128 rows are no faster per token
_MAX_LOGITS = 1 << 24  # of a batch, 64 MiB in float32
_GRID_TOKENS = 1 << 14
_GRID_RATIOS = (0.01, 0.02, *(k / 20 for k in range(1, 21)))

Advance = Callable[[int], None]


@dataclass(frozen=True)
class DrawnSequences:
    """Token ids int64 [N, length] and the number of documents they came from."""

    ids: Tensor
    num_documents: int


@dataclass(frozen=True)
class SequenceRisks:
    """risk float64 [G, N], in [0, 1]; shallow_ratio float64 [G], over all sequences' tokens."""

    risk: np.ndarray
    shallow_ratio: np.ndarray


def draw_sequences(
    ids: np.ndarray, end_of_text_id: int, num_sequences: int, length: int
) -> DrawnSequences:
    """Draw num_sequences runs of `length` ids, always the same ones, each inside one document.

    Documents, as in TokenSplit, are cut into non-overlapping runs. With enough documents, each of
    those drawn gives one run, and each document is as likely as another: the sequences are
    exchangeable with the next document's. Otherwise every run of the text is as likely as another.
    Raises: ValueError if there are too few runs.
    """
    starts = np.flatnonzero(ids == end_of_text_id) + 1
    num_runs = (np.append(starts[1:] - 1, len(ids)) - starts) // length
    document = np.repeat(np.arange(len(starts)), num_runs)
    if len(document) < num_sequences:
        raise ValueError(
            f"calibrate: the calibration split must hold {num_sequences} sequences of {length} "
            f"tokens, got {len(document)}; take fewer (--num-sequences) or "
            "shorter ones (--prompt-tokens, --max-new-tokens), or more text"
        )
    within = np.arange(len(document)) - np.repeat(np.cumsum(num_runs) - num_runs, num_runs)
    begin = starts[document] + within * length
    order = torch.randperm(len(document), generator=generator(0)).numpy()
    _, first = np.unique(document[order], return_index=True)
    if len(first) >= num_sequences:
        # one run of each document; the documents in an order that long ones do not lead
        order = order[first[torch.randperm(len(first), generator=generator(1)).numpy()]]
    chosen = order[:num_sequences]
    drawn = ids[begin[chosen][:, None] + np.arange(length)].astype(np.int64)
    return DrawnSequences(torch.from_numpy(drawn), len(np.unique(document[chosen])))


@torch.no_grad()
def default_grid(
    model: LegoModel, train_ids: np.ndarray, seq_len: int, criterion: Criterion
) -> tuple[float, ...]:
    """Thresholds that 1, 2, 5, 10, 15, ... 100 % of training tokens reach, from the safest on.

    They spread evenly over what can be saved, wherever a criterion has its values, and the training
    split has no part in the risks, so that the grid cannot have been chosen by them.
    """
    available = num_windows(train_ids, seq_len)
    total = min(available, max(1, _GRID_TOKENS // seq_len))
    parts = []
    for place_B in (torch.arange(total) * available // total).split(_batch_size(model, seq_len)):
        window_BL = window_batch(train_ids, seq_len, place_B).to(model.device)
        parts.append(_both_exits(model, window_BL, 1, criterion).confidence.flatten().cpu())
    confidence = {criterion: torch.cat(parts)}
    found = (calibrate_by_quantile(confidence, r).threshold[criterion] for r in _GRID_RATIOS)
    return tuple(sorted(set(found), reverse=True))


@torch.no_grad()
def disagreement(
    model: LegoModel,
    prompt_NP: Tensor,
    max_new_tokens: int,
    strategy: EarlyExit,
    thresholds: Sequence[float],
    *,
    engine: Engine | None = None,
    stop_tokens: Sequence[int] = (),
    advance: Advance = lambda num_sequences: None,
) -> SequenceRisks:
    """Share of generated tokens at which full depth would have chosen another one.

    The strategy generates with each threshold in place of its own, in a context of its own making.
    What full depth would choose from that very context, its own clean caches included, comes from
    one parallel pass over prompt and generated text. So a deep token never counts under the exact
    policies, but may under `hole` and `propagate`. A stop token is generated too; what would come
    after it is not. Prompts int64 [N, P] and max_new_tokens are as in generate(), and >= 1.
    """
    num_rows = _batch_size(model, max_new_tokens)
    risk_GN = np.empty((len(thresholds), len(prompt_NP)))
    shallow_ratio_G = np.empty(len(thresholds))
    for g, threshold in enumerate(thresholds):
        depths: list[int] = []
        for row_B in torch.arange(len(prompt_NP)).split(num_rows):
            prompt_BP = prompt_NP[row_B]
            output = generate(
                model,
                prompt_BP,
                max_new_tokens,
                replace(strategy, threshold=threshold),
                stop_tokens=stop_tokens,
                engine=engine,
            )
            risk_GN[g, row_B.numpy()] = _share_of_others(model, prompt_BP, output.tokens)
            depths += [depth for row in output.exit_layer for depth in row]
            advance(len(row_B))
        shallow_ratio_G[g] = np.mean([depth < model.config.num_layers for depth in depths])
    return SequenceRisks(risk_GN, shallow_ratio_G)


def _share_of_others(
    model: LegoModel, prompt_BP: Tensor, tokens: Sequence[Sequence[int]]
) -> np.ndarray:
    """Share [B] of the tokens of each row, one at least, that full depth would not choose."""
    rows = [torch.tensor(row) for row in tokens]
    # no token looks ahead, so it does not matter what follows the last one; -1 is no token
    token_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    ids_BL = torch.cat([prompt_BP, token_BT[:, :-1].clamp(min=0)], dim=1).to(model.device)
    final_state = model(ids_BL).final_state[:, prompt_BP.size(1) - 1 :]
    choice_BT = model.final_logits(final_state).argmax(dim=-1).cpu()
    is_token_BT = token_BT >= 0
    differs_BT = (choice_BT != token_BT) & is_token_BT
    return (differs_BT.sum(dim=1).double() / is_token_BT.sum(dim=1)).numpy()


@torch.no_grad()
def excess_loss(
    model: LegoModel,
    ids_NL: Tensor,
    prompt_tokens: int,
    strategy: EarlyExit,
    thresholds: Sequence[float],
    *,
    bound: float,
    advance: Advance = lambda num_sequences: None,
) -> SequenceRisks:
    """Mean loss of early exit minus that of full depth, over `bound` and clipped to [0, 1].

    Teacher-forced: the first prompt_tokens >= 1 ids of each row are a prompt, each of the rest, one
    at least, is predicted from the true ids before it. A sequence on which early exit is the better
    counts as 0, not as a credit to others; one that loses more than bound > 0 nats a token counts
    as 1. With an exact policy one parallel pass gives the losses of all thresholds, those of
    decoding step by step; under the other policies each threshold is decoded step by step.
    """
    num_new = ids_NL.size(1) - prompt_tokens
    exact = strategy.policy_for(model) in ("exact", "recompute")
    risk_GN = np.empty((len(thresholds), len(ids_NL)))
    num_shallow_G = np.zeros(len(thresholds))
    for row_B in torch.arange(len(ids_NL)).split(_batch_size(model, num_new)):
        ids_BL = ids_NL[row_B].to(model.device)
        exits = _both_exits(model, ids_BL, prompt_tokens, strategy.criterion)
        for g, threshold in enumerate(thresholds):
            if exact:
                shallow_BT = exits.confidence >= threshold
                nll_BT = torch.where(shallow_BT, exits.nll_shallow, exits.nll_deep)
            else:
                at = replace(strategy, threshold=threshold)
                nll_BT, shallow_BT = _stepwise(model, ids_BL, prompt_tokens, at)
            excess_B = (nll_BT - exits.nll_deep).double().mean(dim=1)
            risk_GN[g, row_B.numpy()] = (excess_B / bound).clamp(0, 1).cpu().numpy()
            num_shallow_G[g] += int(shallow_BT.sum())
            advance(len(row_B))
    return SequenceRisks(risk_GN, num_shallow_G / (len(ids_NL) * num_new))


class _BothExits(NamedTuple):
    """Of the new tokens, each [B, T]; full context, clean caches."""

    nll_shallow: Tensor
    nll_deep: Tensor
    confidence: Tensor


def _both_exits(
    model: LegoModel, ids_BL: Tensor, prompt_tokens: int, criterion: Criterion
) -> _BothExits:
    states, target_BT = model(ids_BL[:, :-1]), ids_BL[:, prompt_tokens:]
    exit_ND, final_ND = (state[:, prompt_tokens - 1 :].flatten(0, 1) for state in states)
    logits_NV = model.exit_logits(exit_ND)
    if criterion == "gate":
        confidence_N = model.gate_score(exit_ND)
    else:
        confidence_N = softmax_confidence(logits_NV, criterion)
    target_N = target_BT.flatten()
    found_N = (_nll(logits_NV, target_N), _nll(model.final_logits(final_ND), target_N))
    return _BothExits(*(values.view_as(target_BT) for values in (*found_N, confidence_N)))


def _stepwise(
    model: LegoModel, ids_BL: Tensor, prompt_tokens: int, strategy: EarlyExit
) -> tuple[Tensor, Tensor]:
    """(nll, whether it was shallow), each [B, T], decoded as generation does but for the tokens."""
    num_rows, length = ids_BL.shape
    decoder = CachedDecoder(model, strategy, num_rows, length - 1)
    decoder.prefill(list(ids_BL[:, : prompt_tokens - 1]))
    nll, depth = [], []
    for t in range(prompt_tokens - 1, length - 1):
        step = decoder.step(ids_BL[:, t])
        nll.append(_nll(step.logits_BV, ids_BL[:, t + 1]))
        depth.append(torch.tensor(step.exit_layer))
    return torch.stack(nll, dim=1), torch.stack(depth, dim=1) < model.config.num_layers


def _nll(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(wide_NV, target_N, reduction="none")


def _batch_size(model: LegoModel, num_new: int) -> int:
    return min(_MAX_ROWS, max(1, _MAX_LOGITS // (num_new * model.config.vocab_size)))
