"""The layers of the reference model: attention, MLP, and the block that joins them."""

# Shape letters: B = rows, T = tokens, D = model width, H = query heads, K = key/value heads,
# E = head width.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lego.config import ModelConfig
from lego.kv_cache import Attend
from lego.ops.rms_norm import rms_norm
from lego.ops.rotary import rotary, rotary_tables
from lego.ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """lego.ops.rms_norm with a learned weight of `dim` values."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


# cos and sin of the tokens at hand, [B, T, E / 2] each, or [1, T, E / 2] for all rows alike
Angles = tuple[Tensor, Tensor]


class Rotary(nn.Module):
    """Angles by absolute position; the tables are buffers that no checkpoint stores."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        cos, sin = rotary_tables(
            config.head_dim,
            config.max_seq_len,
            config.rope_theta,
            factor=config.rope_factor,
            band=config.rope_band,
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Move the tables with the model, but leave them float32 in a 16-bit one.

        In bfloat16 the angles of one token are off by up to 2^-9, whatever its position.
        """
        tables = {"cos": self.cos, "sin": self.sin}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self

    def forward(self, position_BT: Tensor) -> Angles:
        """Positions are in [0, max_seq_len); one at or past its end is an IndexError."""
        return self.cos[position_BT], self.sin[position_BT]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Weights are packed, queries first, then keys, then values: the decode step reads them in one
    pass. A layer with own_kv=False projects queries alone, and is given its keys and values.
    """

    def __init__(self, config: ModelConfig, *, own_kv: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.own_kv, self.qk_norm = config.head_dim, own_kv, config.qk_norm
        num_projected = config.num_heads + (2 * config.num_kv_heads if own_kv else 0)
        self.in_proj = nn.Linear(config.dim, num_projected * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        heads = self.in_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if not self.own_kv:
            q = rotary(self.q_norm(heads) if self.qk_norm else heads, *angles)
            return self.o_proj(attend(q, None).flatten(2))
        qk, v = heads.split((heads.size(2) - self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.qk_norm:
            normed = (
                self.q_norm(qk[:, :, : self.num_heads]),
                self.k_norm(qk[:, :, self.num_heads :]),
            )
            qk = torch.cat(normed, dim=2)
        q, k = rotary(qk, *angles).split((self.num_heads, self.num_kv_heads), dim=2)
        return self.o_proj(attend(q, (k, v)).flatten(2))

    def project_kv(self, x_BTD: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """The keys and values of x alone, each [B, T, K, E]; only for own_kv layers."""
        start = self.num_heads * self.head_dim
        bias = None if self.in_proj.bias is None else self.in_proj.bias[start:]
        packed = nn.functional.linear(x_BTD, self.in_proj.weight[start:], bias)
        k, v = packed.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        return self.rotated_key(k, angles), v

    def rotated_key(self, k_BTKE: Tensor, angles: Angles) -> Tensor:
        """A projected key as the cache holds it."""
        return rotary(self.k_norm(k_BTKE) if self.qk_norm else k_BTKE, *angles)


class MLP(nn.Module):
    """SwiGLU MLP; gate and up are packed, gate first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, *, own_kv: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, own_kv=own_kv)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, h_BTD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), angles, attend)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))
