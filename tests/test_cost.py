"""The two meters against parameter counts, hand counts and the source's numbers."""

import math

import pytest

from lego.cost import (
    dense_true_cost,
    elements_read,
    expected_true_cost,
    layer_cost,
    realised_savings,
    time_efficiency,
    weights,
)
from lego.counts import Counts
from lego.generation import generate
from lego.strategies import EarlyExit, FullDepth, Speculative
from tests.models import (
    CRITERIA,
    POLICIES,
    VARIANTS,
    agreeing_model,
    early_exit,
    model_for,
    tiny_config,
    tiny_model,
    token_ids,
)

PARTS = [(kv, name) for kv in ("exit_state", "own") for name in VARIANTS]
ANY_MODEL = pytest.mark.parametrize(("upper_kv", "variant"), PARTS)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@ANY_MODEL
def test_weights_are_the_parameters_of_the_model(upper_kv, variant):
    model = tiny_model(upper_kv, **VARIANTS[variant])
    config, part = model.config, weights(model.config)
    assert part.embedding_row == model.embedding.weight[0].numel()
    assert {part.lower_layer} == {count(block) for block in model.lower}
    assert {part.upper_layer} == {count(block) for block in model.upper}
    assert part.head == count(model.head, model.exit_norm) == count(model.head, model.final_norm)
    assert part.gate == count(model.gate)
    if upper_kv == "exit_state":
        assert part.upper_kv == count(model.upper_kv_proj, model.kv_norm)
    else:  # what propagate reads: the key and value rows of every upper layer
        rows = 2 * config.num_kv_heads * config.head_dim
        kv = sum(
            p[-rows:].numel() for block in model.upper for p in block.attention.in_proj.parameters()
        )
        assert part.upper_kv == kv
    total = config.vocab_size * part.embedding_row  # the table; a step reads one row
    total += config.exit_layer * part.lower_layer + config.num_upper_layers * part.upper_layer
    total += part.head + config.dim + part.gate  # one norm each for two exits
    total += part.upper_kv if upper_kv == "exit_state" else 0
    total -= config.vocab_size * config.dim if config.tie_embeddings else 0
    assert total == count(model)


@ANY_MODEL
def test_elements_read_of_full_depth_steps(upper_kv, variant):
    model = tiny_model(upper_kv, **VARIANTS[variant])
    config, num_prompt, num_new = model.config, 5, 4
    prompt = token_ids(1, num_prompt).tolist()
    stats = generate(model, prompt, num_new, FullDepth()).stats
    blocks = count(*model.lower, *model.upper)
    if upper_kv == "exit_state":
        blocks += count(model.upper_kv_proj, model.kv_norm)
    a_step = config.dim + blocks + count(model.head, model.final_norm)
    # the step of token t reads the slots of all tokens up to it, keys and values, in every layer
    slots = config.num_layers * sum(range(num_prompt, num_prompt + num_new))
    kv = 2 * config.num_kv_heads * config.head_dim * slots
    assert stats.decode.kv_slots == slots
    assert elements_read(config, stats.decode) == num_new * a_step + kv
    # weights are read once for the whole prompt, and an embedding row for every token
    prefill = (num_prompt - 1) * config.dim + count(*model.lower)
    layers = config.exit_layer
    if upper_kv == "own":
        prefill, layers = prefill + count(*model.upper), config.num_layers
    prefill += 2 * config.num_kv_heads * config.head_dim * layers * (num_prompt - 1)
    assert elements_read(config, stats.prefill) == prefill


def test_elements_read_by_hand():
    config = tiny_config()  # 32 wide, 4 heads of 8 over 2, MLP 24, 50 tokens
    without_kv, kv = 32 * 32 + 32 * 32 + 3 * 32 * 24 + 2 * 32, 32 * 32
    counts = Counts(
        lower_layer_calls=6, upper_layer_calls=2, upper_kv_calls=3, head_calls=4, gate_calls=3,
        lower_passes=6, upper_passes=2, upper_kv_passes=1, head_passes=4, gate_passes=3,
        kv_slots=10,
    )  # fmt: skip
    by_hand = 3 * 32 + 6 * (without_kv + kv) + 2 * without_kv + (2 * kv + 32)
    by_hand += 4 * (50 * 32 + 32) + 3 * 33 + 10 * 2 * 16
    assert elements_read(config, counts) == by_hand
    assert elements_read(config, Counts()) == 0


def without_context(config, counts):
    slots = 2 * config.num_kv_heads * config.head_dim * counts.kv_slots
    return elements_read(config, counts) - slots


