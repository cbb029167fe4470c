"""Sequences over one set of caches, and the calls that take them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lego_kernels.decoder.checks import check_prompts, check_sizes
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.decode_layers import POSITION, ROW, SLOT, SOURCE
from lego_kernels.decoder.exits import Exits
from lego_kernels.decoder.layers import NativeLayers
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights

# tokens that share a pass over the weights in a prompt: more gain nothing, and take more workspace
CHUNK_TOKENS = 128

# (source, row, position, slot) of each token of a chunk, as NativeLayers.tokens
Table = NDArray[np.int64]
Chunk = Table | list[tuple[int, int, int, int]]


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
        check_sizes(weights, num_rows, num_slots)
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

        Where upper layers make their own K and V, the prompt runs them too. Rows start anew,
        finished ones too.
        Raises: ValueError, before anything runs, if a prompt is empty, does not fit num_slots or
            holds an id out of [0, vocab_size).
        """
        check_prompts(prompts, len(self.position), self.num_slots, self.weights.vocab_size)
        self.live = list(range(len(prompts)))
        own_kv = bool(self.weights.upper) and self.weights.upper_kv is None
        for row, prompt in enumerate(prompts):
            ids, stop = prompt.cpu().numpy(), len(prompt) - 1
            for start in range(0, stop, self.max_chunk):
                chunk = self._span(row, start, min(start + self.max_chunk, stop))
                states = chunk[:, SOURCE].copy()
                chunk[:, SOURCE] = ids[start : start + len(chunk)]
                self.run_lower(chunk)
                if own_kv:
                    chunk[:, SOURCE] = states
                    self.run_upper(chunk)
            self.position[row], self.last[row] = stop, int(ids[stop])
            self.upper_len[row] = stop if own_kv else 0

    def _span(self, row: int, start: int, stop: int) -> Table:
        """Positions [start, stop) of a row, sources among the exit states."""
        positions = np.arange(start, stop)
        chunk = np.empty((len(positions), 4), dtype=np.int64)
        chunk[:, SOURCE] = positions + row * self.num_slots
        chunk[:, ROW] = row
        chunk[:, POSITION] = chunk[:, SLOT] = positions
        return chunk

    def owed(self, rows: Sequence[int], stops: Sequence[int]) -> Table:
        """Exit states without upper K and V, of each row up to its position in `stops`."""
        spans = list(map(self._span, rows, [self.upper_len[row] for row in rows], stops))
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    def run_lower(self, chunk: Chunk) -> None:
        """Run the lower block on at most max_chunk tokens; their sources are token ids."""
        self._put(chunk)
        num_layers, counts = len(self.weights.lower), self.counts
        self.layers.lower(len(chunk))
        counts.lower_layer_calls += num_layers * len(chunk)
        counts.lower_passes += num_layers
        counts.kv_slots += num_layers * self._slots_read(chunk)

    def run_upper(self, chunk: Chunk) -> None:
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

    def _put(self, chunk: Chunk) -> None:
        self.layers.tokens[: len(chunk)] = chunk

    def _slots_read(self, chunk: Chunk) -> int:
        """Cache slots that the chunk's rows hold, each read once a layer."""
        if len(chunk) == 1:
            return int(chunk[0][SLOT]) + 1
        tokens = self.layers.tokens[: len(chunk)]
        filled = np.zeros(len(self.position), dtype=np.int64)
        np.maximum.at(filled, tokens[:, ROW], tokens[:, SLOT] + 1)
        return int(filled.sum())

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
