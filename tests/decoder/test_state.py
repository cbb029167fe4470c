"""The table of a decoder's state, which Python fills and C++ reads: one order in both."""

import copy
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from lego.engine import decoder_weights
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.decode_layers import FIELDS
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.rows import NewToken
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.state import DecoderState
from tests.models import tiny_model

CSRC = Path(__file__).parents[2] / "csrc" / "cpu"


def members(header, struct):
    """Names of a C++ struct's members in their order."""
    body = re.search(rf"struct {struct} {{(.*?)}};", (CSRC / header).read_text(), re.DOTALL)[1]
    declared = re.sub(r"//.*", "", body).replace(",", ";").split(";")
    return [re.findall(r"\w+", part)[-1] for part in declared if part.strip()]


def test_fields_are_those_of_c_in_their_order():
    weights = decoder_weights(tiny_model(dtype=torch.float32))
    state = DecoderState(weights, 2, 9, criterion=None, policy="exact", sampling=Sampling())
    assert state.names == members("decoder.h", "DecoderState")
    assert members("decoder.h", "Counts") == [field.name for field in fields(Counts)]
    assert members("decoder.h", "NewToken") == list(NewToken._fields)
    assert members("decode_layers.h", "LayerWeights") == list(FIELDS)


def test_a_default_dtype_changes_no_buffer():
    weights = decoder_weights(tiny_model(dtype=torch.float32))
    sampling = Sampling(temperature=1.0, top_k=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = DecoderState(weights, 2, 9, criterion=None, policy="exact", sampling=sampling)
    finally:
        torch.set_default_dtype(torch.float32)
    held = dict(zip(state.names, state.entries, strict=True))
    assert held["exit_workspace"].dtype == held["logits"].dtype == torch.float32


def test_a_copy_is_refused():
    weights = decoder_weights(tiny_model(dtype=torch.float32))
    with pytest.raises(TypeError, match="^DecoderState: must not be copied"):
        copy.deepcopy(Decoder(weights, 1, 9))


def test_a_threshold_that_is_no_number_is_refused():
    decoder = Decoder(decoder_weights(tiny_model(dtype=torch.float32)), 2, 9, threshold=0.5)
    for threshold in (math.nan, torch.tensor([math.nan, 0.5])):
        with pytest.raises(ValueError, match="threshold must not be NaN, got nan"):
            decoder.set_threshold(threshold)
    assert decoder.state.threshold.tolist() == [0.5, 0.5]
