"""What a decoder on the CPU holds: caches, buffers, and the table through which C++ finds them.

Shape letters: L layers, B rows, S slots, C tokens of a chunk, D width, V vocabulary, K key/value
heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lego_kernels.decoder.checks import Criterion, KVPolicy
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.decode_layers import FIELDS
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights
from lego_kernels.exit_tiles import TILE
from lego_kernels.ops.exit_decision import exit_decision_workspace
from lego_kernels.validation import DTYPES

# tokens that share a pass over the weights in a prompt: more gain nothing, and take more workspace
CHUNK_TOKENS = 128

# a value of the table: a number, a tensor or array for its address, None for none
_Entry = int | float | Tensor | NDArray[np.generic] | None


class DecoderState:
    """Sequences over one set of caches.

    table: int64, one value a field of DecoderState in csrc/cpu/decoder.h; what the ops take.
    position, last, upper_len: numpy int64 [B]: each row's next input's position, that input, and
    the slots filled in the upper caches. threshold: numpy float32 [B].
    states: [B, S, D], the exit state of every token so far.
    new_tokens: numpy int64 [B or B * draft_tokens, 4]: row, token and exit layer of each new token;
    its confidence is in new_confidence[:, 3], the same memory as float64.
    names, entries: what the table was made from, and points to.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        num_slots: int,
        *,
        criterion: Criterion | None,
        policy: KVPolicy,
        sampling: Sampling,
        draft_tokens: int = 0,
    ) -> None:
        self.max_chunk = max(CHUNK_TOKENS, num_rows)
        self.states = weights.embedding.new_zeros(num_rows, num_slots, weights.dim)
        self.last, self.position, self.upper_len = (np.zeros(num_rows, np.int64) for _ in range(3))
        self.threshold = np.full(num_rows, math.inf, np.float32)
        self.new_tokens = np.zeros((num_rows * max(1, draft_tokens), 4), np.int64)
        self.new_confidence = self.new_tokens.view(np.float64)
        self._counts = np.zeros(len(fields(Counts)), np.int64)
        self._weights = weights  # the layer tables point to it
        self.table = self._table(
            self._sizes(weights, num_rows, num_slots)
            | _options(weights, criterion, policy, sampling, draft_tokens)
            | _addresses(weights)
            | self._caches(weights, num_rows, num_slots)
            | self._rows(num_rows, sampling)
            | self._chunk(weights, sampling)
            | {
                "rows": np.zeros(num_rows, np.int64),
                "stops": np.zeros(num_rows, np.int64),
                "filled": np.zeros(num_rows, np.int64),
                "drafts": np.zeros((num_rows * draft_tokens, 4), np.int64),
                "new_tokens": self.new_tokens,
                "counts": self._counts,
            }
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("DecoderState: must not be copied, since it holds addresses")

    @property
    def counts(self) -> Counts:
        """Calls so far."""
        return Counts(*self._counts.tolist())

    def _sizes(self, weights: DecoderWeights, num_rows: int, num_slots: int) -> dict[str, _Entry]:
        return {
            "dtype": DTYPES.index(weights.embedding.dtype),
            "num_rows": num_rows,
            "num_slots": num_slots,
            "max_chunk": self.max_chunk,
            "dim": weights.dim,
            "num_heads": weights.num_heads,
            "num_kv_heads": weights.num_kv_heads,
            "head_dim": weights.head_dim,
            "hidden_dim": weights.hidden_dim,
            "vocab_size": weights.vocab_size,
            "num_lower": len(weights.lower),
            "num_upper": len(weights.upper),
            "upper_own_kv": int(weights.upper_kv is None),
            "eps": float(weights.eps),
        }

    def _caches(self, weights: DecoderWeights, num_rows: int, num_slots: int) -> dict[str, _Entry]:
        shape = (num_rows, num_slots, weights.num_kv_heads, weights.head_dim)
        zeros = weights.embedding.new_zeros
        return {
            "states": self.states,
            "lower_k": zeros(len(weights.lower), *shape),
            "lower_v": zeros(len(weights.lower), *shape),
            "upper_k": zeros(len(weights.upper), *shape),
            "upper_v": zeros(len(weights.upper), *shape),
        }

    def _rows(self, num_rows: int, sampling: Sampling) -> dict[str, _Entry]:
        return {
            "last": self.last,
            "position": self.position,
            "upper_len": self.upper_len,
            "row_threshold": self.threshold,
            "row_confidence": np.zeros(num_rows, np.float32),
            "row_seed": np.array([sampling.row_seed(row) for row in range(num_rows)], np.int64),
            "temperature": np.full(1, sampling.noise_scale, np.float32),
        }

    def _chunk(self, weights: DecoderWeights, sampling: Sampling) -> dict[str, _Entry]:
        C, like = self.max_chunk, weights.embedding
        h = like.new_empty(C, weights.dim)
        padded = -(-weights.vocab_size // TILE) * TILE
        return {
            "tokens": np.zeros((C, 4), np.int64),
            "h": h,
            "workspace": like.new_empty(C * workspace_width(weights)),
            "exit_workspace": exit_decision_workspace(h, weights.head),
            "logits": torch.empty(C, padded, dtype=torch.float32) if sampling.filters else None,
            "threshold": np.zeros(C, np.float32),
            "seed": np.zeros(C, np.int64),
            "offset": np.zeros(C, np.int64),
            "token": np.zeros(C, np.int64),
            "confidence": np.zeros(C, np.float32),
            "lse": np.zeros(C, np.float32),
            "exit": np.zeros(C, np.bool_),
        }

    def _table(self, entries: Mapping[str, _Entry]) -> Tensor:
        table = np.zeros(len(entries), np.int64)
        for index, entry in enumerate(entries.values()):
            if isinstance(entry, float):
                table.view(np.float64)[index] = entry
            else:
                table[index] = entry if isinstance(entry, int) else _address(entry)
        self.names, self.entries = list(entries), list(entries.values())
        return torch.from_numpy(table)


def _options(
    weights: DecoderWeights,
    criterion: Criterion | None,
    policy: KVPolicy,
    sampling: Sampling,
    draft_tokens: int,
) -> dict[str, _Entry]:
    return {
        "criterion": (*get_args(Criterion), None).index(criterion),
        "policy": get_args(KVPolicy).index(policy),
        "draws": int(sampling.draws),
        "top_k": min(sampling.top_k, weights.vocab_size),
        "top_p": float(sampling.top_p),
        "top_p_temperature": float(sampling.temperature),
        "draft_tokens": draft_tokens,
    }


def _addresses(weights: DecoderWeights) -> dict[str, _Entry]:
    gate: dict[str, Tensor] = vars(weights.gate) if weights.gate else {}
    return {
        "embedding": weights.embedding,
        "exit_norm": weights.exit_norm,
        "last_norm": weights.last_norm,
        "head": weights.head,
        "gate_weight": gate.get("weight"),
        "gate_bias": gate.get("bias"),
        "lower": layer_table(map(vars, weights.lower)),
        "upper": layer_table(map(vars, weights.upper)),
        "upper_kv": layer_table(
            {"attention_norm": norm, "in_proj": rows, "in_bias": bias, "k_norm": k_norm}
            for norm, rows, bias, k_norm in weights.upper_kv_layers()
        ),
        "cos": weights.cos,
        "sin": weights.sin,
    }


def layer_table(layers: Iterable[Mapping[str, Tensor | None]]) -> Tensor:
    """Addresses, int64 [L, number of FIELDS]."""
    rows = [[_address(layer.get(name)) for name in FIELDS] for layer in layers]
    return torch.tensor(rows, dtype=torch.int64)


def _address(x: Tensor | NDArray[np.generic] | None) -> int:
    if x is None:
        return 0
    return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data


def workspace_width(weights: DecoderWeights) -> int:
    """Values of a token in the buffers of decode_layers: normed, wide, inner and out."""
    H, K, E = weights.num_heads, weights.num_kv_heads, weights.head_dim
    D, F = weights.dim, weights.hidden_dim
    return D + max((H + 2 * K) * E, 2 * F) + max(F, H * E) + D
