"""The model against a loop written from its definition, and the promises of its layout."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from lego.config import ModelConfig
from lego.kv_cache import attend_within
from lego.layers import Block
from lego.model import LegoModel
from lego.ops.rotary import rotary_tables
from tests.models import (
    VARIANTS,
    confidence,
    tiny_config,
    tiny_model,
    token_ids,
)

ALL_MODELS = [(kv, name) for kv in ("exit_state", "own") for name in VARIANTS]
BOTH = pytest.mark.parametrize("upper_kv", ["exit_state", "own"])


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x, position, theta):
    """[H, E] rotated: halves are real and imaginary parts."""
    E = x.size(-1)
    angle = position * theta ** (-torch.arange(0, E, 2, dtype=torch.float64) / E)
    turned = torch.complex(x[..., : E // 2], x[..., E // 2 :]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive_layer(model, block, stream, sources):
    """One layer, a token at a time; `sources` hold the raw keys and values, each [K, E]."""
    config, attention = model.config, block.attention
    H, K, E = config.num_heads, config.num_kv_heads, config.head_dim
    has_norm, out, keys = config.qk_norm, [], []
    for t, h in enumerate(stream):
        x = norm(h, block.attention_norm.weight, config.norm_eps)
        k = sources[t][0]
        k = norm(k, attention.k_norm.weight, config.norm_eps) if has_norm else k
        keys.append(turn(k, t, config.rope_theta))
        q = linear(x, attention.in_proj.weight, attention.in_proj.bias)[: H * E].view(H, E)
        q = norm(q, attention.q_norm.weight, config.norm_eps) if has_norm else q
        q = turn(q, t, config.rope_theta)
        heads = []
        for head in range(H):
            group = head * K // H
            score = torch.stack([key[group] @ q[head] for key in keys]) / math.sqrt(E)
            values = torch.stack([sources[s][1][group] for s in range(t + 1)])
            heads.append(score.softmax(0) @ values)
        h = h + attention.o_proj.weight @ torch.cat(heads)
        x = norm(h, block.mlp_norm.weight, config.norm_eps)
        gate, up = (block.mlp.gate_up_proj.weight @ x).split(config.hidden_dim)
        out.append(h + block.mlp.down_proj.weight @ (gate * gate.sigmoid() * up))
    return out


def own_sources(model, block, stream):
    config = model.config
    width = config.num_heads * config.head_dim
    sources = []
    for h in stream:
        x = norm(h, block.attention_norm.weight, config.norm_eps)
        kv = linear(x, block.attention.in_proj.weight, block.attention.in_proj.bias)[width:]
        sources.append(kv.view(2, config.num_kv_heads, config.head_dim))
    return sources


def exit_sources(model, layer, exit_states):
    config, proj = model.config, model.upper_kv_proj
    shape = (config.num_upper_layers, 2, config.num_kv_heads, config.head_dim)
    normed = [norm(h, model.kv_norm.weight, config.norm_eps) for h in exit_states]
    return [linear(x, proj.weight, proj.bias).view(shape)[layer] for x in normed]


def naive_forward(model, ids):
    stream = [model.embedding.weight[i] for i in ids]
    for block in model.lower:
        stream = naive_layer(model, block, stream, own_sources(model, block, stream))
    exit_states = stream
    for layer, block in enumerate(model.upper):
        if model.config.upper_kv == "own":
            sources = own_sources(model, block, stream)
        else:
            sources = exit_sources(model, layer, exit_states)
        stream = naive_layer(model, block, stream, sources)
    return torch.stack(exit_states), torch.stack(stream)


@pytest.mark.parametrize(("upper_kv", "variant"), ALL_MODELS)
def test_forward_is_its_definition(upper_kv, variant):
    model = tiny_model(upper_kv, **VARIANTS[variant], rope_theta=30.0)
    ids = token_ids(2, 6)
    got = model(ids)
    for row in range(2):
        exit_state, final_state = naive_forward(model, ids[row].tolist())
        # the rotary tables are float32
        torch.testing.assert_close(got.exit_state[row], exit_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.final_state[row], final_state, rtol=1e-5, atol=1e-5)


@BOTH
def test_no_token_sees_a_later_one(upper_kv):
    model, ids = tiny_model(upper_kv), token_ids(1, 9)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 50
    for one, other in zip(model(ids), model(changed), strict=True):
        torch.testing.assert_close(one[:, :5], other[:, :5], rtol=0, atol=1e-13)
        assert (one[:, 5:] - other[:, 5:]).abs().amax(-1).min() > 1e-3


@BOTH
def test_only_distances_between_positions_matter(upper_kv):
    model, ids = tiny_model(upper_kv), token_ids(2, 7)
    position = model.positions(ids) + torch.tensor([[0], [40]])
    state = model.run_lower(ids, position, lambda index: attend_within)
    final = model.run_upper(state, position, model.attend_upper_within(state, position))
    expected = model(ids)
    torch.testing.assert_close(state, expected.exit_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, expected.final_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_upper_kv_of_a_token_needs_its_exit_state_alone(variant):
    model = tiny_model("exit_state", **VARIANTS[variant])
    state, position = model(token_ids(2, 6)).exit_state, torch.arange(6)[None]
    together = model.upper_kv(state, position)
    for block in model.upper:  # K/V may not depend on what an upper layer computes
        block.mlp.down_proj.weight.data.zero_()
        block.attention.o_proj.weight.data.zero_()
    for t in range(6):
        alone = model.upper_kv(state[:, t : t + 1], position[:, t : t + 1])
        for pair, pair_alone in zip(together, alone, strict=True):
            for x, x_alone in zip(pair, pair_alone, strict=True):
                torch.testing.assert_close(x[:, t : t + 1], x_alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_project_kv_is_what_the_layer_attends_to(variant):
    model = tiny_model("own", **VARIANTS[variant])
    attention = model.upper[0].attention
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    position, seen = torch.tensor([[0, 1, 5, 9, 33]]), []

    def attend(q, kv):
        seen.extend(kv)
        return q

    angles = model.rotary(position)
    attention(x, angles, attend)
    for got, expected in zip(attention.project_kv(x, angles), seen, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_exits_share_the_head_and_have_their_own_norms():
    model = tiny_model()
    states = model(token_ids(2, 4))
    weights = {"exit": model.exit_norm.weight, "final": model.final_norm.weight}
    shallow = norm(states.exit_state, weights["exit"], 1e-5) @ model.embedding.weight.T
    deep = norm(states.final_state, weights["final"], 1e-5) @ model.embedding.weight.T
    torch.testing.assert_close(model.exit_logits(states.exit_state), shallow)
    torch.testing.assert_close(model.final_logits(states.final_state), deep)
    score = model.gate_score(states.exit_state.flatten(0, 1))
    torch.testing.assert_close(score, confidence(model, states.exit_state.flatten(0, 1), "gate"))


@BOTH
def test_dense_model_ends_at_its_exit(upper_kv):
    model = tiny_model(upper_kv, exit_layer=4)
    assert len(model.lower) == 4 and len(model.upper) == 0
    parts = ("gate", "final_norm", "kv_norm", "upper_kv_proj")
    assert not any(hasattr(model, name) for name in parts)
    states = model(token_ids(2, 5))
    assert states.exit_state is states.final_state
    logits = model.exit_logits(states.exit_state)
    torch.testing.assert_close(model.final_logits(states.final_state), logits, rtol=0, atol=0)
    assert model.upper_parameters() == {}
    expected, _ = naive_forward(model, token_ids(2, 5)[0].tolist())
    torch.testing.assert_close(states.exit_state[0], expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_skipped_upper_layers_are_left_out(upper_kv):
    model = tiny_model(upper_kv, num_layers=5)
    state, position = model(token_ids(1, 4)).exit_state, torch.arange(4)[None]
    attend = model.attend_upper_within(state, position)
    nothing = model.run_upper(state, position, attend, skip=frozenset({0, 1, 2}))
    assert torch.equal(nothing, state)
    angles = model.rotary(position)
    first = model.upper[0](state, angles, attend(0))
    last = model.upper[2](first, angles, attend(2))
    got = model.run_upper(state, position, attend, skip=frozenset({1}))
    assert torch.equal(got, last)


@pytest.mark.parametrize(("upper_kv", "variant"), ALL_MODELS)
def test_parameters_split_into_lower_upper_and_gate(upper_kv, variant):
    model = LegoModel(tiny_config(upper_kv, **VARIANTS[variant]))
    lower, upper = model.lower_parameters(), model.upper_parameters()
    named = dict(model.named_parameters())
    assert sorted([*lower, *upper, "gate.weight", "gate.bias"]) == sorted(named)
    # the first part of the name says whose it is
    owners = {name.split(".")[0] for name in upper}
    kv_owners = {"kv_norm", "upper_kv_proj"} if upper_kv == "exit_state" else set()
    assert owners == {"upper", "final_norm"} | kv_owners
    head = set() if model.config.tie_embeddings else {"head"}
    assert {name.split(".")[0] for name in lower} == {"embedding", "lower", "exit_norm"} | head
    # what phase 2 trains may not change what the exit yields
    before = model(token_ids(1, 5)).exit_state
    for parameter in upper.values():
        parameter.data.add_(1.0)
    assert torch.equal(model(token_ids(1, 5)).exit_state, before)


def test_initialisation():
    torch.manual_seed(0)
    config = tiny_config(dim=64, hidden_dim=160, vocab_size=400, qkv_bias=True)
    model = LegoModel(replace(config, tie_embeddings=False))
    base = model.embedding.weight.std().item()
    assert 0.01 < base < 0.2
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "gate.weight":
            assert parameter.eq(0).all(), name
        elif parameter.dim() == 1:
            assert parameter.eq(1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = base / math.sqrt(8) if residual else base
            assert abs(parameter.std().item() / std - 1) < 0.05, name
    assert model.head.weight is not model.embedding.weight
    tied = LegoModel(config)
    assert tied.head.weight is tied.embedding.weight


LLAMA3 = {
    "rope_low_freq_factor": 0.5,
    "rope_high_freq_factor": 2.0,
    "rope_original_seq_len": 16,
}


@pytest.mark.parametrize(
    ("kind", "numbers", "band"),
    [("linear", {}, None), ("llama3", LLAMA3, (0.5 / 16, 2.0 / 16))],
)
def test_rope_scaling_reaches_the_tables(kind, numbers, band):
    config = tiny_config(rope_type=kind, rope_theta=30.0, rope_factor=4.0, **numbers)
    rotary, tables = LegoModel(config).rotary, rotary_tables(8, 64, 30.0, factor=4.0, band=band)
    assert torch.equal(rotary.cos, tables[0]) and torch.equal(rotary.sin, tables[1])
    assert not torch.equal(rotary.cos, rotary_tables(8, 64, 30.0)[0])


def test_rotary_tables_are_not_stored_and_follow_the_dtype():
    model = tiny_model(dtype=torch.float32)
    assert not any("cos" in name or "sin" in name for name in model.state_dict())
    assert model.rotary.cos.shape == (64, 4)
    assert model(token_ids(1, 3)).final_state.dtype == torch.float32
    assert model.double()(token_ids(1, 3)).final_state.dtype == torch.float64
    assert model.bfloat16()(token_ids(1, 3)).final_state.dtype == torch.bfloat16


@pytest.mark.parametrize("position", [64, 2**40, -65])
def test_a_position_outside_the_tables_is_an_error(position):
    with pytest.raises(IndexError):
        tiny_model().rotary(torch.tensor([[0, position]]))


def test_layers_of_an_exit_state_model_project_queries_alone():
    config = ModelConfig(dim=32, num_heads=4, num_kv_heads=2, hidden_dim=24)
    assert Block(config, own_kv=False).attention.in_proj.weight.shape == (32, 32)
    assert Block(config, own_kv=True).attention.in_proj.weight.shape == (64, 32)


@BOTH
def test_every_upper_parameter_gets_a_gradient(upper_kv):
    model = tiny_model(upper_kv, qk_norm=True, qkv_bias=True).requires_grad_(True)
    model.final_logits(model(token_ids(2, 6)).final_state).logsumexp(-1).sum().backward()
    for name, parameter in model.upper_parameters().items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 1e-9, name
