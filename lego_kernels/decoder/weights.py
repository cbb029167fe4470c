"""The weights of a Llama-shaped model with an exit, as the decoder reads them.

Packed tensors are used where they lie. Shape letters: D width, F hidden, V vocabulary, P positions,
H query heads, K key/value heads, E head width, U upper layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lego_kernels.validation import check_dtype, check_tensor


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer. in_proj packs queries, then keys, then values, as many as the layer makes."""

    attention_norm: Tensor  # [D]
    in_proj: Tensor  # [(H + 2 K) * E, D]; [H * E, D] where K and V come from the exit state
    in_bias: Tensor | None = None
    q_norm: Tensor | None = None  # [E]
    k_norm: Tensor | None = None  # [E]
    o_proj: Tensor  # [D, H * E]
    mlp_norm: Tensor  # [D]
    gate_up: Tensor  # [2 F, D], gate first
    down: Tensor  # [D, F]

    def __post_init__(self) -> None:
        _make_contiguous(self)


@dataclass(frozen=True, kw_only=True)
class UpperKV:
    """Keys and values of all upper layers from the exit state: packed [U, 2, K, E] by rows."""

    norm: Tensor  # [D]
    proj: Tensor  # [U * 2 * K * E, D]
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        _make_contiguous(self)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The probe before the head: sigmoid(exit_norm(h) . weight + bias)."""

    weight: Tensor  # [D]
    bias: Tensor  # one value

    def __post_init__(self) -> None:
        _make_contiguous(self)


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """Everything a decode step reads: dtype float32, bfloat16 or float16, all of one device.

    upper_kv is None where upper layers make their own K and V. vocab_size is at most the rows of
    head and embedding. cos and sin are float32 tables by absolute position, half-rotation layout.
    A dense model has no upper layers, and exit_norm is its last norm; final_norm is unused there.
    Tensors that are not contiguous are copied, others used as they are: what changes in them
    changes here. Raises: ValueError if a shape, dtype or device does not fit the others.
    """

    embedding: Tensor  # [V, D]
    lower: tuple[LayerWeights, ...]
    upper: tuple[LayerWeights, ...]
    upper_kv: UpperKV | None = None
    exit_norm: Tensor  # [D]
    final_norm: Tensor | None = None  # [D]
    head: Tensor  # [V, D]
    gate: Gate | None = None
    cos: Tensor  # [P, E / 2]
    sin: Tensor  # [P, E / 2]
    num_heads: int
    num_kv_heads: int
    eps: float
    vocab_size: int

    def __post_init__(self) -> None:
        _make_contiguous(self)
        _check(self)

    @property
    def dim(self) -> int:
        return self.embedding.size(1)

    @property
    def head_dim(self) -> int:
        return 2 * self.cos.size(1)

    @property
    def hidden_dim(self) -> int:
        return self.lower[0].down.size(1)

    @property
    def num_layers(self) -> int:
        return len(self.lower) + len(self.upper)

    @property
    def last_norm(self) -> Tensor:
        """The norm before the head at full depth."""
        return self.exit_norm if self.final_norm is None else self.final_norm

    def upper_kv_layers(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """(norm, K/V rows, their bias, k_norm) of each upper layer, for K/V from exit states.

        Rows of UpperKV, or of the layers' own in_proj under their own norms.
        """
        width = 2 * self.num_kv_heads * self.head_dim
        for index, layer in enumerate(self.upper):
            if self.upper_kv is None:
                norm, proj, bias = layer.attention_norm, layer.in_proj, layer.in_bias
                rows = slice(self.num_heads * self.head_dim, None)
            else:
                norm, proj, bias = self.upper_kv.norm, self.upper_kv.proj, self.upper_kv.bias
                rows = slice(index * width, (index + 1) * width)
            yield norm, proj[rows], None if bias is None else bias[rows], layer.k_norm


def _make_contiguous(part: Any) -> None:
    """Of a dataclass that is being made."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            object.__setattr__(part, field.name, value.detach().contiguous())


def _check(weights: DecoderWeights) -> None:
    op, like = "DecoderWeights", weights.embedding
    check_dtype(op, "embedding", like)
    if not weights.lower:
        raise ValueError(f"{op}: lower must hold at least one layer, got none")
    # those whose sizes the others must fit
    leading = {"embedding": like, "head": weights.head, "cos": weights.cos}
    leading["layer 0 down"] = weights.lower[0].down
    for name, matrix in leading.items():
        if matrix.dim() != 2:
            raise ValueError(f"{op}: {name} must have 2 dimensions, got {tuple(matrix.shape)}")
    if not 1 <= weights.vocab_size <= min(like.size(0), weights.head.size(0)):
        raise ValueError(
            f"{op}: vocab_size must be in [1, rows of embedding and head], "
            f"got {weights.vocab_size} for {tuple(like.shape)} and {tuple(weights.head.shape)}"
        )
    for name in ("dim", "hidden_dim", "head_dim"):
        if getattr(weights, name) < 1:
            raise ValueError(f"{op}: {name} must be >= 1, got {getattr(weights, name)}")
    H, K = weights.num_heads, weights.num_kv_heads
    if not (H >= 1 and K >= 1 and H % K == 0):
        raise ValueError(f"{op}: num_heads must be a multiple of num_kv_heads, got {H} and {K}")
    if not weights.eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0, got {weights.eps}")
    if (not weights.upper) != (weights.final_norm is None):
        raise ValueError(
            f"{op}: final_norm must come with upper layers, got {len(weights.upper)} of them"
        )
    for name, x, shape in (*_shared_shapes(weights), *_layer_shapes(weights)):
        if x is not None:
            check_tensor(op, name, x, shape, like=like)
    for name, x in (("cos", weights.cos), ("sin", weights.sin)):
        check_tensor(op, name, x, tuple(weights.cos.shape), like=like, dtype=torch.float32)


_Shapes = Iterator[tuple[str, Tensor | None, tuple[int, ...]]]


def _shared_shapes(weights: DecoderWeights) -> _Shapes:
    """What is not of one layer: name, tensor and the shape that it must have."""
    D, width = weights.dim, 2 * weights.num_kv_heads * weights.head_dim * len(weights.upper)
    yield "head", weights.head, (weights.head.size(0), D)
    yield "exit_norm", weights.exit_norm, (D,)
    yield "final_norm", weights.final_norm, (D,)
    if weights.upper_kv is not None:
        yield "upper_kv.norm", weights.upper_kv.norm, (D,)
        yield "upper_kv.proj", weights.upper_kv.proj, (width, D)
        yield "upper_kv.bias", weights.upper_kv.bias, (width,)
    if weights.gate is not None:
        yield "gate.weight", weights.gate.weight, (D,)
        yield "gate.bias", weights.gate.bias, (1,)


def _layer_shapes(weights: DecoderWeights) -> _Shapes:
    H, K, E = weights.num_heads, weights.num_kv_heads, weights.head_dim
    D, F = weights.dim, weights.hidden_dim
    for index, layer in enumerate((*weights.lower, *weights.upper)):
        own_kv = index < len(weights.lower) or weights.upper_kv is None
        width = (H + 2 * K * own_kv) * E
        shapes = {
            "attention_norm": (D,),
            "in_proj": (width, D),
            "in_bias": (width,),
            "q_norm": (E,),
            "k_norm": (E,),
            "o_proj": (D, H * E),
            "mlp_norm": (D,),
            "gate_up": (2 * F, D),
            "down": (D, F),
        }
        for name, shape in shapes.items():
            yield f"layer {index} {name}", getattr(layer, name), shape
