"""DeviceDecoder.set_threshold."""

import math

import pytest
import torch

from lego_kernels.decoder.device_decoder import DeviceDecoder
from tests.device_decoder_cases import SLOTS, prompts, setup


def depths(decoder, num_steps):
    return [new.exit_layer for _ in range(num_steps) for new in decoder.step()]


def test_steps_from_now_on():
    weights, threshold = setup("gate")
    decoder = DeviceDecoder(weights, 3, SLOTS, threshold=threshold, criterion="gate")
    decoder.prefill(prompts())
    shallow, deep = len(weights.lower), weights.num_layers
    decoder.set_threshold(-math.inf)
    assert depths(decoder, 2) == [shallow] * 6
    decoder.set_threshold(math.inf)
    assert depths(decoder, 2) == [deep] * 6
    decoder.set_threshold(threshold)
    assert set(depths(decoder, 8)) == {shallow, deep}


def test_refuses_nan_and_full_depth():
    weights, threshold = setup()
    decoder = DeviceDecoder(weights, 1, SLOTS, threshold=threshold)
    with pytest.raises(ValueError, match="threshold must not be NaN, got nan"):
        decoder.set_threshold(math.nan)
    torch.testing.assert_close(decoder._exits.threshold.item(), threshold, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="needs one from the start, got 0.5"):
        DeviceDecoder(weights, 1, SLOTS).set_threshold(0.5)
