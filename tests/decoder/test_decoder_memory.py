"""Decoding for long takes no more memory than decoding for a while."""

import gc
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lego.engine import NativeEngine, decoder_weights
from lego.generation import generate
from lego.strategies import EarlyExit, FullDepth, Speculative
from lego_kernels import library
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.speculative import SpeculativeDecoder
from tests.models import tiny_model, token_ids

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
STRATEGIES = [
    FullDepth(),
    EarlyExit(threshold=0.4, kv_policy="recompute"),
    EarlyExit(threshold=0.5, criterion="gate", kv_policy="propagate"),
    Speculative(stop_confidence=0.2),
]


def resident_bytes():
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_100_000_tokens_in_flat_memory():
    """80 bytes lost for each token would be 8 MB; decoders of 0.6 MB never freed, some 80 MB."""
    model = tiny_model("own", dtype=torch.float32, max_seq_len=128)
    engine, prompts = NativeEngine(model), [token_ids(1 + n, seed=n) for n in range(8)]

    def tokens_of_all(rounds):
        for seed in range(rounds):
            sampling = Sampling(temperature=0.5 * (seed % 2), seed=seed)
            for strategy in STRATEGIES:
                generate(model, prompts, 100, strategy, engine=engine, sampling=sampling)
        gc.collect()
        return rounds * len(STRATEGIES) * len(prompts) * 100

    tokens_of_all(8)
    before = resident_bytes()
    assert tokens_of_all(32) >= 100_000
    grown = resident_bytes() - before
    assert grown < 8 << 20, f"grown by {grown} bytes"


def make(which, weights):
    if which == "full":
        return Decoder(weights, 2, 4000)
    if which == "speculative":
        return SpeculativeDecoder(weights, 2, 4000)
    return Decoder(weights, 2, 4000, threshold=0.4, criterion=which)


@pytest.mark.parametrize("which", ["full", "max_prob", "gate", "speculative"])
def test_a_step_leaves_nothing_behind(which):
    """Any object kept for each token would be 56 bytes or more, in every part of the run."""
    model = tiny_model("own", dtype=torch.float32, max_seq_len=4000)
    decoder = make(which, decoder_weights(model))
    decoder.prefill([token_ids(3), token_ids(5)])
    held = []
    tracemalloc.start()
    try:
        for _ in range(6):
            for _ in range(100):
                decoder.step()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # views of buffers, made once for each size, may come late in some of them
    grown = min(after - before for before, after in pairwise(held))
    assert grown < 32 * 2 * 100, f"{grown} bytes in 200 tokens or more"
