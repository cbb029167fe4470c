"""The two meters: layer cost, as experiments 001 and 002 had it, and true cost, every byte read.

Decoding one sequence reads each weight it uses once a step, so bytes bound its time. Bytes are
given in elements here: ratios do not depend on the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from lego.config import Criterion, ModelConfig
from lego.decoding import Counts

# realised savings divide by 1 - true cost: above this the quotient says nothing
MAX_TRUE_COST_FOR_SAVINGS = 0.9


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Elements that one pass over each part reads."""

    embedding_row: int
    lower_layer: int
    upper_layer: int  # without its K/V projection in an exit-state model
    upper_kv: int  # K/V projections of all upper layers
    head: int
    gate: int


def weights(config: ModelConfig) -> Weights:
    """The parts of a model of this shape, norms included."""
    dim, width = config.dim, config.num_heads * config.head_dim
    kv_width = 2 * config.num_kv_heads * config.head_dim
    bias = int(config.qkv_bias)
    kv = (dim + bias) * kv_width
    qk_norms = 2 * config.head_dim * config.qk_norm
    without_kv = (
        (dim + bias) * width + width * dim + 3 * dim * config.hidden_dim + 2 * dim + qk_norms
    )
    exit_state = config.upper_kv == "exit_state"
    return Weights(
        embedding_row=dim,
        lower_layer=without_kv + kv,
        upper_layer=without_kv if exit_state else without_kv + kv,
        upper_kv=config.num_upper_layers * kv + (dim if exit_state else 0),
        head=config.vocab_size * dim + dim,
        gate=dim + 1,
    )


def elements_read(config: ModelConfig, counts: Counts) -> int:
    """Elements that counted calls read: weights once a pass, keys and values once a slot."""
    part = weights(config)
    return (
        part.embedding_row * (counts.lower_layer_calls // config.exit_layer)
        + part.lower_layer * counts.lower_passes
        + part.upper_layer * counts.upper_passes
        + part.upper_kv * counts.upper_kv_passes
        + part.head * counts.head_passes
        + part.gate * counts.gate_passes
        + 2 * config.num_kv_heads * config.head_dim * counts.kv_slots
    )


def layer_cost(config: ModelConfig, shallow_tokens: int, deep_tokens: int) -> float:
    """Layers up to each token's exit over layers at full depth; NaN without tokens."""
    total = shallow_tokens + deep_tokens
    if total == 0:
        return float("nan")
    layers = shallow_tokens * config.exit_layer + deep_tokens * config.num_layers
    return layers / (total * config.num_layers)


def expected_true_cost(config: ModelConfig, shallow_ratio: float, criterion: Criterion) -> float:
    """True cost to expect at a shallow ratio in [0, 1], batch 1, before any context.

    A softmax criterion reads the head for every token, and again for a deep one. The K/V of exited
    tokens are filled in with the next deep token, so their projection is read once a deep token.
    Cache slots, which grow with the context, and the second projection of policy `propagate` are
    left out: elements_read has them, from counted calls.
    """
    part = weights(config)
    lower = part.embedding_row + config.exit_layer * part.lower_layer
    upper = config.num_upper_layers * part.upper_layer
    if config.upper_kv == "exit_state":
        upper += part.upper_kv
    decision = part.gate if criterion == "gate" else part.head
    shallow = lower + decision + (part.head if criterion == "gate" else 0)
    deep = lower + decision + upper + part.head
    return (shallow_ratio * shallow + (1 - shallow_ratio) * deep) / (lower + upper + part.head)


def dense_true_cost(config: ModelConfig, num_layers: int) -> float:
    """True cost of a dense model of num_layers layers against this model at full depth."""
    part = weights(config)
    dense = part.embedding_row + num_layers * part.lower_layer + part.head
    full = part.embedding_row + config.exit_layer * part.lower_layer + part.head
    full += config.num_upper_layers * part.upper_layer
    if config.upper_kv == "exit_state":
        full += part.upper_kv
    return dense / full


def realised_savings(true_cost: float, full_time: float, exit_time: float) -> float | None:
    """Time saved over bytes saved: 1 when every byte saved became time.

    None where true_cost is above 0.9. The times, in any unit, are of the same tokens.
    """
    if true_cost > MAX_TRUE_COST_FOR_SAVINGS:
        return None
    return (full_time - exit_time) / full_time / (1 - true_cost)


def time_efficiency(true_cost: float, full_time: float, exit_time: float) -> float:
    """true_cost * full_time / exit_time: 1 when time follows bytes exactly."""
    return true_cost * full_time / exit_time
