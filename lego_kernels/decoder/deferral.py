"""Throughput in a batch: rows that need the upper block wait, and run it together when that pays.

A skipped row saves weights only where no row reads them. The others go on meanwhile; what each row
generates is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from lego_kernels.decoder.checks import Criterion, KVPolicy
from lego_kernels.decoder.decode_step import decode_step
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.rows import NewToken
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights


class PassSeconds:
    """Seconds of a pass as fixed + per_row * rows: least squares over the passes so far.

    Old passes fade, a twentieth each, so that a machine that slows down is followed.
    """

    def __init__(self) -> None:
        self._count = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def add(self, rows: int, seconds: float) -> None:
        sums = (1.0, rows, seconds, rows * rows, rows * seconds)
        names = ("_count", "_rows", "_seconds", "_rows_rows", "_rows_seconds")
        for name, value in zip(names, sums, strict=True):
            setattr(self, name, 0.95 * getattr(self, name) + value)

    def of(self, rows: int) -> float:
        """What a pass of so many rows takes; 0 before the first."""
        if self._count == 0:
            return 0.0
        mean_rows, mean = self._rows / self._count, self._seconds / self._count
        spread = self._rows_rows / self._count - mean_rows**2
        if spread < 1e-6:
            return mean  # always as many rows so far: which part is fixed is not known
        per_row = (self._rows_seconds / self._count - mean_rows * mean) / spread
        return max(mean + max(per_row, 0.0) * (rows - mean_rows), 0.0)


class DeferringDecoder(Decoder):
    """An early-exit Decoder for many rows. A step is one pass: of the lower block, or of the upper.

    A step yields the tokens that its pass completes, so none at times. The upper block runs when no
    row can go on without it, or when another pass of the lower block would add fewer tokens per
    second than this cycle, from one upper pass to the next, has with the upper pass at its end (the
    marginal value theorem). The seconds are those measured so far.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        num_slots: int,
        *,
        threshold: float,
        criterion: Criterion = "max_prob",
        kv_policy: KVPolicy | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(
            weights,
            num_rows,
            num_slots,
            threshold=threshold,
            criterion=criterion,
            kv_policy=kv_policy,
            sampling=sampling,
        )
        self.waiting: set[int] = set()  # rows that stay
        self._lower_time, self._upper_time = PassSeconds(), PassSeconds()
        self._share_staying = 0.5  # of rows in a lower pass, smoothed
        self._cycle_tokens, self._cycle_seconds = 0, 0.0

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """As Decoder.prefill; no row waits afterwards."""
        super().prefill(prompts)
        self.waiting, self._cycle_tokens, self._cycle_seconds = set(), 0, 0.0

    def finish(self, rows: Sequence[int]) -> None:
        super().finish(rows)
        self.waiting.difference_update(rows)

    def step(self) -> list[NewToken]:
        """Run one pass; return the tokens it completes, rows ascending.

        Raises: as Decoder.step, for the rows of the pass.
        """
        ready = [row for row in self.live if row not in self.waiting]
        if self.waiting and (not ready or self._upper_pays(len(ready))):
            return self._upper_pass()
        return self._lower_pass(ready) if ready else []

    def _upper_pays(self, ready: int) -> bool:
        waiting, lower, upper = len(self.waiting), self._lower_time, self._upper_time
        now = (self._cycle_tokens + waiting) / (self._cycle_seconds + upper.of(waiting))
        # each ready row gets its token in the end: by an exit, or in a larger upper pass
        staying = ready * self._share_staying
        later = lower.of(ready) + upper.of(waiting + round(staying)) - upper.of(waiting)
        return ready < now * later

    def _lower_pass(self, ready: Sequence[int]) -> list[NewToken]:
        new, seconds = self._timed(ready, lower=True)
        self._lower_time.add(len(ready), seconds)
        self.waiting.update(ready)
        self.waiting.difference_update(x.row for x in new)
        staying = len(ready) - len(new)
        self._share_staying += 0.05 * (staying / len(ready) - self._share_staying)
        self._cycle_tokens += len(new)
        self._cycle_seconds += seconds
        return new

    def _upper_pass(self) -> list[NewToken]:
        new, seconds = self._timed(sorted(self.waiting), lower=False)
        self._upper_time.add(len(new), seconds)
        self.waiting, self._cycle_tokens, self._cycle_seconds = set(), 0, 0.0
        return new

    def _timed(self, rows: Sequence[int], *, lower: bool) -> tuple[list[NewToken], float]:
        """One pass of the lower or of the upper block: its tokens and its seconds."""
        start = perf_counter()
        wanted = torch.tensor(rows, dtype=torch.int64)
        new = self._collect(decode_step(self.state.table, wanted, lower, not lower))
        return new, perf_counter() - start
