"""The layers of the reference model: attention, MLP, and the block that joins them."""

# Shape letters: B = rows, T = tokens, D = model width, H = query heads, K = key/value heads,
# E = head width.

from __future__ import annotations

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


class Rotary(nn.Module):
    """Rotation by absolute position; the tables are buffers that no checkpoint stores."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        cos, sin = rotary_tables(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x_BTHE: Tensor, position_BT: Tensor) -> Tensor:
        return rotary(x_BTHE, position_BT, self.cos, self.sin)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Weights are packed, queries first, then keys, then values: the decode step reads them in one
    pass. A layer with own_kv=False projects queries alone, and is given its keys and values.
    """

    def __init__(self, config: ModelConfig, *, own_kv: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.own_kv = config.head_dim, own_kv
        num_projected = config.num_heads + (2 * config.num_kv_heads if own_kv else 0)
        self.in_proj = nn.Linear(config.dim, num_projected * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm: nn.Module = RMSNorm(config.head_dim, config.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x_BTD: Tensor, rotate: Rotary, position_BT: Tensor, attend: Attend) -> Tensor:
        heads = self.in_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        q = rotate(self.q_norm(heads[:, :, : self.num_heads]), position_BT)
        kv = None
        if self.own_kv:
            k, v = heads[:, :, self.num_heads :].chunk(2, dim=2)
            kv = rotate(self.k_norm(k), position_BT), v
        return self.o_proj(attend(q, kv).flatten(2))

    def project_kv(
        self, x_BTD: Tensor, rotate: Rotary, position_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of x alone, each [B, T, K, E]; only for own_kv layers."""
        start = self.num_heads * self.head_dim
        bias = None if self.in_proj.bias is None else self.in_proj.bias[start:]
        packed = nn.functional.linear(x_BTD, self.in_proj.weight[start:], bias)
        k, v = packed.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        return rotate(self.k_norm(k), position_BT), v


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

    def forward(self, h_BTD: Tensor, rotate: Rotary, position_BT: Tensor, attend: Attend) -> Tensor:
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), rotate, position_BT, attend)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))
