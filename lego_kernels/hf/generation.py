"""The loop of generate(): a decoder's tokens in the order and the form of transformers.

Shape letters: B rows, T tokens of the padded prompt, N new tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.rows import NewToken, Rows
from lego_kernels.decoder.sampling import Sampling


@dataclass
class EarlyExitOutput(GenerateDecoderOnlyOutput):
    """transformers' output with what each new token ran.

    exit_layers: int64 [B, N], the layers a token went through, 0 for padding after a row's end.
    confidences: float32 [B, N], the criterion's value, NaN without a decision.
    kv_exact: whether every token left the keys and values that full depth computes for it.
    counts: what the call ran, prompts included. exit_layers alone does not say: layers that a
    token left out are run later where `recompute` settles them, and drafts may be in vain.
    """

    exit_layers: Tensor | None = None
    confidences: Tensor | None = None
    kv_exact: bool | None = None
    counts: Counts | None = None


def check_prompts(ids_BT: Tensor, mask_BT: Tensor | None) -> None:
    """Raise ValueError unless ids are on the CPU and a mask fits them with 0s, then 1s in a row."""
    if not isinstance(ids_BT, Tensor) or ids_BT.dtype not in (torch.int64, torch.int32):
        got = ids_BT.dtype if isinstance(ids_BT, Tensor) else type(ids_BT).__name__
        raise ValueError(f"generate: input_ids must be a tensor of int64 or int32, got {got}")
    if ids_BT.dim() != 2 or ids_BT.numel() == 0:
        raise ValueError(f"generate: input_ids must be [B, T], got {tuple(ids_BT.shape)}")
    if ids_BT.device.type != "cpu":
        raise ValueError(f"generate: input_ids must be on the CPU, got {ids_BT.device}")
    if mask_BT is None:
        return
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"generate: attention_mask must be {tuple(ids_BT.shape)} as input_ids, "
            f"got {tuple(mask_BT.shape)}"
        )
    for row, mask_T in enumerate(mask_BT.tolist()):
        if mask_T != sorted(mask_T) or mask_T[-1] != 1 or mask_T[0] not in (0, 1):
            raise ValueError(
                f"generate: attention_mask must be 0s, then 1s in each row (left padding), "
                f"got {mask_T} in row {row}"
            )


def unpadded(ids_BT: Tensor, mask_BT: Tensor | None) -> list[Tensor]:
    """The prompt of each row without its padding on the left.

    Raises: ValueError as check_prompts; transformers may have made the mask.
    """
    check_prompts(ids_BT, mask_BT)
    if mask_BT is None:
        return list(ids_BT.long())
    rows = zip(ids_BT.long(), mask_BT.bool(), strict=True)
    return [ids_T[mask_T] for ids_T, mask_T in rows]


def sampling_of(config: GenerationConfig) -> Sampling:
    """As torch.manual_seed has it: a seed from torch's generator for every call that draws."""
    if not config.do_sample:
        return Sampling()
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        seed=int(torch.randint(2**63 - 1, ())),
    )


class Stopping:
    """When rows end, of transformers' criteria: max_length for all, eos tokens, and the rest.

    The first two are known without a call for each token. pad is what follows a row's end; None
    without eos, where transformers lets all rows go on until the last has ended.
    """

    def __init__(
        self, criteria: Iterable[StoppingCriteria], config: GenerationConfig, prompt_length: int
    ) -> None:
        known = (MaxLengthCriteria, EosTokenCriteria)
        self._rest = StoppingCriteriaList(c for c in criteria if type(c) not in known)
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        # transformers asks after a token, so there is always one
        self.max_new = max(min(lengths) - prompt_length, 1)
        eos = [c.eos_token_id.tolist() for c in criteria if type(c) is EosTokenCriteria]
        self._eos = {token for tokens in eos for token in tokens}
        pad = config.pad_token_id
        self.pad: int | None = None
        if eos:
            self.pad = eos[0][0] if pad is None else pad

    def ended(self, ids: NDArray[np.int64], rows: Sequence[int]) -> set[int]:
        """Those of the rows that end with the last of ids [B, length]."""
        last = ids[:, -1].tolist()
        done = {row for row in rows if last[row] in self._eos}
        if self._rest:
            # a copy, contiguous: criteria are people's own code
            now = self._rest(torch.from_numpy(ids.copy()), None).tolist()
            done.update(row for row in rows if now[row])
        return done


class _InStep:
    """The tokens of a decoder whose rows may be ahead of each other, at most max_new a row."""

    def __init__(self, decoder: Rows, max_new: int) -> None:
        self._decoder: Any = decoder
        self._ahead: list[deque[NewToken]] = [deque() for _ in decoder.live]
        self._left = [max_new for _ in decoder.live]

    def next(self, rows: Iterable[int]) -> list[NewToken]:
        """The next token of each of these rows."""
        while not all(self._ahead[row] for row in rows):
            for new in self._decoder.step():
                # a step of several tokens may go past the row's end
                if self._left[new.row] > 0:
                    self._left[new.row] -= 1
                    self._ahead[new.row].append(new)
            if done := [row for row in self._decoder.live if self._left[row] == 0]:
                self._decoder.finish(done)
        return [self._ahead[row].popleft() for row in rows]


def generate(
    decoder: Rows, prompts: list[Tensor], ids_BT: Tensor, stopping: Stopping, streamer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and new tokens, padded, int64 [B, T + N], exit layers and confidences [B, N]."""
    (B, T), N = ids_BT.shape, stopping.max_new
    ids = np.full((B, T + N), stopping.pad or 0, np.int64)
    ids[:, :T] = ids_BT
    exit_layers, confidences = np.zeros((B, N), np.int64), np.full((B, N), math.nan, np.float32)
    decoder.prefill(prompts)
    tokens, going, unfinished = _InStep(decoder, N), list(range(B)), set(range(B))
    column = 0
    while unfinished:
        for new in tokens.next(going):
            ids[new.row, T + column] = new.token
            exit_layers[new.row, column], confidences[new.row, column] = new[2:]
        column += 1
        if streamer is not None:
            streamer.put(torch.from_numpy(ids[:, T + column - 1].copy()))
        unfinished -= stopping.ended(ids[:, : T + column], going)
        if column == N:
            unfinished.clear()
        if stopping.pad is not None and len(unfinished) < len(going):
            decoder.finish([row for row in going if row not in unfinished])
            going = sorted(unfinished)
    if streamer is not None:
        streamer.end()
    made = slice(column)
    return (
        torch.from_numpy(ids[:, : T + column].copy()),
        torch.from_numpy(exit_layers[:, made].copy()),
        torch.from_numpy(confidences[:, made].copy()),
    )
