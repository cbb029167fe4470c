"""What must hold before a decoder runs anything, for every decoder in one wording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lego_kernels.decoder.weights import DecoderWeights

Criterion = Literal["max_prob", "margin", "entropy", "gate"]
KVPolicy = Literal["exact", "hole", "propagate", "recompute"]


def check_sizes(weights: DecoderWeights, num_rows: int, num_slots: int) -> None:
    """Raise ValueError unless num_rows >= 1 and num_slots is in [1, positions of the tables]."""
    if num_rows < 1:
        raise ValueError(f"Decoder: num_rows must be >= 1, got {num_rows}")
    limit = weights.cos.size(0)
    if not 1 <= num_slots <= limit:
        raise ValueError(f"Decoder: num_slots must be in [1, {limit}], got {num_slots}")


def check_prompts(
    prompts: Sequence[Tensor], num_rows: int, num_slots: int, vocab_size: int
) -> None:
    """Raise ValueError unless each row has a prompt that fits, of ids in [0, vocab_size)."""
    if len(prompts) != num_rows:
        raise ValueError(
            f"Decoder: prompts must be {num_rows}, one for each row, got {len(prompts)}"
        )
    for row, ids in enumerate(prompts):
        if ids.dim() != 1 or not 1 <= len(ids) <= num_slots:
            raise ValueError(
                f"Decoder: prompt {row} must be [T] with T in [1, num_slots={num_slots}], "
                f"got {tuple(ids.shape)}"
            )
        if ids.dtype != torch.int64:
            raise ValueError(f"Decoder: prompt {row} must be int64, got {ids.dtype}")
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"Decoder: prompt {row} must hold ids in [0, {vocab_size}), "
                f"got {low if low < 0 else high}"
            )


def check_room(rows: Sequence[int], position: Sequence[int], num_slots: int) -> None:
    """Raise ValueError if a row has no slot for one more token."""
    for row in rows:
        if position[row] >= num_slots:
            raise ValueError(
                f"Decoder: row {row} must hold less than num_slots={num_slots} tokens, "
                f"got {position[row]}"
            )


def check_criterion(weights: DecoderWeights, criterion: str) -> None:
    """Raise ValueError unless the model has an exit that the criterion can decide on."""
    if not weights.upper:
        raise ValueError("Decoder: the model must have an upper block to exit, got a dense model")
    if criterion not in get_args(Criterion):
        raise ValueError(
            f"Decoder: criterion must be one of {get_args(Criterion)}, got {criterion!r}"
        )
    if criterion == "gate" and weights.gate is None:
        raise ValueError("Decoder: criterion gate needs weights with a gate, got none")


def policy_for(
    weights: DecoderWeights, threshold: float | None, criterion: str, policy: KVPolicy | None
) -> KVPolicy:
    """The policy to use; ValueError if threshold, criterion and policy do not go together."""
    legal: tuple[KVPolicy, ...] = ("exact",)
    if weights.upper_kv is None:
        legal = ("recompute", "propagate", "hole")
    if policy is not None and policy not in legal:
        raise ValueError(f"Decoder: kv_policy must be one of {legal}, got {policy!r}")
    if threshold is None:
        return legal[0]
    if math.isnan(threshold):
        raise ValueError("Decoder: threshold must be a number, got nan")
    check_criterion(weights, criterion)
    return policy or legal[0]
