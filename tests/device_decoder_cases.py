"""Models, prompts and runs on which decoders are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lego.engine import decoder_weights
from lego_kernels.decoder.decoder import Decoder, NewToken
from lego_kernels.decoder.device_decoder import DeviceDecoder
from lego_kernels.decoder.weights import DecoderWeights
from tests.models import confidence, midway, tiny_model, token_ids

LENGTHS = (5, 1, 9)  # of the prompts
STOPS = {6: [1], 14: [0]}  # rows finished after so many steps
STEPS = 24
SLOTS = max(LENGTHS) + STEPS


class Setup(NamedTuple):
    weights: DecoderWeights
    threshold: float  # that about half of the tokens reach


def setup(criterion: str = "max_prob", dtype: torch.dtype = torch.float32, **changes: Any) -> Setup:
    model = tiny_model(dtype=dtype, **changes)
    states = model(token_ids(4, 20, seed=9)).exit_state
    wide = tiny_model(dtype=torch.float32, **changes)
    threshold = midway(confidence(wide, states.float(), criterion))  # type: ignore[arg-type]
    return Setup(decoder_weights(model), threshold)


def prompts() -> list[Tensor]:
    return [token_ids(length, seed=length) for length in LENGTHS]


def run(decoder: Decoder | DeviceDecoder, num_steps: int = STEPS) -> list[NewToken]:
    decoder.prefill(prompts())
    new = []
    for step in range(num_steps):
        decoder.finish(STOPS.get(step, []))
        new += decoder.step()
    return new


def same(got: list[NewToken], expected: list[NewToken]) -> bool:
    """Equal to the bit, where NaN equals NaN."""
    return list(map(repr, got)) == list(map(repr, expected))


def alike(got: list[NewToken], expected: list[NewToken]) -> bool:
    """Equal but for the last bits of the confidences."""
    values = [torch.tensor([new.confidence for new in tokens]) for tokens in (got, expected)]
    torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4, equal_nan=True)
    return [new[:3] for new in got] == [new[:3] for new in expected]
