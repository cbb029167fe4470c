"""accelerate(model): the same tokens from swapped layers, an honest report, and the way back."""

import pytest
import torch
from torch import nn

import lego.layers
from lego.accelerate import accelerate
from lego.generation import generate
from lego.kv_cache import KVCache
from lego.strategies import FullDepth, Uncached
from lego_kernels import layers as kernels
from tests.models import CRITERIA, POLICIES, VARIANTS, early_exit, model_for, tiny_model, token_ids


def model_of(upper_kv="exit_state", dtype=torch.float32, **changes):
    return tiny_model(upper_kv, dtype=dtype, **changes).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_generates_the_same(policy, variant):
    model = model_for(policy, dtype=torch.float32, **VARIANTS[variant]).eval()
    prompts = [token_ids(n, seed=n).tolist() for n in (1, 7, 12)]
    strategies = [early_exit(model, policy, criterion) for criterion in CRITERIA]
    strategies += [FullDepth(), Uncached()]
    expected = [generate(model, prompts, 12, strategy) for strategy in strategies]
    done = accelerate(model)
    for strategy, before in zip(strategies, expected, strict=True):
        after = generate(model, prompts, 12, strategy)
        assert after.tokens == before.tokens and after.exit_layer == before.exit_layer
        for mine, theirs in zip(after.confidence, before.confidence, strict=True):
            torch.testing.assert_close(
                torch.tensor(mine), torch.tensor(theirs), atol=1e-4, rtol=0, equal_nan=True
            )
        assert after.stats.decode == before.stats.decode
    assert all(layer.swapped for layer in done.layers if layer.kind != "Embedding")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    model, ids = model_of(dtype=dtype), token_ids(2, 20)
    exact = model_of(dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    logits = exact.final_logits(exact(ids).final_state)
    eager = (model.final_logits(model(ids).final_state).double() - logits).abs().mean()
    accelerate(model)
    mine = (model.final_logits(model(ids).final_state).double() - logits).abs().mean()
    assert mine <= 1.5 * eager


def test_reports_every_layer_with_parameters():
    model = model_of(qk_norm=True)
    done = accelerate(model)
    by_name = {layer.name: layer for layer in done.layers}
    assert by_name["lower.0.attention"].kind == "Attention" and by_name["lower.0.mlp"].swapped
    assert by_name["upper.1.mlp_norm"].swapped and by_name["upper_kv_proj"].swapped
    assert by_name["head"].swapped and by_name["gate"].swapped
    embedding = by_name["embedding"]
    assert not embedding.swapped and embedding.why_not == "Embedding has no drop-in"
    covered = tuple(f"{name}." for name in by_name)
    assert all(name.startswith(covered) for name, _ in model.named_parameters())


def test_undo_restores_the_instances():
    model, ids = model_of("own", qkv_bias=True), token_ids(2, 9)
    before = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    names, states = list(model.state_dict()), model(ids)
    done = accelerate(model)
    assert type(model.lower[0].attention) is kernels.Attention
    assert model.kv_cache_type is kernels.KVCache
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert list(model.state_dict()) == names
    done.undo()
    after = dict(model.named_modules())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert model.kv_cache_type is KVCache and "kv_cache_type" not in vars(model)
    assert all(torch.equal(a, b) for a, b in zip(model(ids), states, strict=True))
    done.undo()  # nothing is left to do
    assert type(model.lower[0].attention) is lego.layers.Attention


def test_other_models_keep_their_layers():
    one, other = model_of(), model_of()
    accelerate(one)
    assert not any(type(m).__module__.startswith("lego_kernels") for m in other.modules())
    assert other.kv_cache_type is KVCache


def test_a_second_time_swaps_nothing():
    model = model_of()
    accelerate(model)
    again = accelerate(model)
    assert {layer.why_not for layer in again.layers} == {
        "it runs on kernels already",
        "Embedding has no drop-in",
    }


class OwnNorm(lego.layers.RMSNorm):
    pass


def test_leaves_what_it_does_not_know():
    shared = nn.Linear(4, 4)
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, out: out)
    plain = nn.RMSNorm(4, elementwise_affine=False)
    model = nn.ModuleDict(
        {
            "twice": nn.ModuleList([shared, shared]),
            "hooked": hooked,
            "wide": nn.Linear(4, 4).double(),
            "norm2d": nn.RMSNorm((4, 4)),
            "plain": plain,
            "subclass": OwnNorm(4, 1e-5),
            "stock": nn.RMSNorm(4),
        }
    ).eval()
    done = accelerate(model)
    why = {layer.name: layer.why_not for layer in done.layers}
    assert why == {
        "twice.0": "",
        "twice.1": "",
        "hooked": "it has hooks, which a swap would lose",
        "wide": "its parameters are torch.float64; the kernels take float32, bfloat16 and float16",
        "norm2d": "its weight is not [dim]",
        "subclass": "OwnNorm has no drop-in",
        "stock": "",
    }
    assert model["twice"][0] is model["twice"][1] and model["plain"] is plain
    assert type(model["stock"]) is kernels.RMSNorm
    done.undo()
    assert model["twice"][0] is shared and model["twice"][1] is shared


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_leaves_a_layer_that_holds_what_it_does_not_know():
    model, ids = model_of(), token_ids(1, 5)
    stock = model.lower[0].mlp.gate_up_proj
    adapted = Adapted(stock.in_features, stock.out_features, bias=False).eval()
    adapted.weight = stock.weight
    model.lower[0].mlp.gate_up_proj = adapted
    nn.utils.parametrizations.weight_norm(model.lower[1].attention.o_proj)
    model.eval().requires_grad_(False)
    expected = model(ids).final_state
    why = {layer.name: layer.why_not for layer in accelerate(model).layers}
    assert "lower.0.mlp" not in why and why["lower.0.mlp.down_proj"] == ""
    assert why["lower.0.mlp.gate_up_proj"] == "Adapted has no drop-in"
    assert type(model.lower[1].attention) is lego.layers.Attention
    torch.testing.assert_close(model(ids).final_state, expected, atol=1e-4, rtol=1e-4)


def test_refuses_training_mode_and_swaps_nothing():
    model = model_of()
    model.upper[1].mlp.train()
    with pytest.raises(
        RuntimeError, match="^accelerate: model must be in eval mode, got upper.1.mlp"
    ):
        accelerate(model)
    assert type(model.lower[0].mlp) is lego.layers.MLP


def test_training_an_accelerated_model_raises():
    model = model_of()
    done = accelerate(model)
    model.train()
    with pytest.raises(RuntimeError, match="is inference only, so call eval"):
        model(token_ids(1, 4))
    model.eval().requires_grad_(True)
    with pytest.raises(RuntimeError, match="is inference only, so no input may require grad"):
        model(token_ids(1, 4))
    done.undo()
    model(token_ids(1, 4)).final_state.sum().backward()


def test_a_failure_half_way_swaps_nothing(monkeypatch):
    def fail(stock):
        raise ValueError("no")

    monkeypatch.setitem(lego.accelerate._DROP_INS, lego.layers.RMSNorm, fail)
    model = model_of()
    before = list(map(id, model.modules()))
    with pytest.raises(ValueError, match="^no$"):
        accelerate(model)
    assert list(map(id, model.modules())) == before
