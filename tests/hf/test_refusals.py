"""What accelerate() and its generate() refuse, by name, before anything is changed or run."""

import importlib
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

import transformers
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

import lego_kernels.hf
from lego_kernels import library
from lego_kernels.hf import accelerate
from tests.hf.tiny_models import ROPE, ragged, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
PROMPTS = ragged(9, 3, 8)


class OwnLinear(nn.Linear):
    pass


def other_architecture():
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)
    return transformers.GPT2LMHeadModel(config).eval()


def subclass():
    model = tiny_model()
    model.__class__ = type("OwnLlama", (type(model),), {})
    return model


def rope(**parameters):
    return lambda: tiny_model(rope_parameters={**ROPE, **parameters})


def changed(change, **options):
    """A tiny model after change(model)."""

    def make():
        model = tiny_model(**options)
        change(model)
        return model

    return make


def config_with(**settings):
    return changed(lambda model: [setattr(model.config, *item) for item in settings.items()])


def adapted(model):
    model.model.layers[1].self_attn.q_proj = OwnLinear(32, 32, bias=False).eval()


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, args, out: out)


def patched(model):
    model.model.norm.forward = lambda x: x


def mixed(model):
    model.model.norm.to(torch.bfloat16)


def shared(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def transposed(model):
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.data.T.contiguous().T)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
MODELS = {
    "architecture": (other_architecture, "model must be one of LlamaForCausalLM, .* GPT2LMHead"),
    "subclass": (subclass, "model must be one of .* got OwnLlama"),
    "dynamic rope": (rope(rope_type="dynamic"), "rope_type must be one of .* got 'dynamic'"),
    "longrope": (rope(rope_type="longrope", **LONG), "rope_type must be one of .* got 'longrope'"),
    "partial rotary": (
        config_with(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor must be 1, got 0.5",
    ),
    "quantised": (
        config_with(quantization_config={"bits": 4}),
        "config.quantization_config must be None, got {'bits': 4}",
    ),
    "activation": (
        lambda: tiny_model(hidden_act="gelu"),
        "config.hidden_act must be 'silu', got 'gelu'",
    ),
    "mlp bias": (lambda: tiny_model(mlp_bias=True), "config.mlp_bias must be False, got True"),
    "attention bias": (
        lambda: tiny_model(attention_bias=True),
        "layers.0.self_attn.o_proj must have no bias",
    ),
    "qwen3 attention bias": (
        lambda: tiny_model("qwen3", attention_bias=True),
        "layers.0.self_attn.o_proj must have no bias",
    ),
    "pretraining_tp": (config_with(pretraining_tp=2), "config.pretraining_tp must be 1, got 2"),
    "layer types": (
        config_with(layer_types=["chunked_attention"] * 4),
        "layer_types must be .* got chunked_attention",
    ),
    "adapter": (changed(adapted), "layers.1.self_attn.q_proj must be the stock module of llama"),
    "hook": (changed(hooked), "layers.1 must have the forward of its class and no hooks"),
    "patch": (changed(patched), "model.norm must have the forward of its class and no hooks"),
    "mixed dtypes": (changed(mixed), "model.norm.weight must be torch.float32 as the embedding"),
    "dtype": (
        lambda: tiny_model(dtype=torch.float64),
        "model must be float32, bfloat16 or float16, got torch.float64",
    ),
    "device": (changed(lambda model: model.to("meta")), "must be on the CPU, got meta"),
    "shared": (changed(shared), "layers.1.mlp.up_proj.weight must be of one layer alone"),
    "transposed": (changed(transposed), "lm_head.weight must be contiguous"),
}


def places(model):
    return [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, message = MODELS[name]
    model = make()
    before = places(model)
    with pytest.raises(ValueError, match=f"^accelerate: .*{message}"):
        accelerate(model)
    assert places(model) == before


def test_training_mode():
    model = tiny_model()
    model.model.layers[2].mlp.train()
    with pytest.raises(RuntimeError, match="must be in eval mode, got model.layers.2.mlp"):
        accelerate(model)


def test_autocast():
    """transformers would compute in the lower precision, the decoder not."""
    fast = accelerate(tiny_model())
    with torch.autocast("cpu", torch.bfloat16):
        for call in (lambda: fast.generate(**PROMPTS), lambda: accelerate(tiny_model())):
            with pytest.raises(RuntimeError, match=r"autocast must be off, .*to\(torch.bfloat16\)"):
                call()


def test_kernels_that_are_not_loaded(monkeypatch):
    monkeypatch.setitem(library.NOT_LOADED, "CPU", "no file")
    with pytest.raises(RuntimeError, match="the CPU kernels must be loaded, got no file"):
        accelerate(tiny_model())


def test_old_transformers(monkeypatch):
    # transformers puts another module object in its place while it is imported
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match="transformers must be >= 5, got 4.57.1"):
        importlib.reload(lego_kernels.hf)


def test_recorded_outputs_are_no_hooks():
    """transformers leaves hooks, or each layer's own forward on it, where it recorded outputs."""
    model = tiny_model()
    with torch.no_grad():
        model(PROMPTS["input_ids"], output_hidden_states=True, output_attentions=True)
    accelerate(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode must be one of .* got 'fast'"),
        ({"mode": "early_exit", "threshold": 0.5}, "exit_layer must be given in mode early_exit"),
        ({"mode": "speculative"}, "exit_layer must be given in mode speculative"),
        ({"mode": "early_exit", "exit_layer": 2}, "threshold must be given in mode early_exit"),
        ({"mode": "speculative", "exit_layer": 0}, r"exit_layer must be in \[1, 4\], got 0"),
        ({"mode": "speculative", "exit_layer": 5}, r"exit_layer must be in \[1, 4\], got 5"),
        ({"threshold": 0.5}, "threshold must be unset in mode full, got 0.5"),
        (
            {"mode": "speculative", "exit_layer": 2, "threshold": float("nan")},
            "threshold must be a number, got nan",
        ),
        ({"criterion": "gate"}, "criterion must be one of .* got 'gate'"),
        ({"kv_policy": "hole"}, r"kv_policy must be one of \('recompute',\) in mode full"),
        (
            {"mode": "early_exit", "exit_layer": 2, "threshold": 0.5, "kv_policy": "exact"},
            r"kv_policy must be one of \('recompute', 'propagate', 'hole'\) in .* got 'exact'",
        ),
        (
            {"mode": "speculative", "exit_layer": 2, "draft_tokens": 0},
            "draft_tokens must be an int >= 1, got 0",
        ),
    ],
)
def test_options(options, message):
    model = tiny_model()
    before = places(model)
    with pytest.raises(ValueError, match=f"^accelerate: {message}"):
        accelerate(model, **options)
    assert places(model) == before


