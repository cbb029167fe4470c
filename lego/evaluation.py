"""Quality: both exits scored on the same tokens, alone and routed by confidence."""

# Shape letters: B, W = windows, T = tokens, N = scored tokens.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lego.config import Criterion
from lego.data import TokenSplit, num_windows, window_batch
from lego.decoding import CachedDecoder
from lego.model import LegoModel
from lego.ops.exit_decision import softmax_confidence
from lego.strategies import EarlyExit

# logits of a batch, 64 MiB in float32: a few such tensors are alive at once
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Every scored token at both exits, float32 or bool [N]; a dense model's exits are one."""

    nll_shallow: Tensor  # nats
    nll_deep: Tensor
    correct_shallow: Tensor  # the most likely token is the target
    correct_deep: Tensor
    agree: Tensor  # the most likely tokens of both exits are the same
    confidence: dict[Criterion, Tensor]  # empty for a dense model


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Mean next-token quality over a set of tokens.

    ppl is per token; word_ppl per whitespace word and bits_per_byte per UTF-8 byte of the text.
    Those two compare across tokenizers that lose nothing, such as byte-level BPE: whole words do
    not, whose <unk> stands for many bytes. accuracy is in [0, 1].
    """

    ppl: float
    accuracy: float
    word_ppl: float
    bits_per_byte: float


@torch.no_grad()
def score_tokens(
    model: LegoModel, split: TokenSplit, seq_len: int, place_W: Tensor | None = None
) -> TokenScores:
    """Score windows of the split in parallel: non-overlapping, each with its own context.

    place_W says which, int64 [W], W >= 1; all by default.
    Raises: ValueError if the split holds less than one window of seq_len, or not one of place_W.
    """
    total = num_windows(split.ids, seq_len)
    place_W = torch.arange(total) if place_W is None else place_W
    # a dense model has nothing to decide
    criteria: tuple[Criterion, ...] = get_args(Criterion) if model.upper else ()
    batch_size = max(1, _MAX_LOGITS // (seq_len * model.config.vocab_size))
    parts: dict[str, list[Tensor]] = {}
    for index in place_W.split(batch_size):
        ids = window_batch(split.ids, seq_len, index).to(model.device)
        target_N = ids[:, 1:].flatten()
        states = model(ids[:, :-1])
        exit_state_ND = states.exit_state.flatten(0, 1)
        shallow_NV = model.exit_logits(exit_state_ND).float()
        deep_NV = shallow_NV
        if model.upper:
            deep_NV = model.final_logits(states.final_state.flatten(0, 1)).float()
        top_shallow_N, top_deep_N = shallow_NV.argmax(-1), deep_NV.argmax(-1)
        scores = {
            "nll_shallow": F.cross_entropy(shallow_NV, target_N, reduction="none"),
            "nll_deep": F.cross_entropy(deep_NV, target_N, reduction="none"),
            "correct_shallow": top_shallow_N == target_N,
            "correct_deep": top_deep_N == target_N,
            "agree": top_shallow_N == top_deep_N,
        }
        for criterion in criteria:
            scores[criterion] = (
                model.gate_score(exit_state_ND)
                if criterion == "gate"
                else softmax_confidence(shallow_NV, criterion)
            )
        for name, value in scores.items():
            parts.setdefault(name, []).append(value.cpu())
    joined = {name: torch.cat(values) for name, values in parts.items()}
    confidence = {criterion: joined.pop(criterion) for criterion in criteria}
    return TokenScores(**joined, confidence=confidence)


def routed(scores: TokenScores, criterion: Criterion, threshold: float) -> tuple[Tensor, Tensor]:
    """(nll_N, correct_N) when tokens with confidence >= threshold take the shallow exit."""
    shallow_N = scores.confidence[criterion] >= threshold
    return (
        torch.where(shallow_N, scores.nll_shallow, scores.nll_deep),
        torch.where(shallow_N, scores.correct_shallow, scores.correct_deep),
    )


def quality(nll_N: Tensor, correct_N: Tensor, split: TokenSplit) -> Quality:
    """Quality over all scored tokens of a split.

    Bytes and words of the scored tokens are taken in proportion: windows leave out a remainder.
    """
    nats = nll_N.double().mean().item()
    tokens = len(split.ids) - 1
    return Quality(
        ppl=_exp(nats),
        accuracy=correct_N.double().mean().item(),
        word_ppl=_exp(nats * tokens / split.num_words),
        bits_per_byte=nats * tokens / split.num_bytes / math.log(2),
    )


def perplexity(nll_N: Tensor) -> float:
    """exp of the mean; NaN over no tokens."""
    return _exp(nll_N.double().mean().item()) if len(nll_N) else math.nan


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


class Stepwise(NamedTuple):
    """What teacher-forced decoding yields for every step, [B, T]."""

    nll: Tensor  # nats, float32
    token: Tensor  # the most likely one, int64
    exit_layer: Tensor  # layers run before the token was chosen, int64


@torch.no_grad()
def stepwise(model: LegoModel, windows: Tensor, strategy: EarlyExit) -> Stepwise:
    """Teacher-forced decoding, one step a token.

    windows is int64 [B, T + 1]. Every step decides and caches as generation does, then takes the
    next id of the window instead of the predicted one. The first id of a window is the prompt.
    """
    num_rows, num_steps = windows.size(0), windows.size(1) - 1
    windows = windows.to(model.device)
    decoder = CachedDecoder(model, strategy, num_rows, num_steps)
    nll, token, depth = [], [], []
    for t in range(num_steps):
        step = decoder.step(windows[:, t])
        nll.append(F.cross_entropy(step.logits_BV.float(), windows[:, t + 1], reduction="none"))
        token.append(step.logits_BV.argmax(-1))
        depth.append(torch.tensor(step.exit_layer))
    joined = (torch.stack(steps, dim=1).cpu() for steps in (nll, token, depth))
    return Stepwise(*joined)


def stepwise_nll(model: LegoModel, windows: Tensor, strategy: EarlyExit) -> tuple[Tensor, Tensor]:
    """(nll [B, T], exit layer [B, T]) of `stepwise`."""
    found = stepwise(model, windows, strategy)
    return found.nll, found.exit_layer
