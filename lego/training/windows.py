"""The training tokens as windows: most to learn from, the last few to stop by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lego.config import TrainConfig
from lego.data import num_windows, window_batch
from lego.seeding import generator


@dataclass(frozen=True)
class Windows:
    """Windows [0, num_train) are trained on, [num_train, num_windows) are held out.

    ids: integers [num_ids], the train split. place: int64 [num_windows], where each window lies in
    it, in units of seq_len.
    """

    ids: np.ndarray
    seq_len: int
    place: Tensor
    num_train: int

    @classmethod
    def split(cls, ids: np.ndarray, config: TrainConfig) -> Windows:
        """Take config.max_tokens (0: all), spread evenly; hold out config.holdout_ratio of them.

        Raises: ValueError if that makes fewer than two windows.
        """
        available = num_windows(ids, config.seq_len)
        wanted = config.max_tokens // config.seq_len if config.max_tokens else available
        total = min(wanted, available)
        if total < 2:
            raise ValueError(
                f"Windows: there must be 2 windows of {config.seq_len} tokens to train, got {total}"
            )
        place = torch.arange(total) * available // total
        held_out = min(max(1, round(total * config.holdout_ratio)), total - 1)
        return cls(ids, config.seq_len, place, total - held_out)

    @property
    def num_windows(self) -> int:
        return len(self.place)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, seq_len] each, of the windows `index`."""
        ids = window_batch(self.ids, self.seq_len, self.place[index]).to(device)
        return ids[:, :-1], ids[:, 1:]

    def epoch_order(self, seed: int, epoch: int) -> Tensor:
        """A permutation of the training windows that depends on seed and epoch alone."""
        return torch.randperm(self.num_train, generator=generator(seed, epoch))
