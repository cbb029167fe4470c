"""Random layers for decode_layers, and the registered ops that it must agree with, one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lego_kernels.decoder.decode_layers import FIELDS, decode_layers
from lego_kernels.decoder.weights import LayerWeights
from lego_kernels.ops.decode_attention import decode_attention
from lego_kernels.ops.linear_small import MAX_ROWS, linear_small
from lego_kernels.ops.rms_norm import rms_norm
from lego_kernels.ops.rope_kv_append import rope_kv_append
from lego_kernels.ops.swiglu import swiglu

EPS = 1e-5
NUM_SOURCES = 30
GUARD = 64  # values behind the workspace that nobody may touch


@dataclass(frozen=True, kw_only=True)
class Shape:
    D: int = 48  # width
    H: int = 4  # query heads
    K: int = 2  # key/value heads
    E: int = 10  # head width
    F: int = 37  # hidden width
    L: int = 3  # layers
    B: int = 3  # rows
    S: int = 40  # slots, and positions of the states
    P: int = 50  # positions of the tables
    own_kv: bool = True
    qk_norm: bool = False
    kv_only: bool = False  # num_heads=0: K and V of the sources alone

    @property
    def widths(self) -> tuple[int, int]:
        """Values of a token's queries, and of its keys and values."""
        return 0 if self.kv_only else self.H * self.E, 2 * self.K * self.E * self.own_kv


SHAPES = {
    "gqa": Shape(),
    "smallest": Shape(D=1, H=1, K=1, E=2, F=1, L=1),
    "qk_norm": Shape(qk_norm=True, K=4, L=2),
    "one layer": Shape(D=65, E=64, F=130, L=1, K=1),
    "queries alone": Shape(own_kv=False),
    "queries alone, qk_norm": Shape(own_kv=False, qk_norm=True),
    "keys and values alone": Shape(kv_only=True),
    "keys and values alone, qk_norm": Shape(kv_only=True, qk_norm=True),
}


