"""Generation with the reference model: one signature for every strategy."""

# Shape letters: B = rows, T = prompt tokens.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from lego.decoding import CachedDecoder, Counts, Decoder, UncachedDecoder
from lego.model import LegoModel
from lego.sampling import Sampler, Sampling
from lego.strategies import Strategy, Uncached


@dataclass(frozen=True, kw_only=True)
class GeneratedToken:
    """One new token, as a streamer sees it."""

    row: int
    token: int
    exit_layer: int  # layers it ran
    confidence: float  # the criterion's value at the exit; NaN where no decision was made


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Counted calls and seconds, the prompt apart from the generated tokens.

    The last prompt token belongs to the first generated one: it is the input of its step.
    """

    prefill: Counts
    decode: Counts
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class GenerationOutput:
    """New tokens by row (the prompt is not repeated), with the layers each ran."""

    tokens: list[list[int]]
    exit_layer: list[list[int]]
    confidence: list[list[float]]
    stats: GenerationStats


Streamer = Callable[[GeneratedToken], None]


@torch.no_grad()
def generate(
    model: LegoModel,
    prompt_ids: Sequence[Sequence[int] | Tensor] | Tensor,
    max_new_tokens: int,
    strategy: Strategy,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    streamer: Streamer | None = None,
) -> GenerationOutput:
    """Generate up to max_new_tokens for every prompt; prompts may differ in length.

    A row ends after a stop token, which it keeps, or after max_new_tokens. The streamer is called
    once a token, in the order of steps, then rows. Greedy without `sampling`.
    Raises: ValueError, before anything runs, if there is no prompt, a prompt is empty, an id is
    not in [0, vocab_size), prompt and new tokens exceed max_seq_len, max_new_tokens is negative
    or the strategy does not fit the model.
    """
    prompts = _check(model, prompt_ids, max_new_tokens)
    stop = frozenset(stop_tokens)
    decoder = _decoder(model, strategy, prompts, max_new_tokens)
    sampler = Sampler(sampling or Sampling(), len(prompts))
    start = perf_counter()
    decoder.prefill([ids[:-1] for ids in prompts])
    prefill, decoder.counts = decoder.counts, Counts()
    prefilled = perf_counter()
    rows: list[list[GeneratedToken]] = [[] for _ in prompts]
    alive = list(range(len(prompts))) if max_new_tokens > 0 else []
    token_B = torch.stack([ids[-1] for ids in prompts])
    while alive:
        step = decoder.step(token_B)
        drawn = sampler.draw(step.logits_BV, alive)
        going = []
        for i, (row, token) in enumerate(zip(alive, drawn, strict=True)):
            new = GeneratedToken(
                row=row, token=token, exit_layer=step.exit_layer[i], confidence=step.confidence[i]
            )
            rows[row].append(new)
            if streamer is not None:
                streamer(new)
            if token not in stop and len(rows[row]) < max_new_tokens:
                going.append(i)
        if len(going) < len(alive):
            decoder.keep(going)
        alive = [alive[i] for i in going]
        token_B = torch.tensor([drawn[i] for i in going], dtype=torch.int64, device=model.device)
    return GenerationOutput(
        tokens=[[new.token for new in row] for row in rows],
        exit_layer=[[new.exit_layer for new in row] for row in rows],
        confidence=[[new.confidence for new in row] for row in rows],
        stats=GenerationStats(
            prefill=prefill,
            decode=decoder.counts,
            prefill_seconds=prefilled - start,
            decode_seconds=perf_counter() - prefilled,
        ),
    )


def _decoder(
    model: LegoModel, strategy: Strategy, prompts: list[Tensor], max_new_tokens: int
) -> Decoder:
    if isinstance(strategy, Uncached):
        return UncachedDecoder(model, strategy)
    num_slots = max(len(ids) for ids in prompts) + max_new_tokens
    return CachedDecoder(model, strategy, len(prompts), num_slots)


def _check(
    model: LegoModel, prompt_ids: Sequence[Sequence[int] | Tensor] | Tensor, max_new_tokens: int
) -> list[Tensor]:
    """The prompts as int64 tensors on the model's device, or a ValueError."""
    prompts = [torch.as_tensor(ids, dtype=torch.int64, device=model.device) for ids in prompt_ids]
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    if not prompts:
        raise ValueError("generate: prompt_ids must hold at least one prompt, got none")
    for row, ids_T in enumerate(prompts):
        if ids_T.dim() != 1 or len(ids_T) == 0:
            raise ValueError(
                f"generate: prompt {row} must be a non-empty list of ids, "
                f"got shape {tuple(ids_T.shape)}"
            )
        check_ids(ids_T, model.config.vocab_size, f"generate: prompt {row}")
        if len(ids_T) + max_new_tokens > model.config.max_seq_len:
            raise ValueError(
                f"generate: prompt {row} and new tokens must fit max_seq_len="
                f"{model.config.max_seq_len}, got {len(ids_T)} + {max_new_tokens}"
            )
    return prompts


def check_ids(ids: Tensor, vocab_size: int, what: str) -> None:
    """Raise ValueError unless every id is in [0, vocab_size)."""
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{what}: token ids must be in [0, {vocab_size}), got {low if low < 0 else high}"
        )