class Silent(BaseStreamer):
    def put(self, value):
        raise AssertionError("nothing may run")

    end = put


@pytest.fixture(scope="module")
def fast():
    return accelerate(tiny_model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "num_beams must be 1 or unset, got 2; settings are bos_token_id"),
        ({"repetition_penalty": 1.1}, "repetition_penalty must be 1 or unset, got 1.1"),
        ({"min_new_tokens": 3}, "min_new_tokens must be unset, got 3"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size must be unset, got 2"),
        ({"output_attentions": True}, "output_attentions must be unset, got True"),
        ({"output_scores": True}, "output_scores must be unset, got True"),
        ({"stop_strings": "a"}, "stop_strings must be unset, got 'a'"),
        ({"use_cache": False}, "use_cache must be True or unset, got False"),
        ({"cache_implementation": "static"}, "cache_implementation must be dynamic or unset"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id must be unset, got 0"),
        ({"min_p": 0.1}, "min_p must be unset, got 0.1"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens must be unset, got 3"),
        ({"assistant_early_exit": 2}, "assistant_early_exit must be unset, got 2"),
        ({"logits_processor": [print]}, "arguments must be of inputs, .* got logits_processor"),
        ({"past_key_values": object()}, "arguments must be of .* got past_key_values"),
        ({"assistant_model": object()}, "arguments must be of .* got assistant_model"),
        ({"custom_generate": print}, "arguments must be of .* got custom_generate"),
        ({"inputs_embeds": torch.zeros(1, 1, 32)}, "arguments must be of .* got inputs_embeds"),
        ({"position_ids": torch.zeros(1, 1)}, "arguments must be of .* got position_ids"),
        ({"tokenizer": object()}, "arguments must be of .* got tokenizer"),
        ({"max_new_token": 5}, "arguments must be of .* got max_new_token$"),
        ({"max_new_token": None}, "arguments must be of .* got max_new_token$"),
        (
            {"generation_config": GenerationConfig(repetition_penalty=1.2)},
            "repetition_penalty must be 1 or unset, got 1.2",
        ),
        ({"generation_config": GenerationConfig(my_own=7)}, "my_own must be unset, got 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(fast, arguments, message):
    with pytest.raises(ValueError, match=f"^generate: {message}"):
        fast.generate(**PROMPTS, streamer=Silent(), **arguments)


def test_settings_of_the_model_and_over_it(fast, monkeypatch):
    expected = fast.generate(**PROMPTS, max_new_tokens=3)
    monkeypatch.setattr(fast._model.generation_config, "repetition_penalty", 1.1)
    with pytest.raises(ValueError, match="repetition_penalty must be 1 or unset, got 1.1"):
        fast.generate(**PROMPTS, max_new_tokens=3)
    plain = {"repetition_penalty": 1.0, "logits_processor": None, "past_key_values": None}
    assert torch.equal(fast.generate(**PROMPTS, max_new_tokens=3, **plain), expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (PROMPTS["attention_mask"].flip(1), "must be 0s, then 1s in each row .* in row 1"),
        (torch.zeros(3, 9).long(), "must be 0s, then 1s in each row .* in row 0"),
        (2 * PROMPTS["attention_mask"], "must be 0s, then 1s in each row .* in row 0"),
        (torch.ones(3, 8).long(), r"must be \(3, 9\) as input_ids, got \(3, 8\)"),
    ],
    ids=["right", "empty", "twos", "shape"],
)
def test_masks(fast, mask, message):
    with pytest.raises(ValueError, match=f"^generate: attention_mask {message}"):
        fast.generate(PROMPTS["input_ids"], attention_mask=mask, streamer=Silent())


def test_ids_and_positions(fast):
    with pytest.raises(ValueError, match=r"ids in \[0, 97\), got 97"):
        fast.generate(torch.tensor([[97]]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got \(2,\)"):
        fast.generate(torch.tensor([5, 6]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask must be 0s, then 1s"):
        fast.generate(torch.tensor([[5, 0, 7], [5, 6, 7]]), max_new_tokens=2)  # 0 pads
    with pytest.raises(ValueError, match="must be on the CPU, got meta"):
        fast.generate(torch.zeros(1, 2, dtype=torch.int64, device="meta"), max_new_tokens=2)
    with pytest.raises(ValueError, match="must fit max_position_embeddings .* 256 tokens, got 257"):
        fast.generate(torch.tensor([[5]]), max_new_tokens=257)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_sliding_window(kind):
    """It serves while no token is out of the window, and refuses what would be."""
    changes = {} if kind == "mistral" else {"use_sliding_window": True, "max_window_layers": 2}
    model, ids = tiny_model(kind, sliding_window=16, **changes), PROMPTS["input_ids"][:1]
    fast = accelerate(model)
    expected = model.generate(ids, max_new_tokens=8)
    assert torch.equal(fast.generate(ids, max_new_tokens=8), expected)
    with pytest.raises(ValueError, match="the sliding window, 16 tokens, got 17"):
        fast.generate(ids, max_new_tokens=9)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (PROMPTS["input_ids"].float(), "must be a tensor of int64 or int32, got torch.float32"),
        (PROMPTS["input_ids"].tolist(), "must be a tensor of int64 or int32, got list"),
        (PROMPTS["input_ids"][:0], "must be .B, T., got .0, 9."),
    ],
    ids=["float", "list", "no rows"],
)
def test_prompts_that_are_none(ids, message):
    with pytest.raises(ValueError, match=message):
        accelerate(tiny_model()).generate(input_ids=ids, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "full", "exit_layer": 2}, "exit_layer must be unset in mode full, got 2"),
        ({"mode": "speculative", "exit_layer": 2.5}, "exit_layer must be in .1, 4., got 2.5"),
        (
            {"mode": "speculative", "exit_layer": 2, "draft_tokens": 2.5},
            "draft_tokens must be an int >= 1, got 2.5",
        ),
    ],
    ids=str,
)
def test_a_refused_acceleration_leaves_another_as_it_is(options, message):
    model = tiny_model()
    fast = accelerate(model)
    expected = fast.generate(**PROMPTS, max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        accelerate(model, **options)
    assert fast.shares_weights
    assert torch.equal(fast.generate(**PROMPTS, max_new_tokens=4), expected)


def test_weights_that_do_not_fit_leave_another_acceleration_as_it_is(monkeypatch):
    """Packs that were found stay packed; those made before the failure are given back."""
    model = tiny_model()
    fast = accelerate(model)
    monkeypatch.setattr("lego_kernels.hf.packing.rotary_tables", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accelerate(model)
    assert fast.shares_weights
    fresh = tiny_model(seed=1)
    places = [p.untyped_storage().data_ptr() for p in fresh.parameters()]
    with pytest.raises(ZeroDivisionError):
        accelerate(fresh)
    now = [p.untyped_storage().data_ptr() for p in fresh.parameters()]
    assert len(set(now)) == len(set(places))


def test_what_comes_after_the_acceleration_is_seen():
    model = tiny_model()
    fast = accelerate(model)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match="no hooks"):
        fast.generate(**PROMPTS, max_new_tokens=2)
    handle.remove()
    model.train()
    with pytest.raises(RuntimeError, match="must be in eval mode"):
        fast.generate(**PROMPTS, max_new_tokens=2)
    model.eval()
    fast.generate(**PROMPTS, max_new_tokens=2)