@dataclass
class Case:
    """Layers, caches that hold numbers everywhere, and what the op writes."""

    shape: Shape
    dtype: torch.dtype
    layers: list[LayerWeights] = field(init=False)

    def __post_init__(self) -> None:
        s, self._generator = self.shape, torch.Generator().manual_seed(0)
        self.layers = [self._layer() for _ in range(s.L)]
        self.source = self._random(NUM_SOURCES, s.D)
        self.k_cache, self.v_cache = (self._random(s.L, s.B, s.S, s.K, s.E) for _ in "kv")
        angle = 3 * torch.randn(s.P, s.E // 2, generator=self._generator)
        self.cos, self.sin = angle.cos(), angle.sin()
        rows = [[0 if x is None else x.data_ptr() for x in self._fields(y)] for y in self.layers]
        self.table = torch.tensor(rows, dtype=torch.int64).view(s.L, len(FIELDS))
        self.states: Tensor | None = self._random(s.B, s.S, s.D)

    def _fields(self, layer: LayerWeights) -> list[Tensor | None]:
        return [getattr(layer, name) for name in FIELDS]

    def _random(self, *shape: int, gain: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return (gain * values).to(self.dtype)

    def _layer(self) -> LayerWeights:
        s = self.shape
        q, kv = s.widths
        norm = 1 + 0.3 * self._random(s.E) if s.qk_norm else None
        return LayerWeights(
            attention_norm=1 + 0.3 * self._random(s.D),
            in_proj=self._random(q + kv, s.D, gain=1.5 * s.D**-0.5),
            q_norm=norm,
            k_norm=None if norm is None else norm.flip(0).contiguous(),
            o_proj=self._random(s.D, s.H * s.E, gain=(s.H * s.E) ** -0.5),
            mlp_norm=1 + 0.3 * self._random(s.D),
            gate_up=self._random(2 * s.F, s.D, gain=1.5 * s.D**-0.5),
            down=self._random(s.D, s.F, gain=s.F**-0.5),
        )

    def written(self) -> list[Tensor]:
        """All that the op may write to."""
        return [self.k_cache, self.v_cache] + ([] if self.states is None else [self.states])

    def run(self, tokens: Tensor, *, h: Tensor | None = None) -> Tensor:
        """decode_layers on one chunk: the states, and a workspace with nothing to spare."""
        s, N = self.shape, len(tokens)
        if h is None:
            h = torch.full((N, s.D), torch.nan, dtype=self.dtype)
        per_token = 2 * s.D + max((s.H + 2 * s.K) * s.E, 2 * s.F) + max(s.F, s.H * s.E)
        workspace = torch.full((N * per_token + GUARD,), torch.nan, dtype=self.dtype)
        workspace[N * per_token :] = 7
        decode_layers(
            self.table,
            tokens,
            self.source,
            h,
            self.states,
            self.k_cache,
            self.v_cache,
            self.cos,
            self.sin,
            0 if s.kv_only else s.H,
            s.own_kv,
            s.F,
            EPS,
            workspace,
        )
        assert torch.all(workspace[N * per_token :] == 7)
        return h

    def composed(self, tokens: Tensor) -> Tensor:
        """The same by the registered ops, for at most 16 tokens."""
        assert len(tokens) <= MAX_ROWS
        h, pending = self.source[tokens[:, 0]].clone(), None
        for index, layer in enumerate(self.layers):
            residual = None if pending is None else h
            x = h if pending is None else pending
            normed = rms_norm(x, layer.attention_norm, eps=EPS, residual=residual)
            wide = linear_small(normed, layer.in_proj)
            if self.shape.kv_only:
                self._rotate_and_append(wide, tokens, index)
                continue
            pending = self._attend_and_mlp(wide, tokens, index, h)
        if pending is not None:
            h += pending
        if self.states is not None:
            self.states[tokens[:, 1], tokens[:, 2]] = h
        return h

    def _attend_and_mlp(self, wide: Tensor, tokens: Tensor, index: int, h: Tensor) -> Tensor:
        layer = self.layers[index]
        q = self._rotate_and_append(wide, tokens, index)
        attended = torch.stack([self._attend(*both, index) for both in zip(q, tokens, strict=True)])
        o = linear_small(attended.flatten(1), layer.o_proj)
        normed = rms_norm(o, layer.mlp_norm, eps=EPS, residual=h)
        return linear_small(swiglu(linear_small(normed, layer.gate_up)), layer.down)

    def _rotate_and_append(self, wide: Tensor, tokens: Tensor, index: int) -> Tensor:
        """Rotated queries [N, H, E]; what a layer does not make goes to caches of no use."""
        s, layer = self.shape, self.layers[index]
        q_width, kv_width = s.widths
        # zeros for the queries or for the keys and values that are not there
        packed = F.pad(wide, (s.H * s.E - q_width, 2 * s.K * s.E - kv_width))
        q = wide.new_empty(len(wide), 1, 1, s.H, s.E)
        for n, (_, row, position, slot) in enumerate(tokens):
            one = slice(int(row), int(row) + 1)
            caches = [self.k_cache[index, one], self.v_cache[index, one]]
            if not s.own_kv:
                caches = [cache.clone() for cache in caches]
            rope_kv_append(
                q[n],
                *caches,
                packed[n][None, None],
                self.cos,
                self.sin,
                position[None],
                slot[None],
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=EPS,
            )
        return q[:, 0, 0]

    def _attend(self, q: Tensor, token: Tensor, index: int) -> Tensor:
        """Attention of one token [H, E] to the slots up to its own."""
        row, slot = int(token[1]), token[3:]
        caches = self.k_cache[index, row : row + 1], self.v_cache[index, row : row + 1]
        # as a C program computes it: in float32
        scale = float(1 / torch.tensor(float(self.shape.E)).sqrt())
        return decode_attention(q[None, None], *caches, slot + 1, scale=scale)[0, 0]


def chunk(*tokens: tuple[int, int], seed: int = 0) -> Tensor:
    """Tokens (row, slot) from random sources, at a position beside the slot."""
    source = torch.randint(
        NUM_SOURCES, (len(tokens),), generator=torch.Generator().manual_seed(seed)
    )
    rows = [
        [int(at), row, (slot + 1) % 40, slot]
        for at, (row, slot) in zip(source, tokens, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)
