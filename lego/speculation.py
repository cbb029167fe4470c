"""Speculative decoding: exits are drafts, and the upper block verifies them in one pass.

Drafts and final tokens are drawn under the same noise, which depends on the seed, the row and the
position alone. So a verified token is the very token that full depth draws there, and a draft is
accepted if it is that token.
"""

# Shape letters: T = tokens of a chunk, D = model width, V = vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lego.cached_blocks import CachedBlocks
from lego.counts import Counts
from lego.decoding import GeneratedToken
from lego.model import LegoModel
from lego.ops.exit_decision import softmax_confidence
from lego.sampling import Sampling, draw
from lego.strategies import Speculative


class _Draft(NamedTuple):
    token: int
    confidence: float


class SpeculativeDecoder:
    """The TokenDecoder of Speculative, row by row.

    Source: Leviathan et al. 2023, arXiv:2211.17192; drafts from early layers whose states are
    reused, Elhoushi et al. 2024, arXiv:2404.16710; coupling by Gumbel noise, Daliri et al. 2024,
    arXiv:2408.07978.
    """

    def __init__(
        self,
        model: LegoModel,
        strategy: Speculative,
        sampling: Sampling,
        num_rows: int,
        num_slots: int,
    ) -> None:
        strategy.check(model)
        self._strategy, self._sampling, self._num_slots = strategy, sampling, num_slots
        self._blocks = CachedBlocks(model, num_rows, num_slots)
        self._input: dict[int, int] = {}  # the newest token of every row that goes on

    @property
    def counts(self) -> Counts:
        return self._blocks.counts

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        self._blocks.prefill([ids_T[:-1] for ids_T in prompts])
        self._input = {row: int(ids_T[-1]) for row, ids_T in enumerate(prompts)}

    def step(self) -> list[GeneratedToken]:
        """One chunk a row: 1 to draft_tokens tokens each."""
        return [new for row in self._input for new in self._advance(row)]

    def finish(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._input.pop(row, None)

    def _advance(self, row: int) -> list[GeneratedToken]:
        """Draft a chunk of one row, verify it, and go back to where the drafts were wrong."""
        blocks = self._blocks
        start = blocks.rows[row].position
        drafts = self._draft(row)
        final_TD = blocks.upper(slice(row, row + 1), len(drafts))[0]
        tokens = self._draw(blocks.final_logits(final_TD), row, start + 1)
        # token i follows an input that is right if all drafts before it are
        num_right = 1
        while num_right < len(drafts) and drafts[num_right - 1].token == tokens[num_right - 1]:
            num_right += 1
        blocks.roll_back(row, start + num_right)
        self._input[row] = tokens[num_right - 1]
        num_layers = blocks.model.config.num_layers
        return [
            GeneratedToken(row, token, num_layers, draft.confidence)
            for token, draft in zip(tokens[:num_right], drafts, strict=False)
        ]

    def _draft(self, row: int) -> list[_Draft]:
        """Run the lower block token by token while its drafts are confident and fit the caches."""
        drafts = [self._draft_one(row, self._input[row])]
        while (
            len(drafts) < self._strategy.draft_tokens
            and drafts[-1].confidence >= self._strategy.stop_confidence
            and self._blocks.rows[row].position < self._num_slots
        ):
            drafts.append(self._draft_one(row, drafts[-1].token))
        return drafts

    def _draft_one(self, row: int, token: int) -> _Draft:
        """What the shallow exit makes of one more token of a row."""
        blocks, criterion = self._blocks, self._strategy.criterion
        ids_11 = torch.tensor([[token]], device=blocks.model.device)
        exit_state_1D = blocks.lower(ids_11, slice(row, row + 1))[:, 0]
        logits_1V = blocks.exit_logits(exit_state_1D)
        if criterion == "gate":
            confidence = blocks.gate_score(exit_state_1D)
        else:
            confidence = softmax_confidence(logits_1V, criterion)
        (draft,) = self._draw(logits_1V, row, blocks.rows[row].position)
        return _Draft(draft, float(confidence))

    def _draw(self, logits_TV: Tensor, row: int, position: int) -> list[int]:
        """Tokens of one row at adjacent positions, the first of which is given."""
        num_tokens = len(logits_TV)
        positions = range(position, position + num_tokens)
        return draw(logits_TV, self._sampling, [row] * num_tokens, positions)
