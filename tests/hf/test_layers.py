"""use_kernels(model): the same logits but for rounding, a full account, no trace after undo()."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="needs transformers >= 5: pip install '.[hf]'"
)

from lego_kernels.hf import layers as hf_layers  # noqa: E402
from lego_kernels.hf.layers import use_kernels  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 10}),
}


def stock_model(name="llama", dtype=torch.float32, **changes):
    kind, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SMALL | more | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype)


def ids_of(rows, tokens):
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


def state_of(model):
    """Every module, by identity, with all that it holds but its parameters' values."""
    return {
        name: (id(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


# a row, as many as linear_small takes, one more, two rows of nine
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (1, 17), (2, 9)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_undo(name, shape):
    model, ids = stock_model(name), ids_of(*shape)
    expected, before = model(ids).logits, state_of(model)
    used = use_kernels(model)
    found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    used.undo()
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, expected)
    used.undo()
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits(name, dtype):
    """No further from float64 than the stock model is, with half as much for the luck of it."""
    model, ids = stock_model(name, dtype), ids_of(2, 20)
    exact = copy.deepcopy(model).double()(ids).logits
    eager = (model(ids).logits.double() - exact).abs().mean()
    use_kernels(model)
    assert (model(ids).logits.double() - exact).abs().mean() <= 1.5 * eager


@pytest.mark.parametrize("name", MODELS)
def test_generates_the_same(name):
    model, ids = stock_model(name), ids_of(2, 9)
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, **options)
    use_kernels(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_the_ops_are_what_runs(monkeypatch):
    model, called = stock_model("qwen3"), []
    use_kernels(model)
    for op in ("rms_norm", "swiglu", "linear_small"):
        real = getattr(hf_layers, op)
        spy = lambda *args, op=op, real=real, **kwargs: called.append(op) or real(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(hf_layers, op, spy)
    model(ids_of(1, 3))
    # two norms of a layer, two of its heads, and the last
    assert {op: called.count(op) for op in called} == {
        "rms_norm": 3 * 4 + 1,
        "swiglu": 3,
        "linear_small": 3 * 3,
    }


def test_the_account():
    model = stock_model()
    used = use_kernels(model)
    replaced = {layer.name for layer in used.layers if layer.replaced}
    parts = ("mlp", "input_layernorm", "post_attention_layernorm")
    expected = {f"model.layers.{i}.{part}" for i in range(3) for part in parts}
    assert replaced == expected | {"model.norm"}
    left = {layer.name: layer for layer in used.layers if not layer.replaced}
    assert left.keys() == {"model.embed_tokens", "lm_head"} | {
        f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"
    }
    assert left["lm_head"].kind == "Linear" and left["lm_head"].why_not.startswith("it is no norm")


class Adapter(nn.Linear):
    """More than its weight says."""

    def forward(self, x):
        return super().forward(x) + 1


def with_adapter(mlp):
    mlp.up_proj = Adapter(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)


UNFIT = {
    "it holds Adapter, which is no plain Linear": with_adapter,
    "its projections have hooks": lambda mlp: mlp.down_proj.register_forward_hook(print),
    "its forward is not its class's": lambda mlp: setattr(mlp, "forward", mlp.forward),
    "its weights are torch.float64": lambda mlp: mlp.double(),
    "its weights are on no device": lambda mlp: mlp.to("meta"),
}


@pytest.mark.parametrize("why", UNFIT)
def test_what_does_not_fit_stays(why):
    model = stock_model()
    mlp = model.model.layers[0].mlp
    UNFIT[why](mlp)
    before = dict(vars(mlp))
    layers = {layer.name: layer for layer in use_kernels(model).layers}
    layer = layers["model.layers.0.mlp"]
    assert not layer.replaced and layer.why_not.startswith(why)
    assert vars(mlp) == before
    assert layers["model.layers.1.mlp"].replaced


def test_biases_and_other_activations_stay():
    for change, why in (
        ({"mlp_bias": True}, "its projections have a bias"),
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
    ):
        model = stock_model(**change)
        expected = model(ids_of(1, 5)).logits
        layers = use_kernels(model).layers
        assert {layer.why_not for layer in layers if layer.kind == "LlamaMLP"} == {why}
        torch.testing.assert_close(model(ids_of(1, 5)).logits, expected, atol=2e-5, rtol=1e-5)


def test_nothing_to_replace():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2))
    before = state_of(model)
    with pytest.raises(
        ValueError, match="must hold norms or MLPs of Llama, .* got GPT2LMHeadModel"
    ):
        use_kernels(model)
    assert state_of(model) == before
    stock = stock_model()
    used, before = use_kernels(stock), state_of(stock)
    with pytest.raises(ValueError, match="its forward is not its class's"):
        use_kernels(stock)
    assert state_of(stock) == before
    used.undo()
    use_kernels(stock)


def test_undo_leaves_what_came_later():
    model = stock_model()
    used = use_kernels(model)
    norm = model.model.norm
    ours = norm.forward
    norm.forward = later = lambda x: ours(x)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="must be as use_kernels left them, got another in Lla"):
        used.undo()
    assert state_of(model) == before and norm.forward is later
    norm.forward = ours
    used.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_are_refused():
    """Never silently missing: with weights that require grad, and with an input that does."""
    model, ids = stock_model(), ids_of(1, 5)
    use_kernels(model)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="inference only"):
        model(ids)
    with torch.no_grad():
        model(ids)
    model.requires_grad_(False)
    for module in (model.model.norm, model.model.layers[0].mlp):
        with pytest.raises(RuntimeError, match="inference only"):
            module(torch.randn(1, 20, 40, requires_grad=True))  # more than linear_small takes


def test_other_models_copies_and_checkpoints(tmp_path):
    """Nothing is patched but the instances; a copy runs on weights of its own."""
    model, other, ids = stock_model(), stock_model(), ids_of(1, 5)
    names = list(model.state_dict())
    use_kernels(model)
    assert not any("forward" in vars(module) for module in other.modules())
    assert list(model.state_dict()) == names
    expected = model(ids).logits
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(copied(ids).logits, expected)
    copied.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(found(ids).logits, expected, atol=2e-5, rtol=1e-5)


def test_hooks_on_replaced_layers_are_called():
    model, seen = stock_model(), []
    use_kernels(model)
    model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append("mlp"))
    model.model.norm.register_forward_hook(lambda *args: seen.append("norm"))
    model(ids_of(1, 4))
    assert seen == ["mlp", "norm"]
