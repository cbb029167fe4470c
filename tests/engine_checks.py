"""Whether the native engine is right: by the reference, and by float64 along its own tokens."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from lego.counts import Counts
from lego.decoding import CachedDecoder
from lego.engine import NativeEngine
from lego.generation import GenerationOutput, generate
from lego.model import LegoModel
from lego.ops.exit_decision import softmax_confidence
from lego.ops.gumbel import gumbel
from lego.sampling import Sampling, row_seed
from lego.strategies import EarlyExit, FullDepth, Speculative
from tests.oracle import FLOORS

CALLS = [field.name for field in fields(Counts) if field.name.endswith("_calls")]
CachedStrategy = FullDepth | EarlyExit | Speculative


def by_both(
    model: LegoModel, prompts: Any, num_new: int, strategy: CachedStrategy, **options: Any
) -> tuple[GenerationOutput, GenerationOutput]:
    """(native, reference)."""
    engine = NativeEngine(model)
    return (
        generate(model, prompts, num_new, strategy, engine=engine, **options),
        generate(model, prompts, num_new, strategy, **options),
    )


def assert_same(got: GenerationOutput, expected: GenerationOutput) -> None:
    """Tokens, exits, confidences and calls."""
    assert got.tokens == expected.tokens
    assert got.exit_layer == expected.exit_layer
    for one, other in zip(got.confidence, expected.confidence, strict=True):
        assert one == pytest.approx(other, abs=2e-5, nan_ok=True)
    for name in CALLS:
        assert getattr(got.stats.prefill, name) == getattr(expected.stats.prefill, name), name
        assert getattr(got.stats.decode, name) == getattr(expected.stats.decode, name), name


def assert_same_counts(got: GenerationOutput, expected: GenerationOutput) -> None:
    """Passes and slots too, which a batch shares in another way."""
    assert astuple(got.stats.prefill) == astuple(expected.stats.prefill)
    assert astuple(got.stats.decode) == astuple(expected.stats.decode)


def exact_rows(output: GenerationOutput) -> list[tuple[list[int], list[int], str]]:
    """Tokens, exits and confidences by row, equal only if all bits are: NaN equals itself."""
    return list(zip(output.tokens, output.exit_layer, map(str, output.confidence), strict=True))


def in_float64(model: LegoModel) -> LegoModel:
    """The same parameters, widened."""
    exact = LegoModel(model.config).double().requires_grad_(False)
    exact.load_state_dict(model.state_dict())
    return exact


@dataclass
class Along:
    """What the reference computes along given tokens, of every row, one after the other."""

    logits: Tensor  # [T, V] of the exits that were taken
    confidence: Tensor  # [T]


def along(
    model: LegoModel, prompts: list[list[int]], output: GenerationOutput, strategy: CachedStrategy
) -> Along:
    """Feed the reference the tokens of an output, and let it exit where the output says."""
    rows = zip(prompts, output.tokens, output.exit_layer, strict=True)
    parts = [_row_along(model, *row, strategy) for row in rows]
    logits, confidence = (torch.cat(x).double() for x in zip(*parts, strict=True))
    return Along(logits, confidence)


def _row_along(
    model: LegoModel,
    prompt: list[int],
    tokens: list[int],
    layers: list[int],
    strategy: CachedStrategy,
) -> tuple[Tensor, Tensor]:
    forced = FullDepth() if isinstance(strategy, Speculative) else strategy
    decoder = CachedDecoder(model, forced, 1, len(prompt) + len(tokens))
    ids = torch.tensor(prompt + tokens)
    decoder.prefill([ids[: len(prompt) - 1]])
    steps = []
    for t, layer in enumerate(layers, len(prompt) - 1):
        if isinstance(forced, EarlyExit):
            exits = layer == model.config.exit_layer
            decoder.threshold_B[:] = -torch.inf if exits else torch.inf
        steps.append(decoder.step(ids[t : t + 1]))
    confidence = torch.tensor([step.confidence[0] for step in steps])
    if isinstance(strategy, Speculative):
        confidence = _draft_confidence(model, ids, len(prompt), strategy)
    return torch.cat([step.logits_BV for step in steps]), confidence


def _draft_confidence(
    model: LegoModel, ids: Tensor, num_prompt: int, strategy: Speculative
) -> Tensor:
    exit_state = model(ids[None, :-1]).exit_state[0, num_prompt - 1 :]
    if strategy.criterion == "gate":
        return model.gate_score(exit_state)
    return softmax_confidence(model.exit_logits(exit_state), strategy.criterion)


def assert_right(
    model: LegoModel,
    prompts: list[list[int]],
    output: GenerationOutput,
    strategy: CachedStrategy,
    sampling: Sampling | None = None,
    *,
    slack: float = 4,
) -> float:
    """Every token and exit is float64's own choice, or loses to it by less than rounding explains.

    Rounding may cost `slack` times what it costs the reference in the model's dtype along the same
    tokens: twice that for any one token, and again since the largest of a few errors is chance.
    Returns the share of tokens that are float64's own choice. Draws without top_k and top_p alone.
    """
    exact = along(in_float64(model), prompts, output, strategy)
    eager = along(model, prompts, output, strategy)
    floor = FLOORS[model.embedding.weight.dtype]
    error = slack * float((eager.logits - exact.logits).abs().max()) + 16 * floor
    score = exact.logits + _noise(prompts, output, sampling or Sampling(), model.config.vocab_size)
    token = torch.tensor([token for row in output.tokens for token in row])
    lost = score.amax(1) - score[torch.arange(len(token)), token]
    assert float(lost.max()) <= 2 * error, f"a token loses by {float(lost.max())}, error {error}"
    got = torch.tensor([x for row in output.confidence for x in row], dtype=torch.float64)
    assert torch.equal(got.isnan(), exact.confidence.isnan())
    error = (
        slack * float((eager.confidence - exact.confidence).nan_to_num().abs().max()) + 2 * floor
    )
    off = (got - exact.confidence).nan_to_num().abs().max()
    assert off <= error, f"a confidence is off by {float(off)}, error {error}"
    if isinstance(strategy, EarlyExit):
        layer = torch.tensor([layer for row in output.exit_layer for layer in row])
        exits = layer == model.config.exit_layer
        assert torch.equal(exits, got >= torch.tensor(strategy.threshold).float())
    return float((lost == 0).double().mean())


def _noise(
    prompts: list[list[int]], output: GenerationOutput, sampling: Sampling, vocab_size: int
) -> Tensor:
    lengths = list(map(len, output.tokens))
    seeds = [row_seed(sampling.seed, row) for row, n in enumerate(lengths) for _ in range(n)]
    places = [len(p) + t for p, n in zip(prompts, lengths, strict=True) for t in range(n)]
    return sampling.temperature * gumbel(torch.tensor(seeds), torch.tensor(places), vocab_size)
