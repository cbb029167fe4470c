"""Decoding a token at a time: the lower block, the exit decision, the upper block for what stays.

A token that exits owes the upper caches its keys and values. They are filled in when the next deep
token of its row comes, all that are owed in one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.exits import Exits
from lego_kernels.decoder.layers import NativeLayers
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights

Criterion = Literal["max_prob", "margin", "entropy", "gate"]
KVPolicy = Literal["exact", "hole", "propagate", "recompute"]

# tokens that share a pass over the weights in a prompt: more gain nothing, and take more workspace
CHUNK_TOKENS = 128

# a chunk, as NativeLayers.tokens: a row of (source, row, position, slot) for each token
Chunk = NDArray[np.int64]


class NewToken(NamedTuple):
    """One new token, the layers it ran, and the criterion's value (NaN without a decision)."""

    row: int
    token: int
    exit_layer: int
    confidence: float


class Rows:
    """Sequences over one set of caches: where each is, and the calls that take it on."""

    def __init__(
        self, weights: DecoderWeights, sampling: Sampling, num_rows: int, num_slots: int
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"Decoder: num_rows must be >= 1, got {num_rows}")
        if not 1 <= num_slots <= weights.cos.size(0):
            raise ValueError(
                f"Decoder: num_slots must be in [1, {weights.cos.size(0)}], got {num_slots}"
            )
        self.weights = weights
        self.counts = Counts()
        self.num_slots = num_slots
        self.max_chunk = max(CHUNK_TOKENS, num_rows)
        self.layers = NativeLayers(weights, num_rows, num_slots, self.max_chunk)
        self.exits = Exits(weights, sampling, self.max_chunk)
        self.live = list(range(num_rows))
        self.position = [0] * num_rows  # of the next input
        self.upper_len = [0] * num_rows  # slots filled in the upper caches
        self.last = [0] * num_rows  # the next input

    def finish(self, rows: Sequence[int]) -> None:
        """These rows produce no more; the others are not affected."""
        gone = set(rows)
        self.live = [row for row in self.live if row not in gone]

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Take a prompt for each row, int64 [T] with T >= 1, and run all but its last token.

        Where upper layers make their own K and V, the prompt runs them too.
        Raises: ValueError, before anything runs, if a prompt is empty, does not fit num_slots or
            holds an id out of [0, vocab_size).
        """
        self._check_prompts(prompts)
        own_kv = bool(self.weights.upper) and self.weights.upper_kv is None
        for row, prompt in enumerate(prompts):
            ids, stop = prompt.numpy(), len(prompt) - 1
            for start in range(0, stop, self.max_chunk):
                chunk = self._span(row, start, min(start + self.max_chunk, stop))
                states = chunk[:, 0].copy()
                chunk[:, 0] = ids[start : start + len(chunk)]
                self.run_lower(chunk)
                if own_kv:
                    chunk[:, 0] = states
                    self.run_upper(chunk)
            self.position[row], self.last[row] = stop, int(ids[stop])
            self.upper_len[row] = stop if own_kv else 0

    def _check_prompts(self, prompts: Sequence[Tensor]) -> None:
        if len(prompts) != len(self.position):
            raise ValueError(
                f"Decoder: prompts must be {len(self.position)}, one for each row, "
                f"got {len(prompts)}"
            )
        for row, ids in enumerate(prompts):
            if ids.dim() != 1 or not 1 <= len(ids) <= self.num_slots:
                raise ValueError(
                    f"Decoder: prompt {row} must be [T] with T in [1, num_slots={self.num_slots}], "
                    f"got {tuple(ids.shape)}"
                )
            low, high = (int(value) for value in ids.aminmax())
            if low < 0 or high >= self.weights.vocab_size:
                raise ValueError(
                    f"Decoder: prompt {row} must hold ids in [0, {self.weights.vocab_size}), "
                    f"got {low if low < 0 else high}"
                )

    def check_room(self) -> None:
        for row in self.live:
            if self.position[row] >= self.num_slots:
                raise ValueError(
                    f"Decoder: row {row} must hold less than num_slots={self.num_slots} tokens, "
                    f"got {self.position[row]}"
                )

    def _span(self, row: int, start: int, stop: int) -> Chunk:
        """Positions [start, stop) of a row, sources among the exit states."""
        positions = np.arange(start, stop)
        chunk = np.empty((len(positions), 4), dtype=np.int64)
        chunk[:, 0] = positions + row * self.num_slots
        chunk[:, 1] = row
        chunk[:, 2] = chunk[:, 3] = positions
        return chunk

    def owed(self, rows: Sequence[int], stops: Sequence[int]) -> Chunk:
        """Exit states without upper K and V, of each row up to its position in `stops`."""
        spans = list(map(self._span, rows, [self.upper_len[row] for row in rows], stops))
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    def run_lower(self, chunk: Chunk | list[tuple[int, int, int, int]]) -> None:
        """Run the lower block on at most max_chunk tokens; their sources are token ids."""
        self._put(chunk)
        num_layers, counts = len(self.weights.lower), self.counts
        self.layers.lower(len(chunk))
        counts.lower_layer_calls += num_layers * len(chunk)
        counts.lower_passes += num_layers
        counts.kv_slots += num_layers * self._slots_read(chunk)

    def run_upper(self, chunk: Chunk | list[tuple[int, int, int, int]]) -> None:
        """Run the upper block on at most max_chunk exit states."""
        self._put(chunk)
        num_layers, counts = len(self.weights.upper), self.counts
        self.layers.upper(len(chunk))
        counts.upper_layer_calls += num_layers * len(chunk)
        counts.upper_passes += num_layers
        counts.kv_slots += num_layers * self._slots_read(chunk)

    def fill_upper_kv(self, chunk: Chunk) -> None:
        """Append upper K and V of exit states, however many."""
        for start in range(0, len(chunk), self.max_chunk):
            part = chunk[start : start + self.max_chunk]
            self._put(part)
            self.layers.upper_kv(len(part))
            self.counts.upper_kv_calls += len(part)
            self.counts.upper_kv_passes += 1

    def _put(self, chunk: Chunk | list[tuple[int, int, int, int]]) -> None:
        self.layers.tokens[: len(chunk)] = chunk

    def _slots_read(self, chunk: Chunk | list[tuple[int, int, int, int]]) -> int:
        """Cache slots that the chunk's rows hold, each read once a layer."""
        if len(chunk) == 1:
            return int(chunk[0][3]) + 1
        filled: dict[int, int] = {}
        for _, row, _, slot in chunk:
            filled[row] = max(filled.get(row, 0), int(slot) + 1)
        return sum(filled.values())

    def gate(self, num_states: int) -> None:
        """Exits.gate on the first states of the chunk."""
        self.exits.gate(self.layers.chunk(num_states)[1])
        self.counts.gate_calls += num_states
        self.counts.gate_passes += 1

    def decide(
        self,
        num_states: int,
        norm: Tensor,
        criterion: str,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """Exits.decide on the first states of the chunk."""
        _, h = self.layers.chunk(num_states)
        self.exits.decide(h, norm, criterion, rows, positions)
        self.counts.head_calls += num_states
        self.counts.head_passes += 1


class Decoder(Rows):
    """Full-depth decoding, or with a threshold early exit: exit iff confidence >= threshold.

    criterion: max_prob, margin or entropy of the exit's softmax, or gate, which needs no head.
    kv_policy: what an exited token leaves in the upper caches. `exact` where their K and V come
    from the exit state, else `recompute` (default), `propagate` or `hole`.
    num_slots: the longest prompt and its new tokens together.
    Raises: ValueError if these do not go together or a value is out of its range.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        num_slots: int,
        *,
        threshold: float | None = None,
        criterion: Criterion = "max_prob",
        kv_policy: KVPolicy | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.policy = _policy_for(weights, threshold, criterion, kv_policy)
        super().__init__(weights, sampling or Sampling(), num_rows, num_slots)
        self.exits_early = threshold is not None
        self.criterion = criterion
        if threshold is not None:
            self.exits.set_threshold(threshold)

    def step(self) -> list[NewToken]:
        """Feed every live row its last token; return one new token a row, rows ascending.

        Raises: ValueError, before anything runs, if a row is full.
        """
        self.check_room()
        rows, position = self.live, self.position
        if not rows:
            return []
        self.run_lower([(self.last[r], r, position[r], position[r]) for r in rows])
        if not self.exits_early:
            new = self._deep(rows, [math.nan] * len(rows))
        else:
            new = self._early(rows)
        for row, token, _, _ in new:
            self.last[row] = token
            position[row] += 1
        return new

    def _early(self, rows: Sequence[int]) -> list[NewToken]:
        exits, N = self.exits, len(rows)
        if self.criterion == "gate":
            self.gate(N)
        else:
            self._decide(self.weights.exit_norm, rows)
        leaves, confidence = exits.exits[:N].tolist(), exits.confidence[:N].tolist()
        deep = [i for i in range(N) if not leaves[i]]
        shallow = [i for i in range(N) if leaves[i]] if deep else range(N)
        new = self._shallow(rows, shallow, confidence) if shallow else []
        if deep:
            new += self._deep([rows[i] for i in deep], [confidence[i] for i in deep])
            new.sort()
        return new

    def _shallow(
        self, rows: Sequence[int], which: Sequence[int], confidence: Sequence[float]
    ) -> list[NewToken]:
        """The tokens of the states that exit, numbered in the chunk."""
        exit_layer = len(self.weights.lower)
        if self.criterion == "gate":
            if len(which) < len(rows):
                h = self.layers.h
                h[: len(which)] = h[list(which)]
            self._decide(self.weights.exit_norm, [rows[i] for i in which])
            token = self.exits.token[: len(which)].tolist()
        else:
            token = self.exits.token[list(which)].tolist()
        return [NewToken(rows[i], token[n], exit_layer, confidence[i]) for n, i in enumerate(which)]

    def _deep(self, rows: Sequence[int], confidence: Sequence[float]) -> list[NewToken]:
        """Run the upper block for the newest token of these rows, and settle what they owe."""
        if self.weights.upper:
            self._run_newest(rows)
        self._decide(self.weights.last_norm, rows)
        tokens, num_layers = self.exits.token[: len(rows)].tolist(), self.weights.num_layers
        return [
            NewToken(row, token, num_layers, value)
            for row, token, value in zip(rows, tokens, confidence, strict=True)
        ]

    def _run_newest(self, rows: Sequence[int]) -> None:
        """The final state of each row's newest token, to the first rows of the chunk."""
        S, position, upper_len = self.num_slots, self.position, self.upper_len
        if self.policy == "exact":
            self.fill_upper_kv(self.owed(rows, [position[r] + 1 for r in rows]))
        elif self.policy == "propagate":
            self.fill_upper_kv(self.owed(rows, [position[r] for r in rows]))
        at = upper_len if self.policy == "hole" else position
        newest = [(r * S + position[r], r, position[r], at[r]) for r in rows]
        if self.policy == "recompute" and any(upper_len[r] < position[r] for r in rows):
            # the newest first, where their states are looked for; what is older, and does not fit
            # beside them, before them
            older = self.owed(rows, [position[r] for r in rows])
            while len(older) > self.max_chunk - len(rows):
                part = min(self.max_chunk, len(older) - (self.max_chunk - len(rows)))
                self.run_upper(older[:part])
                older = older[part:]
            self.run_upper(np.concatenate((np.array(newest), older)))
        else:
            self.run_upper(newest)
        for r in rows:
            upper_len[r] = at[r] + 1

    def _decide(self, norm: Tensor, rows: Sequence[int]) -> None:
        criterion = "max_prob" if self.criterion == "gate" else self.criterion
        self.decide(len(rows), norm, criterion, rows, [self.position[r] + 1 for r in rows])


def check_criterion(weights: DecoderWeights, criterion: str) -> None:
    """Raise ValueError unless the model has an exit that the criterion can decide on."""
    if not weights.upper:
        raise ValueError("Decoder: the model must have an upper block to exit, got a dense model")
    if criterion not in get_args(Criterion):
        raise ValueError(
            f"Decoder: criterion must be one of {get_args(Criterion)}, got {criterion!r}"
        )
    if criterion == "gate" and weights.gate is None:
        raise ValueError("Decoder: criterion gate needs weights with a gate, got none")


def _policy_for(
    weights: DecoderWeights, threshold: float | None, criterion: str, policy: KVPolicy | None
) -> KVPolicy:
    legal: tuple[KVPolicy, ...] = ("exact",)
    if weights.upper_kv is None:
        legal = ("recompute", "propagate", "hole")
    if policy is not None and policy not in legal:
        raise ValueError(f"Decoder: kv_policy must be one of {legal}, got {policy!r}")
    if threshold is None:
        return legal[0]
    if math.isnan(threshold):
        raise ValueError("Decoder: threshold must be a number, got nan")
    check_criterion(weights, criterion)
    return policy or legal[0]
