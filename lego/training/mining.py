"""Hard-example mining: which training tokens the lower block is least sure of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lego.kv_cache import attend_within
from lego.model import LegoModel
from lego.ops.exit_decision import softmax_confidence
from lego.training.windows import Windows


@dataclass(frozen=True)
class HardTokens:
    """mask: bool [windows, seq_len], true where confidence < threshold."""

    mask: np.ndarray
    threshold: float


@torch.no_grad()
def mine_hard_tokens(
    model: LegoModel, windows: Windows, hard_example_ratio: float, *, batch_size: int
) -> HardTokens:
    """One pass over all windows; the hard_example_ratio least confident tokens are hard.

    The confidence is max_prob at the exit. Fewer tokens than asked for are hard if many tie at the
    threshold. hard_example_ratio is in (0, 1).
    """
    confidence_NT = np.empty((windows.num_windows, windows.seq_len), dtype=np.float32)
    for index in torch.arange(windows.num_windows).split(batch_size):
        ids_BT, _ = windows.batch(index, model.device)
        exit_state = model.run_lower(ids_BT, model.positions(ids_BT), lambda layer: attend_within)
        logits = model.exit_logits(exit_state).flatten(0, 1)
        confidence = softmax_confidence(logits, "max_prob").view(ids_BT.shape)
        confidence_NT[index.numpy()] = confidence.float().cpu().numpy()
    # held-out windows are measured too, but the threshold comes from the training ones
    threshold = float(np.quantile(confidence_NT[: windows.num_train], hard_example_ratio))
    return HardTokens(confidence_NT < threshold, threshold)
