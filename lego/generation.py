"""Generation: one signature for every strategy and engine."""

# Shape letters: B = rows, T = prompt tokens.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from lego.controller import Control, ControlledRows, Controller
from lego.counts import Counts
from lego.decoding import (
    CachedDecoder,
    DrawingDecoder,
    ExitingDecoder,
    GeneratedToken,
    ThresholdDecoder,
    TokenDecoder,
    UncachedDecoder,
)
from lego.model import LegoModel
from lego.sampling import Sampling
from lego.speculation import SpeculativeDecoder
from lego.strategies import EarlyExit, Speculative, Strategy, Uncached


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
    control: list[Control] | None  # by row, where a controller held a target


EngineName = Literal["auto", "reference", "native"]
Streamer = Callable[[GeneratedToken], None]


class Engine(Protocol):
    """What decodes for generate()."""

    @property
    def model(self) -> LegoModel: ...

    def decoder(
        self, strategy: Strategy, sampling: Sampling, num_rows: int, num_slots: int
    ) -> TokenDecoder:
        """A new decoder for num_rows prompts; inputs take positions in [0, num_slots).

        Raises: ValueError if the strategy does not fit the model.
        """


@dataclass(frozen=True)
class ReferenceEngine:
    """Decodes with the layers of the model as they are."""

    model: LegoModel

    def decoder(
        self, strategy: Strategy, sampling: Sampling, num_rows: int, num_slots: int
    ) -> TokenDecoder:
        """Contract of Engine.decoder."""
        if isinstance(strategy, Speculative):
            return SpeculativeDecoder(self.model, strategy, sampling, num_rows, num_slots)
        if isinstance(strategy, Uncached):
            return DrawingDecoder(UncachedDecoder(self.model, strategy), sampling)
        decoder = CachedDecoder(self.model, strategy, num_rows, num_slots)
        return (ExitingDecoder if isinstance(strategy, EarlyExit) else DrawingDecoder)(
            decoder, sampling
        )


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
    engine: Engine | None = None,
    controller: Controller | None = None,
) -> GenerationOutput:
    """Generate up to max_new_tokens for every prompt; prompts may differ in length.

    A row ends after a stop token, which it keeps, or after max_new_tokens. The streamer is called
    once a token, in the order of steps, then rows; an exception in it ends generation. Greedy
    without `sampling`, the reference without an `engine`. A controller, with EarlyExit, moves the
    thresholds, from its own start, row by row.
    Raises: ValueError, before anything runs, if there is no prompt, a prompt is empty, an id is
    not in [0, vocab_size), prompt and new tokens exceed max_seq_len, max_new_tokens is negative,
    the strategy does not fit the model or the controller, or the engine is of another model;
    FloatingPointError if a token is to be drawn from logits with a NaN.
    """
    prompts = _check(model, prompt_ids, max_new_tokens)
    engine = ReferenceEngine(model) if engine is None else engine
    if engine.model is not model:
        raise ValueError("generate: engine.model must be the model, got another one")
    if controller is not None and not isinstance(strategy, EarlyExit):
        raise ValueError(f"generate: controller must come with EarlyExit, got {strategy}")
    # the last new token of a row is never an input
    num_slots = max(len(ids_T) for ids_T in prompts) + max(max_new_tokens, 1) - 1
    decoder = engine.decoder(strategy, sampling or Sampling(), len(prompts), num_slots)
    start = perf_counter()
    decoder.prefill(prompts)
    prefill = replace(decoder.counts)
    prefilled = perf_counter()
    controlled = controller and ControlledRows(controller, _adjustable(decoder), len(prompts))
    observers = [streamer] if streamer else []
    observers += [controlled.update] if controlled else []
    rows = _decode(decoder, len(prompts), max_new_tokens, frozenset(stop_tokens), observers)
    decoded = perf_counter()
    return GenerationOutput(
        tokens=[[new.token for new in row] for row in rows],
        exit_layer=[[new.exit_layer for new in row] for row in rows],
        confidence=[[new.confidence for new in row] for row in rows],
        stats=GenerationStats(
            prefill=prefill,
            decode=decoder.counts - prefill,
            prefill_seconds=prefilled - start,
            decode_seconds=decoded - prefilled,
        ),
        control=controlled.rows if controlled else None,
    )


def _adjustable(decoder: TokenDecoder) -> ThresholdDecoder:
    """The decoder, if its thresholds can change; ValueError if not."""
    if not hasattr(decoder, "set_threshold"):
        raise ValueError(
            "generate: controller must have a decoder with thresholds to set, got none"
        )
    return cast(ThresholdDecoder, decoder)


def _decode(
    decoder: TokenDecoder,
    num_rows: int,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    observers: Sequence[Streamer],
) -> list[list[GeneratedToken]]:
    """Step until every row has ended; the tokens of each."""
    rows: list[list[GeneratedToken]] = [[] for _ in range(num_rows)]
    going = set(range(num_rows)) if max_new_tokens > 0 else set()
    while going:
        ended = []
        for new in decoder.step():
            if new.row not in going:
                continue  # a step of several tokens went past the row's end
            row = rows[new.row]
            row.append(new)
            for observe in observers:
                observe(new)
            if new.token in stop_tokens or len(row) == max_new_tokens:
                going.remove(new.row)
                ended.append(new.row)
        if ended:
            decoder.finish(ended)
    return rows


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
