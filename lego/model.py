"""The reference model: a lower block, an upper block, one head, an exit in between.

With upper_kv="exit_state" every upper layer takes its keys and values from the exit state, so they
exist whether or not the token ran the upper block; see docs/early_exit.md.
"""

# Shape letters: B = rows, T = tokens, D = model width, V = vocabulary, L = upper layers,
# K = key/value heads, E = head width.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lego.config import ModelConfig
from lego.kv_cache import Attend, KVCache, attend_within
from lego.layers import Block, RMSNorm, Rotary
from lego.ops.exit_gate import exit_gate

AttendByLayer = Callable[[int], Attend]

# what phase 2 trains, by name; the gate is fitted apart
_UPPER = ("upper.", "final_norm.", "kv_norm.", "upper_kv_proj.")


class TwoExits(NamedTuple):
    """What the parallel forward of both exits yields."""

    exit_state: Tensor  # [B, T, D]
    final_state: Tensor  # [B, T, D]


def _blocks(config: ModelConfig, count: int, *, own_kv: bool) -> Sequence[Block]:
    """A ModuleList, under the type of what it holds."""
    blocks = nn.ModuleList(Block(config, own_kv=own_kv) for _ in range(count))
    return cast("Sequence[Block]", blocks)


class LegoModel(nn.Module):
    """Layers [0, exit_layer) are `lower`, layers [exit_layer, num_layers) are `upper`.

    The head is shared by both exits, each with a norm of its own. A dense model (exit_layer ==
    num_layers) has no upper block: its exit is its end.
    """

    kv_cache_type: type[KVCache] = KVCache  # what the decoders keep keys and values in

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        own_kv = config.upper_kv == "own"
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.rotary = Rotary(config)
        self.lower = _blocks(config, config.exit_layer, own_kv=True)
        self.exit_norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.upper = _blocks(config, config.num_upper_layers, own_kv=own_kv)
        if self.upper:
            self.final_norm = RMSNorm(config.dim, config.norm_eps)
            self.gate = nn.Linear(config.dim, 1)
            if not own_kv:
                self.kv_norm = RMSNorm(config.dim, config.norm_eps)
                # all upper layers at once: [L, 2, K, E] packed, one pass over the weights
                width = config.num_upper_layers * 2 * config.num_kv_heads * config.head_dim
                self.upper_kv_proj = nn.Linear(config.dim, width, bias=config.qkv_bias)
        self._initialise()

    def _initialise(self) -> None:
        # 0.02 at dim 625; at dim 128 the same 0.02 costs a nat after 250,000 tokens
        std = 0.5 * self.config.dim**-0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # residual branches shrink with depth (Radford et al. 2019), so that depth trains
        for block in [*self.lower, *self.upper]:
            for projection in (block.attention.o_proj, block.mlp.down_proj):
                nn.init.normal_(projection.weight, std=std * (2 * self.config.num_layers) ** -0.5)
        if self.upper:
            nn.init.zeros_(self.gate.weight)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def run_lower(self, ids_BT: Tensor, position_BT: Tensor, attend: AttendByLayer) -> Tensor:
        """The exit state [B, T, D] of tokens at the given absolute positions."""
        h_BTD, angles = self.embedding(ids_BT), self.rotary(position_BT)
        for index, block in enumerate(self.lower):
            h_BTD = block(h_BTD, angles, attend(index))
        return h_BTD

    def run_upper(
        self,
        h_BTD: Tensor,
        position_BT: Tensor,
        attend: AttendByLayer,
        *,
        skip: frozenset[int] = frozenset(),
    ) -> Tensor:
        """The final state [B, T, D]; attend(i) serves upper layer i, counted from 0.

        Layers in `skip` are left out: layer dropout while training.
        """
        angles = self.rotary(position_BT)
        for index, block in enumerate(self.upper):
            if index not in skip:
                h_BTD = block(h_BTD, angles, attend(index))
        return h_BTD

    def upper_kv(self, exit_state_BTD: Tensor, position_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, each [B, T, K, E], of every upper layer, from the exit state alone."""
        packed = self.upper_kv_proj(self.kv_norm(exit_state_BTD))
        per_layer = packed.unflatten(
            -1, (len(self.upper), 2, self.config.num_kv_heads, self.config.head_dim)
        ).unbind(2)
        angles = self.rotary(position_BT)
        return [
            (block.attention.rotated_key(kv[:, :, 0], angles), kv[:, :, 1])
            for block, kv in zip(self.upper, per_layer, strict=True)
        ]

    def attend_upper_within(self, exit_state_BTD: Tensor, position_BT: Tensor) -> AttendByLayer:
        """Attention of the upper block over whole sequences, wherever its K/V come from."""
        if self.config.upper_kv == "own":
            return lambda index: attend_within
        per_layer = self.upper_kv(exit_state_BTD, position_BT)
        return lambda index: lambda q, kv: attend_within(q, per_layer[index])

    def forward(self, ids_BT: Tensor) -> TwoExits:
        """Run whole sequences through both blocks in parallel, positions from 0."""
        position_BT = self.positions(ids_BT)
        exit_state = self.run_lower(ids_BT, position_BT, lambda index: attend_within)
        if not self.upper:
            return TwoExits(exit_state, exit_state)
        attend = self.attend_upper_within(exit_state, position_BT)
        return TwoExits(exit_state, self.run_upper(exit_state, position_BT, attend))

    def positions(self, ids_BT: Tensor) -> Tensor:
        """Positions from 0, int64 [1, T]: the same for every row."""
        return torch.arange(ids_BT.size(1), device=ids_BT.device)[None]

    def exit_logits(self, exit_state: Tensor) -> Tensor:
        """Logits [..., V] of the shallow exit."""
        return self.head(self.exit_norm(exit_state))

    def final_logits(self, final_state: Tensor) -> Tensor:
        """Logits [..., V] of the deep exit; a dense model's only exit."""
        return self.head(
            self.final_norm(final_state) if self.upper else self.exit_norm(final_state)
        )

    def gate_score(self, exit_state_ND: Tensor) -> Tensor:
        """The gate's confidence [N] that the shallow token is the deep one; needs no head."""
        score_N, _ = exit_gate(
            exit_state_ND,
            self.gate.weight[0],
            self.gate.bias,
            threshold=0.0,
            norm_weight_D=self.exit_norm.weight,
            eps=self.exit_norm.eps,
        )
        return score_N

    def lower_parameters(self) -> dict[str, nn.Parameter]:
        """Embedding, lower block, exit norm and head: what phase 1 trains and phase 2 freezes."""
        named = self.named_parameters()
        return {name: p for name, p in named if not name.startswith((*_UPPER, "gate."))}

    def upper_parameters(self) -> dict[str, nn.Parameter]:
        """Upper block, final norm and, for exit-state models, the upper K/V projection and norm."""
        return {name: p for name, p in self.named_parameters() if name.startswith(_UPPER)}