@pytest.mark.parametrize("variant", ["gqa", "all"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("policy", ["exact", "recompute", "hole"])
def test_expected_true_cost_is_what_decoding_reads(policy, criterion, variant):
    model = model_for(policy, **VARIANTS[variant])
    config, prompt = model.config, token_ids(1, 1, seed=4).tolist()
    full = without_context(config, generate(model, prompt, 20, FullDepth()).stats.decode)
    for threshold, mixed in [
        (math.inf, False),
        (0.0, False),
        (early_exit(model, policy, criterion).threshold, True),
    ]:
        strategy = EarlyExit(threshold=threshold, criterion=criterion, kv_policy=policy)
        output = generate(model, prompt, 20, strategy)
        ratio = sum(layer == config.exit_layer for layer in output.exit_layer[0]) / 20
        assert 0 < ratio < 1 if mixed else ratio in (0, 1)
        read = without_context(config, output.stats.decode)
        expected = expected_true_cost(config, ratio, criterion)
        assert read / full == pytest.approx(expected, rel=1e-12)


@ANY_MODEL
def test_elements_read_of_speculation(upper_kv, variant):
    """Chunks of four whose drafts are all right: the upper block is read once a chunk."""
    model = agreeing_model(upper_kv, share=0.0, **VARIANTS[variant])
    config, num_prompt, num_chunks = model.config, 5, 3
    prompt = token_ids(1, num_prompt).tolist()
    strategy = Speculative(draft_tokens=4, stop_confidence=0.0)
    stats = generate(model, prompt, 4 * num_chunks, strategy).stats
    upper = count(*model.upper, model.final_norm) + count(model.head)
    if upper_kv == "exit_state":
        upper += count(model.upper_kv_proj, model.kv_norm)
    draft = config.dim + count(*model.lower, model.exit_norm) + count(model.head)
    # a chunk reads a slot once for all its tokens
    slots = config.exit_layer * sum(range(num_prompt, num_prompt + 4 * num_chunks))
    last = [num_prompt - 1 + 4 * (chunk + 1) for chunk in range(num_chunks)]
    slots += config.num_upper_layers * sum(last)
    kv = 2 * config.num_kv_heads * config.head_dim * slots
    assert elements_read(config, stats.decode) == num_chunks * (4 * draft + upper) + kv


@ANY_MODEL
def test_expected_true_cost_by_parts(upper_kv, variant):
    model = tiny_model(upper_kv, **VARIANTS[variant])
    config, head = model.config, count(model.head, model.exit_norm)
    lower, upper = config.dim + count(*model.lower), count(*model.upper)
    if upper_kv == "exit_state":
        upper += count(model.upper_kv_proj, model.kv_norm)
    full, gate = lower + upper + head, count(model.gate)
    for criterion in CRITERIA:
        shallow = lower + head + (gate if criterion == "gate" else 0)
        deep = full + (gate if criterion == "gate" else head)
        assert expected_true_cost(config, 1.0, criterion) == pytest.approx(shallow / full)
        assert expected_true_cost(config, 0.0, criterion) == pytest.approx(deep / full)
        half = expected_true_cost(config, 0.5, criterion)
        assert half == pytest.approx((shallow + deep) / 2 / full)


@ANY_MODEL
def test_dense_true_cost(upper_kv, variant):
    config = tiny_config(upper_kv, **VARIANTS[variant])
    prompt = token_ids(1, 1).tolist()

    def read(model):
        stats = generate(model, prompt, 5, FullDepth()).stats
        return without_context(model.config, stats.decode)

    model = tiny_model(upper_kv, **VARIANTS[variant])
    for num_layers in (config.exit_layer, config.num_layers):
        changes = VARIANTS[variant] | {"num_layers": num_layers, "exit_layer": num_layers}
        dense = tiny_model(upper_kv, **changes)
        assert dense.config == config.dense(num_layers)
        expected = read(dense) / read(model)
        assert dense_true_cost(config, num_layers) == pytest.approx(expected, rel=1e-12)


def test_layer_cost_of_the_source():
    config = tiny_config(num_layers=4, exit_layer=2)
    assert layer_cost(config, 21, 11) == (21 * 2 + 11 * 4) / (32 * 4)
    assert round(layer_cost(config, 21, 11), 3) == 0.672
    assert layer_cost(config, 0, 7) == 1.0 and layer_cost(config, 7, 0) == 0.5
    assert math.isnan(layer_cost(config, 0, 0))


@pytest.mark.parametrize("policy", POLICIES)
def test_layer_cost_is_counted_layers(policy):
    model = model_for(policy)
    prompt = token_ids(1, 1).tolist()
    output = generate(model, prompt, 30, early_exit(model, policy))
    shallow = output.exit_layer[0].count(2)
    decode = output.stats.decode
    calls = decode.lower_layer_calls + decode.upper_layer_calls
    if policy == "recompute":  # it runs the upper block for exited tokens too, later
        assert layer_cost(model.config, shallow, 30 - shallow) < calls / (30 * 4)
    else:
        assert layer_cost(model.config, shallow, 30 - shallow) == calls / (30 * 4)


def test_realised_savings_and_time_efficiency():
    assert realised_savings(0.6, 10.0, 6.0) == pytest.approx(1.0)
    assert realised_savings(0.5, 10.0, 7.5) == pytest.approx(0.5)
    assert realised_savings(0.5, 10.0, 12.0) == pytest.approx(-0.4)
    # the source: 32.8 % of the layers saved, 1.08 times as fast
    assert realised_savings(0.672, 1.08, 1.0) == pytest.approx(0.2258, abs=1e-4)
    assert realised_savings(0.9, 10.0, 9.0) == pytest.approx(1.0)
    for too_dear in (0.9000001, 1.0, 1.3):
        assert realised_savings(too_dear, 10.0, 9.0) is None
    assert time_efficiency(0.6, 10.0, 6.0) == pytest.approx(1.0)
    assert time_efficiency(0.6, 10.0, 12.0) == pytest.approx(0.5)
    assert time_efficiency(1.2, 10.0, 12.0) == pytest.approx(1.0)


def test_counts_add_up():
    one, other = Counts(head_calls=2, kv_slots=5), Counts(head_calls=3, gate_passes=1)
    assert one + other == Counts(head_calls=5, kv_slots=5, gate_passes=1)
