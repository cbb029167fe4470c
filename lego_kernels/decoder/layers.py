"""The two blocks of a decoder over caches of its own, each one native call, however many layers.

Shape letters: L layers, B rows, S slots, D width, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lego_kernels.decoder.decode_layers import FIELDS, decode_layers
from lego_kernels.decoder.weights import DecoderWeights


class NativeLayers:
    """Runs the tokens that `tokens` names, a chunk at a time; on the CPU.

    tokens: int64 [max_tokens, 4], as numpy: source, row, position, slot of each token in the chunk.
    h: [max_tokens, D], the states of the chunk's tokens after a call.
    states: [B, S, D], the exit state of every token so far by row and position; rows of it, counted
    through, are the sources of upper and upper_kv.
    """

    def __init__(
        self, weights: DecoderWeights, num_rows: int, num_slots: int, max_tokens: int
    ) -> None:
        self.weights = weights
        like, D = weights.embedding, weights.dim
        self._tokens = torch.zeros(max_tokens, 4, dtype=torch.int64)
        self.tokens = self._tokens.numpy()
        self.h = like.new_empty(max_tokens, D)
        self.states = like.new_zeros(num_rows, num_slots, D)
        self._all_states = self.states.view(num_rows * num_slots, D)
        shape = (num_rows, num_slots, weights.num_kv_heads, weights.head_dim)
        self._lower_caches = [like.new_zeros(len(weights.lower), *shape) for _ in "kv"]
        self._upper_caches = [like.new_zeros(len(weights.upper), *shape) for _ in "kv"]
        self._lower_table = _table(map(vars, weights.lower))
        self._upper_table = _table(map(vars, weights.upper))
        # views of tensors that the weights hold
        self._upper_kv_table = _table(
            {"attention_norm": norm, "in_proj": rows, "in_bias": bias, "k_norm": k_norm}
            for norm, rows, bias, k_norm in weights.upper_kv_layers()
        )
        self._workspace = like.new_empty(max_tokens * _workspace_width(weights))
        self._shared = (weights.cos, weights.sin)
        self._chunks: dict[int, tuple[Tensor, Tensor]] = {}

    def chunk(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first rows of `tokens` and of h; views made once for each number of tokens."""
        if num_tokens not in self._chunks:
            self._chunks[num_tokens] = (self._tokens[:num_tokens], self.h[:num_tokens])
        return self._chunks[num_tokens]

    def lower(self, num_tokens: int) -> None:
        """Layers of the lower block; sources are token ids."""
        tokens, h = self.chunk(num_tokens)
        w = self.weights
        decode_layers(
            self._lower_table,
            tokens,
            w.embedding,
            h,
            self.states,
            *self._lower_caches,
            *self._shared,
            w.num_heads,
            True,
            w.hidden_dim,
            w.eps,
            self._workspace,
        )

    def upper(self, num_tokens: int) -> None:
        """Layers of the upper block; sources are rows of `states`."""
        own_kv = self.weights.upper_kv is None
        self._from_states(self._upper_table, num_tokens, self.weights.num_heads, own_kv)

    def upper_kv(self, num_tokens: int) -> None:
        """K and V of every upper layer from exit states, appended; no layer is run."""
        self._from_states(self._upper_kv_table, num_tokens, 0, True)

    def _from_states(self, table: Tensor, num_tokens: int, num_heads: int, own_kv: bool) -> None:
        tokens, h = self.chunk(num_tokens)
        decode_layers(
            table,
            tokens,
            self._all_states,
            h,
            None,
            *self._upper_caches,
            *self._shared,
            num_heads,
            own_kv,
            self.weights.hidden_dim,
            self.weights.eps,
            self._workspace,
        )


def _table(layers: Iterable[Mapping[str, Tensor | None]]) -> Tensor:
    """Addresses, int64 [L, number of FIELDS]."""
    rows = [[_address(layer.get(name)) for name in FIELDS] for layer in layers]
    return torch.tensor(rows, dtype=torch.int64)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _workspace_width(weights: DecoderWeights) -> int:
    """Values of a token in the buffers of decode_layers: normed, wide, inner and out."""
    H, K, E = weights.num_heads, weights.num_kv_heads, weights.head_dim
    D, F = weights.dim, weights.hidden_dim
    return D + max((H + 2 * K) * E, 2 * F) + max(F, H * E) + D
