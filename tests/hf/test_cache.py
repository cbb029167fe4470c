"""PreallocatedCache: the tokens of the default cache, memory taken once, no trace of a rollback."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="needs transformers >= 5: pip install '.[hf]'"
)

from lego_kernels.hf import PreallocatedCache  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral window": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3 mixed": (
        "Qwen3Config",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
}


def stock_model(name="llama"):
    """Strong random weights: the tokens depend on all of the past."""
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SMALL | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def ids_of(rows, tokens, seed=1):
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded():
    """Three prompts of 11, 7 and 4 tokens, padded on the left."""
    ids, mask = ids_of(3, 11), torch.ones(3, 11, dtype=torch.int64)
    mask[1, :4] = mask[2, :7] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, cache=None, **options):
    return model.generate(
        **({"max_new_tokens": 24, "do_sample": False, "past_key_values": cache} | options)
    )


def pointers(cache):
    return [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_the_default_cache(name, attention):
    model = stock_model(name)
    model.set_attn_implementation(attention)
    cache = PreallocatedCache(model.config, capacity=34)  # the last token is never appended
    assert torch.equal(generate(model, cache, **padded()), generate(model, **padded()))
    assert cache.get_seq_length() == 34


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("option", [{"assistant_early_exit": 2}, {"prompt_lookup_num_tokens": 3}])
def test_assisted_generation(name, option, monkeypatch):
    """Drafts are rolled back in it; the tokens stay those of plain greedy generation."""
    model = stock_model(name)
    # 5.0 cannot look up drafts without a token that ends the text
    options = {"input_ids": ids_of(1, 11), "eos_token_id": 96}
    expected = generate(model, **options)
    if "assistant_early_exit" in option:
        try:
            assert torch.equal(generate(model, **options | option), expected)
        except TypeError as error:
            pytest.skip(f"not even with its own cache, {transformers.__version__}: {error}")
    cache = PreallocatedCache(model.config, capacity=60)
    layer, lengths = cache.layers[0], []
    real = type(layer).crop
    monkeypatch.setattr(
        type(layer), "crop", lambda self, n: (lengths.append(self.length), real(self, n))[1]
    )
    assert torch.equal(generate(model, cache, **options | option), expected)
    assert max(lengths) > 11 and cache.get_seq_length() == expected.size(1) - 1


def test_an_assistant_model():
    """A draft model of its own drafts from a cache of its own."""
    model, assistant, ids = stock_model(), stock_model("qwen2"), ids_of(1, 11)
    cache = PreallocatedCache(model.config, capacity=60)
    found = generate(model, cache, input_ids=ids, assistant_model=assistant)
    assert torch.equal(found, generate(model, input_ids=ids))


def test_beam_search():
    model = stock_model()
    expected = generate(model, num_beams=3, **padded())
    cache = PreallocatedCache(model.config, capacity=34)
    assert torch.equal(generate(model, cache, num_beams=3, **padded()), expected)


def run(model, cache, ids):
    return model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("name", MODELS)
def test_crop_then_go_on(name):
    """What was rolled back leaves no trace, however it was rolled back."""
    model, ids, other = stock_model(name), ids_of(2, 20), ids_of(2, 20, seed=2)
    fresh = PreallocatedCache(model.config, capacity=30)
    run(model, fresh, ids[:, :12])
    expected = run(model, fresh, other[:, :9])
    for crop in (-8, 12):
        cache = PreallocatedCache(model.config, capacity=30)
        run(model, cache, ids[:, :12])
        run(model, cache, ids[:, 12:])
        for layer in cache.layers:  # nothing of it may be read again
            layer.keys[:, :, 12:], layer.values[:, :, 12:] = torch.nan, torch.nan
        cache.crop(crop)
        assert cache.get_seq_length() == 12
        assert torch.equal(run(model, cache, other[:, :9]), expected)


def test_crop_of_nothing_is_nothing():
    cache = PreallocatedCache(stock_model().config, capacity=30)
    cache.crop(0)
    run(stock_model(), cache, ids_of(2, 5))
    for count in (0, 5, 6):
        cache.crop(count)
        assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="crop must remove at most 5 tokens, got 6"):
        cache.crop(-6)
    assert {layer.length for layer in cache.layers} == {5}
    cache.crop(-5)
    assert cache.get_seq_length() == 0


def test_memory_is_taken_once():
    model, ids = stock_model(), ids_of(3, 40)
    cache = PreallocatedCache(model.config, capacity=40)
    run(model, cache, ids[:, :7])
    taken = pointers(cache)
    assert all(layer.keys.shape == (3, 2, 40, 8) for layer in cache.layers)
    for start in range(7, 40):
        run(model, cache, ids[:, start : start + 1])
    cache.crop(-30)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    run(model, cache, ids[:, :4])
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = run(model, None, ids)
    torch.testing.assert_close(run(model, cache, ids), expected, atol=1e-5, rtol=1e-5)
    assert pointers(cache) == taken


def test_views_are_of_the_cache_itself():
    layer = PreallocatedCache(stock_model().config, capacity=9).layers[0]
    new = torch.ones(1, 2, 3, 8)
    keys, values = layer.update(new, 2 * new)
    assert keys.shape == values.shape == (1, 2, 3, 8)
    assert keys.data_ptr() == layer.keys.data_ptr() and torch.equal(values, 2 * new)
    assert layer.get_mask_sizes(4) == layer.get_mask_sizes(torch.arange(4)) == (7, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == 9


def test_beyond_the_capacity():
    model, ids = stock_model(), ids_of(2, 12)
    cache = PreallocatedCache(model.config, capacity=10)
    with pytest.raises(ValueError, match="capacity must be >= the 12 tokens to hold, got 10"):
        run(model, cache, ids)
    assert not any(layer.is_initialized for layer in cache.layers)
    run(model, cache, ids[:, :8])
    held = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="capacity must be >= the 11 tokens to hold, got 10"):
        run(model, cache, ids[:, :3])
    assert {layer.length for layer in cache.layers} == {8}
    for layer, before in zip(cache.layers, held, strict=True):
        assert torch.equal(layer.keys[:, :, :8], before[:, :, :8])
    run(model, cache, ids[:, :2])


def test_refusals():
    model = stock_model()
    cache = PreallocatedCache(model.config, capacity=10)
    run(model, cache, ids_of(2, 3))
    with pytest.raises(ValueError, match=r"keys must be \(2, 2, 3, 8\), .* got \(1, 2, 3, 8\)"):
        run(model, cache, ids_of(1, 3))
    for change in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(NotImplementedError, match="the number of rows must stay"):
            change()
    with pytest.raises(RuntimeError, match="inference only"):
        run(model.requires_grad_(True), cache, ids_of(2, 3))
    assert {layer.length for layer in cache.layers} == {3}
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        PreallocatedCache(model.config, capacity=0)
    config = transformers.Lfm2Config(**SMALL | {"layer_types": ["conv", "full_attention"] * 2})
    with pytest.raises(ValueError, match="full or sliding attention .*, got conv, full_attention"):
        PreallocatedCache(config, capacity=9)
