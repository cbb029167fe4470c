"""What the native engine refuses, and what it survives."""

import math
from dataclasses import fields, replace

import pytest
import torch

from lego.counts import Counts
from lego.engine import NativeEngine, decoder_weights, engine_for
from lego.generation import ReferenceEngine, generate
from lego.sampling import Sampling
from lego.strategies import EarlyExit, FullDepth, Speculative, Uncached
from lego_kernels import library
from tests.engine_checks import assert_same, by_both, exact_rows
from tests.models import VARIANTS, tiny_model, token_ids

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.8, seed=3),
    "top-p": Sampling(temperature=1.1, top_k=30, top_p=0.7, seed=11),
}
PROMPTS = [token_ids(n, seed=n).tolist() for n in (1, 7, 3, 12)]
EVERY = [
    FullDepth(),
    EarlyExit(threshold=0.4),
    EarlyExit(threshold=0.5, criterion="gate"),
    Speculative(),
]


@pytest.mark.parametrize("strategy", EVERY, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_nan_weights(sampling, strategy):
    model, options = tiny_model(dtype=torch.float32), {"sampling": SAMPLINGS[sampling]}
    engine, before = NativeEngine(model), model.exit_norm.weight.clone()
    expected = generate(model, PROMPTS, 4, strategy, engine=engine, **options)
    for weight in (model.embedding.weight, model.lower[1].mlp.down_proj.weight):
        kept = weight[:, 3].clone()
        weight[:, 3] = math.nan
        with pytest.raises(FloatingPointError, match="^generate: logits must be numbers, got NaN$"):
            generate(model, PROMPTS, 4, strategy, engine=engine, **options)
        weight[:, 3] = kept
        again = generate(model, PROMPTS, 4, strategy, engine=engine, **options)
        assert exact_rows(again) == exact_rows(expected)
    assert torch.equal(model.exit_norm.weight, before)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("strategy", EVERY, ids=str)
def test_a_streamer_that_raises_leaves_the_engine_usable(strategy):
    model, streamed = tiny_model(dtype=torch.float32), []
    engine = NativeEngine(model)
    expected = generate(model, PROMPTS, 6, strategy, engine=engine)

    def cancel(new):
        streamed.append(new)
        if len(streamed) == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(model, PROMPTS, 6, strategy, engine=engine, streamer=cancel)
    assert len(streamed) == 7
    again = generate(model, PROMPTS, 6, strategy, engine=engine)
    assert exact_rows(again) == exact_rows(expected)


@pytest.mark.parametrize("strategy", EVERY, ids=str)
def test_no_new_tokens(strategy):
    model = tiny_model(dtype=torch.float32)
    got, expected = by_both(model, PROMPTS, 0, strategy, streamer=pytest.fail)
    assert got.tokens == got.confidence == [[]] * 4
    assert got.stats.prefill == expected.stats.prefill and got.stats.decode == Counts()


@pytest.mark.parametrize("strategy", EVERY[1:], ids=str)
@pytest.mark.parametrize("extreme", [-math.inf, -1e300, -1.0, 0.0, 2.0, 1e300, math.inf])
def test_any_threshold_but_nan(extreme, strategy):
    name = "stop_confidence" if isinstance(strategy, Speculative) else "threshold"
    strategy = replace(strategy, **{name: extreme})
    assert_same(*by_both(tiny_model(dtype=torch.float32), PROMPTS, 4, strategy))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.5}], ids=str)
def test_any_temperature(temperature, filters):
    sampling = Sampling(temperature=temperature, **filters)
    model = tiny_model(dtype=torch.float32)
    assert_same(*by_both(model, PROMPTS, 4, FullDepth(), sampling=sampling))


def test_what_training_writes_shows():
    model = tiny_model(dtype=torch.float32)
    engine = NativeEngine(model)
    before = generate(model, PROMPTS, 6, FullDepth(), engine=engine)
    model.load_state_dict(tiny_model(seed=4, dtype=torch.float32).state_dict())
    after = generate(model, PROMPTS, 6, FullDepth(), engine=engine)
    assert_same(after, generate(model, PROMPTS, 6, FullDepth()))
    assert before.tokens != after.tokens


def test_trainable_parameters_get_no_gradient():
    model = tiny_model(dtype=torch.float32).requires_grad_(True)
    engine = NativeEngine(model)
    with torch.enable_grad():
        generate(model, PROMPTS, 3, EarlyExit(threshold=0.5), engine=engine)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_used_where_they_lie(upper_kv, variant):
    model = tiny_model(upper_kv, dtype=torch.float32, **VARIANTS[variant])
    weights = decoder_weights(model)
    parts = (weights, *weights.lower, *weights.upper, weights.upper_kv, weights.gate)
    held = {
        value.untyped_storage().data_ptr()
        for part in parts
        if part is not None
        for value in (getattr(part, field.name) for field in fields(part))
        if isinstance(value, torch.Tensor)
    }
    assert held == {x.data_ptr() for x in (*model.parameters(), *model.buffers())}


def test_refusals():
    model = tiny_model()
    sentence = "^NativeEngine: the model must be float32, bfloat16 or float16, got torch.float64$"
    with pytest.raises(ValueError, match=sentence):
        NativeEngine(model)
    with pytest.raises(ValueError, match="the model must be on the CPU or on CUDA, got meta$"):
        NativeEngine(model.float().to("meta"))
    model = tiny_model(dtype=torch.float32)
    engine = NativeEngine(model)
    with pytest.raises(ValueError, match=r"^NativeEngine: strategy must use caches, got Uncached"):
        generate(model, PROMPTS, 3, Uncached(), engine=engine)
    with pytest.raises(ValueError, match="^generate: engine.model must be the model, got another"):
        generate(tiny_model(dtype=torch.float32), PROMPTS, 3, FullDepth(), engine=engine)
    sentence = r"^EarlyExit.kv_policy: must be one of \('exact',\) for .*, got 'hole'$"
    with pytest.raises(ValueError, match=sentence):
        generate(model, PROMPTS, 3, EarlyExit(threshold=0.5, kv_policy="hole"), engine=engine)


def test_without_the_native_library(monkeypatch):
    monkeypatch.setitem(library.NOT_LOADED, "CPU", "it was never built")
    model = tiny_model(dtype=torch.float32)
    sentence = "^NativeEngine: the CPU kernels must be loaded, got it was never built$"
    with pytest.raises(ValueError, match=sentence):
        engine_for(model, FullDepth(), "native")
    assert type(engine_for(model, FullDepth(), "auto")) is ReferenceEngine


def test_engine_by_name():
    model = tiny_model(dtype=torch.float32)
    for strategy in EVERY:
        assert type(engine_for(model, strategy, "auto")) is NativeEngine
        assert type(engine_for(model, strategy, "native")) is NativeEngine
        assert type(engine_for(model, strategy, "reference")) is ReferenceEngine
    assert type(engine_for(model, Uncached(), "auto")) is ReferenceEngine
    assert type(engine_for(tiny_model(), FullDepth(), "auto")) is ReferenceEngine
    with pytest.raises(ValueError, match="float64"):
        engine_for(tiny_model(), FullDepth(), "native")
