"""The decoder of decoder.py with all its state on the device, so that a step is a CUDA graph.

Every step takes all rows through the lower block. If some token stays, all rows run the upper block
too, which reads the weights no more often than one row would. Shape letters: B rows, S slots,
P places in the window of pending exit states, D width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lego_kernels.decoder.checks import (
    Criterion,
    check_prompts,
    check_room,
    check_sizes,
    policy_for,
)
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.device_exits import DeviceExits, StepRecord
from lego_kernels.decoder.device_layers import Buffers, DeviceLayers, KVBuffers
from lego_kernels.decoder.graph_step import StepParts, choose_mode, step_in_mode
from lego_kernels.decoder.rows import NewToken
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.state import CHUNK_TOKENS
from lego_kernels.decoder.weights import DecoderWeights

MAX_PENDING = 16  # exit states of a row that wait for their upper K and V
MAX_IN_FLIGHT = 4  # steps launched and not yet collected


class _InFlight(NamedTuple):
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    record: StepRecord  # on the host
    arrived: torch.cuda.Event | None


class DeviceDecoder:
    """decoder.Decoder for weights on any device, with the same results: see there.

    Early exit takes models whose upper K and V come from the exit state (ValueError for others,
    which Decoder serves). step() is launch(), which waits for nothing but in the modes that say so,
    and collect(). One more launch() before the first step() keeps the device a step ahead of the
    host, and a last collect() alone fetches what that left; a row that is finished meanwhile yields
    nothing more. `counts` counts the tokens that a call was for, when they are collected: rows that
    ran along for nothing are left out, and upper_kv_passes differ from Decoder's, since exit states
    wait here for max_pending at most.
    mode: of graph_step.Mode, or `auto` for the best that works; why_mode says why.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        num_slots: int,
        *,
        threshold: float | None = None,
        criterion: Criterion = "max_prob",
        sampling: Sampling | None = None,
        mode: str = "auto",
        max_pending: int = MAX_PENDING,
    ) -> None:
        self.policy = _check(weights, num_rows, num_slots, threshold, criterion, max_pending)
        sampling, device = sampling or Sampling(), weights.embedding.device
        self.mode, self.why_mode = choose_mode(mode, device, filters=sampling.filters)
        self.weights, self.num_slots = weights, num_slots
        self.counts = Counts()
        self.exits_early, self.criterion = threshold is not None, criterion
        self.max_pending = max_pending if self.exits_early else 1
        self.live = list(range(num_rows))
        self.position = [0] * num_rows  # of the next input to be launched
        self._upper_len = [0] * num_rows  # slots filled in the upper caches, by what is collected
        self._all_rows = slice(0, num_rows)
        # A finished row stays where it is, at S at most, and a fill may find it there, after which
        # its window begins at S + 1. What a window writes past the newest token, later windows
        # write again before it is read.
        self._padded = num_slots + self.max_pending + 1
        self._make_buffers(num_rows, device)
        self._exits = DeviceExits(
            weights, num_rows, sampling, criterion if self.exits_early else None, threshold
        )
        self._record = self._exits.record
        self._in_flight: deque[_InFlight] = deque()
        pin = device.type == "cuda"
        self._records = [
            StepRecord(num_rows, torch.device("cpu"), pin_memory=pin) for _ in range(MAX_IN_FLIGHT)
        ]
        self._next_record = 0
        parts = StepParts(
            before=self._before,
            fill=self._fill,
            deep=self._deep,
            after=self._after,
            flags=self._record.flags if self.exits_early else None,
        )
        with torch.cuda.device_of(self._record.block):
            self._run_step = step_in_mode(self.mode, parts)
        # only now, so that what ran for a capture moved no row
        self._live.fill_(True)
        self._start_at([0] * num_rows, torch.zeros_like(self._record.token))

    def _make_buffers(self, num_rows: int, device: torch.device) -> None:
        w, B, P = self.weights, num_rows, self.max_pending

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._layers = DeviceLayers(w, B, self._padded)
        self._buffers = Buffers(w, B, 1, self._padded)
        self._live = torch.zeros(B, dtype=torch.bool, device=device)
        # advanced together: the position of the next input, the row's length with it (which is the
        # position of the token drawn from it too), and its place among the exit states
        self._places = zeros(3, B)
        # upper_len, and the position at which the window from there is full
        self._owed = zeros(2, B)
        self._owed_after_fill = torch.tensor([[1], [P]], device=device)
        self._first_state = torch.arange(B, device=device)[:, None] * self._padded
        if w.upper_kv is not None:
            self._kv_buffers = KVBuffers(w, B, P)
        if self.exits_early:
            self._states = w.embedding.new_zeros(B * self._padded, w.dim)
            self._window = self._first_state + torch.arange(P, device=device)
            self._window_rows = zeros(B, P)
            self._window_states = w.embedding.new_zeros(B * P, w.dim)

    def set_threshold(self, threshold: float) -> None:
        """What all rows' confidences are compared with in the steps launched from now on.

        Raises: ValueError if it is NaN, or if the decoder was made without a threshold.
        """
        if not self.exits_early:
            raise ValueError(
                f"DeviceDecoder: set_threshold needs one from the start, got {threshold}"
            )
        if math.isnan(threshold):
            raise ValueError("DeviceDecoder: threshold must not be NaN, got nan")
        self._exits.threshold.fill_(threshold)

    def finish(self, rows: Sequence[int]) -> None:
        """These rows produce no more, what is in flight included; the others are not affected."""
        gone = set(rows).intersection(self.live)
        self.live = [row for row in self.live if row not in gone]
        for row in gone:
            self._live[row].fill_(False)

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Take a prompt for each row, int64 [T] with T >= 1, and run all but its last token.

        The upper K and V of what it runs are made too. Rows start anew, finished ones too; steps in
        flight are forgotten.
        Raises: ValueError, before anything runs, if a prompt is empty, does not fit num_slots or
            holds an id out of [0, vocab_size).
        """
        check_prompts(prompts, len(self.position), self.num_slots, self.weights.vocab_size)
        self._in_flight.clear()
        self.live = list(range(len(prompts)))
        self._live.fill_(True)
        w, stops = self.weights, [len(prompt) - 1 for prompt in prompts]
        for row, (prompt, stop) in enumerate(zip(prompts, stops, strict=True)):
            ids = prompt.to(w.embedding.device)
            for start in range(0, stop, CHUNK_TOKENS):
                self._prefill_chunk(row, start, ids[start : min(start + CHUNK_TOKENS, stop)])
        self._start_at(stops, torch.stack([prompt[-1] for prompt in prompts]))

    def _start_at(self, positions: list[int], token: Tensor) -> None:
        """The positions of the next inputs, before which all is filled in, and these."""
        self.position, self._upper_len = list(positions), list(positions)
        position = torch.tensor(positions, device=self._places.device)
        places = (position, position + 1, position + self._first_state[:, 0])
        self._places.copy_(torch.stack(places))
        self._owed.copy_(torch.stack((position, position + self.max_pending - 1)))
        self._record.token.copy_(token)

    def _prefill_chunk(self, row: int, start: int, ids: Tensor) -> None:
        w, counts, rows, T = self.weights, self.counts, slice(row, row + 1), len(ids)
        buffers = Buffers(w, 1, T, self._padded)
        position = torch.full((1,), start, dtype=torch.int64, device=ids.device)
        torch.index_select(w.embedding, 0, ids, out=buffers.h)
        self._layers.lower(buffers, rows, position, position + T)
        counts.lower_layer_calls += len(w.lower) * T
        counts.lower_passes += len(w.lower)
        counts.kv_slots += len(w.lower) * (start + T)
        if w.upper_kv is not None:
            self._layers.upper_kv(KVBuffers(w, 1, T), rows, buffers.h, position)
            counts.upper_kv_calls += T
            counts.upper_kv_passes += 1
        elif w.upper:
            self._layers.upper(buffers, rows, position, position + T)
            counts.upper_layer_calls += len(w.upper) * T
            counts.upper_passes += len(w.upper)
            counts.kv_slots += len(w.upper) * (start + T)

    def step(self) -> list[NewToken]:
        """Launch a step, and return the tokens of the oldest in flight, rows ascending.

        Raises: as launch and collect.
        """
        self.launch()
        return self.collect()

    def launch(self) -> None:
        """Feed every live row its last token, and leave the result on its way to the host.

        Raises: ValueError, before anything runs, if a row is full. RuntimeError if MAX_IN_FLIGHT
            steps wait to be collected.
        """
        if len(self._in_flight) == MAX_IN_FLIGHT:
            raise RuntimeError(
                f"DeviceDecoder: collect() must leave less than {MAX_IN_FLIGHT} steps in flight, "
                f"got {MAX_IN_FLIGHT}"
            )
        check_room(self.live, self.position, self.num_slots)
        rows = tuple(self.live)
        if not rows:
            return
        record = self._records[self._next_record]
        self._next_record = (self._next_record + 1) % MAX_IN_FLIGHT
        arrived = None
        with torch.cuda.device_of(self._record.block):
            self._run_step()
            record.block.copy_(self._record.block, non_blocking=True)
            if self._record.block.is_cuda:
                arrived = torch.cuda.Event()
                arrived.record()
        positions = tuple(self.position[row] for row in rows)
        self._in_flight.append(_InFlight(rows, positions, record, arrived))
        for row in rows:
            self.position[row] += 1

    def collect(self) -> list[NewToken]:
        """Wait for the oldest step in flight; return one new token a live row, rows ascending.

        Nothing if none is in flight. Raises: FloatingPointError if a logit was NaN.
        """
        if not self._in_flight:
            return []
        step = self._in_flight.popleft()
        if step.arrived is not None:
            step.arrived.synchronize()
        record, live = step.record, set(self.live)
        self._count(step)
        rows = [row for row in step.rows if row in live]
        deep = record.wants[1].tolist() if self.exits_early else [True] * len(self.position)
        lse, deep_lse = record.lse.tolist(), record.deep_lse.tolist()
        if any(math.isnan(lse[r]) or (deep[r] and math.isnan(deep_lse[r])) for r in rows):
            raise FloatingPointError("generate: logits must be numbers, got NaN")
        token, confidence = record.token.tolist(), record.confidence.tolist()
        depth = {True: self.weights.num_layers, False: len(self.weights.lower)}
        if not self.exits_early:
            confidence = [math.nan] * len(confidence)
        return [NewToken(row, token[row], depth[deep[row]], confidence[row]) for row in rows]

    def _count(self, step: _InFlight) -> None:
        counts, w, N = self.counts, self.weights, len(step.rows)
        lengths = {row: position + 1 for row, position in zip(*step[:2], strict=True)}
        counts.lower_layer_calls += len(w.lower) * N
        counts.lower_passes += len(w.lower)
        counts.kv_slots += len(w.lower) * sum(lengths.values())
        counts.head_calls += N
        counts.head_passes += 1
        filled, stayed = True, list(step.rows)
        if self.exits_early:
            filled = bool(step.record.flags[0])
            stayed = [row for row in step.rows if step.record.wants[1, row]]
            if self.criterion == "gate":
                counts.gate_calls += N
                counts.gate_passes += 1
            elif stayed:
                counts.head_calls += len(stayed)
                counts.head_passes += 1
        if filled and w.upper_kv is not None:
            counts.upper_kv_calls += sum(lengths[row] - self._upper_len[row] for row in step.rows)
            counts.upper_kv_passes += 1
            for row in step.rows:
                self._upper_len[row] = lengths[row]
        if stayed and w.upper:
            counts.upper_layer_calls += len(w.upper) * len(stayed)
            counts.upper_passes += len(w.upper)
            counts.kv_slots += len(w.upper) * sum(lengths[row] for row in stayed)

    # the four parts of a step, as StepParts has them

    def _before(self) -> None:
        """The lower block, and with a threshold the exit decision."""
        w, record, h = self.weights, self._record, self._buffers.h
        position, length, state_row = self._places
        torch.index_select(w.embedding, 0, record.token, out=h)
        self._layers.lower(self._buffers, self._all_rows, position, length)
        if not self.exits_early:
            return
        self._states.index_copy_(0, state_row, h)
        self._exits.early(h, length)
        fills, stays = record.wants
        torch.gt(self._live, self._exits.exits, out=stays)  # lives and does not exit
        torch.ge(position, self._owed[1], out=fills)
        torch.logical_or(fills, stays, out=fills)
        torch.any(record.wants, dim=1, out=record.flags)

    def _fill(self) -> None:
        """Upper K and V of the exit states that wait, the newest included."""
        position = self._places[0]
        if not self.exits_early:
            if self.weights.upper_kv is not None:
                states = self._buffers.h
                self._layers.upper_kv(self._kv_buffers, self._all_rows, states, position)
            return
        upper_len = self._owed[0]
        torch.add(self._window, upper_len[:, None], out=self._window_rows)
        states = self._window_states
        torch.index_select(self._states, 0, self._window_rows.view(-1), out=states)
        self._layers.upper_kv(self._kv_buffers, self._all_rows, states, upper_len)
        torch.add(position, self._owed_after_fill, out=self._owed)

    def _deep(self) -> None:
        """The upper block on all rows, and its result for those that stay."""
        position, length, _ = self._places
        if self.weights.upper:
            self._layers.upper(self._buffers, self._all_rows, position, length)
        if self.exits_early:
            self._exits.deep(self._buffers.h, length)

    def _after(self) -> None:
        """The head where it has not been read yet, and live rows one position on."""
        self._exits.late(self._buffers.h, self._places[1])
        self._places.add_(self._live)


def _check(
    weights: DecoderWeights,
    num_rows: int,
    num_slots: int,
    threshold: float | None,
    criterion: str,
    max_pending: int,
) -> str:
    """What the upper caches hold, as Decoder names it."""
    check_sizes(weights, num_rows, num_slots)
    if max_pending < 1:
        raise ValueError(f"DeviceDecoder: max_pending must be >= 1, got {max_pending}")
    policy = policy_for(weights, threshold, criterion, None)
    if threshold is not None and policy != "exact":
        raise ValueError(
            "DeviceDecoder: early exit must have upper K and V from the exit state, got a model "
            "whose upper layers make their own, which takes Decoder"
        )
    return policy
