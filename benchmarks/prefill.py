"""Prompts: the time to a first token, and the work that it takes."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from torch import Tensor

from lego.config import ModelConfig
from lego.cost import weights
from lego.engine import decoder_weights
from lego.generation import generate
from lego.model import LegoModel
from lego.strategies import FullDepth
from lego_kernels.decoder.decoder import Decoder

FirstToken = Callable[[], tuple[int, float]]  # the token and the seconds it took


def first_token(model: LegoModel, prompt: Tensor) -> FirstToken:
    """By the native decoder."""
    decoder = Decoder(decoder_weights(model), 1, len(prompt))

    def run() -> tuple[int, float]:
        start = perf_counter()
        decoder.prefill([prompt])
        (new,) = decoder.step()
        return new.token, perf_counter() - start

    return run


def reference_first_token(model: LegoModel, prompt: Tensor) -> FirstToken:
    """By lego.generation.generate."""

    def run() -> tuple[int, float]:
        out = generate(model, [prompt], 1, FullDepth())
        return out.tokens[0][0], out.stats.prefill_seconds + out.stats.decode_seconds

    return run


def prefill_flops(config: ModelConfig, num_tokens: int) -> float:
    """Floating-point operations up to the first token.

    Two for each weight and token, and four for each query, slot and value of a head. Exit-state
    models run the prompt through the lower block and the upper K/V projections alone, and its last
    token through the upper block.
    """
    part, width = weights(config), config.num_heads * config.head_dim
    pairs = num_tokens * (num_tokens + 1) / 2  # of a query and a slot it sees
    num_upper = config.num_upper_layers
    lower = config.exit_layer * (num_tokens * part.lower_layer + 2 * width * pairs)
    if config.upper_kv == "own":
        upper = num_upper * (num_tokens * part.upper_layer + 2 * width * pairs)
    else:
        last = num_upper * (part.upper_layer + 2 * width * num_tokens)
        upper = num_tokens * part.upper_kv + last
    return 2 * (lower + upper + part.head)
