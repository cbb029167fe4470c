"""Early exit written on the stock modules of a transformers model: one row, a token at a time."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Made(NamedTuple):
    """A new token and how it came to be; gap is by how much its logit beats the next best."""

    token: int
    exit_layer: int
    confidence: float
    gap: float


class EarlyExitOracle:
    """Tokens leave after exit_layer iff their confidence >= threshold.

    layer_tokens: how many tokens each decoder layer has run, noted by a hook on the layer itself.
    cache: of the last row; with `hole`, upper layers hold less than lower ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        exit_layer: int,
        threshold: float,
        criterion: str = "max_prob",
        kv_policy: str = "recompute",
    ) -> None:
        self._model, self._threshold = model, threshold
        self._criterion, self._kv_policy = criterion, kv_policy
        layers = model.model.layers
        self._lower, self._upper = layers[:exit_layer], layers[exit_layer:]
        self.layer_tokens = [0] * len(layers)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._note(index))

    @torch.no_grad()
    def generate(self, prompt: list[int], num_tokens: int) -> list[Made]:
        self.cache = DynamicCache()
        self._owed: list[tuple[Tensor, int]] = []
        *context, last = prompt
        for position, token in enumerate(context):
            self._run(self._upper, self._exit_state(token, position), position)
        made = []
        for position in range(len(context), len(context) + num_tokens):
            made.append(self._next(last, position))
            last = made[-1].token
        return made

    def _next(self, token: int, position: int) -> Made:
        state = self._exit_state(token, position)
        logits, num_layers = self._logits(state), len(self._lower)
        confidence = _confidence(logits.softmax(0), self._criterion)
        if confidence >= self._threshold:
            self._owed.append((state, position))
        else:
            self._settle()
            logits = self._logits(self._run(self._upper, state, position))
            num_layers += len(self._upper)
        best, second = logits.topk(2).values.tolist()
        return Made(int(logits.argmax()), num_layers, confidence, best - second)

    def _settle(self) -> None:
        """Give the upper layers the keys and values of the tokens that left, as the policy says."""
        for state, position in self._owed:
            if self._kv_policy == "recompute":
                self._run(self._upper, state, position)
            elif self._kv_policy == "propagate":
                for layer in self._upper:
                    # for what it appends to the cache
                    self._attend(layer.self_attn, layer.input_layernorm(state), position)
        self._owed = []

    def _exit_state(self, token: int, position: int) -> Tensor:
        embedded = self._model.model.embed_tokens(torch.tensor([[token]]))
        return self._run(self._lower, embedded, position)

    def _run(self, layers: torch.nn.ModuleList, state: Tensor, position: int) -> Tensor:
        for layer in layers:
            state = self._attend(layer, state, position)
        return state

    def _attend(self, module: torch.nn.Module, state: Tensor, position: int) -> Tensor:
        """A layer or its attention, over all that its cache holds and the state [1, 1, D]."""
        return module(
            state,
            attention_mask=None,
            position_embeddings=self._model.model.rotary_emb(state, torch.tensor([[position]])),
            past_key_values=self.cache,
        )

    def _logits(self, state: Tensor) -> Tensor:
        return self._model.lm_head(self._model.model.norm(state))[0, 0]

    def _note(self, index: int):
        def hook(layer, arguments, output):
            self.layer_tokens[index] += output.size(1)

        return hook


def _confidence(prob: Tensor, criterion: str) -> float:
    best, second = prob.topk(2).values.tolist()
    if criterion == "max_prob":
        return best
    if criterion == "margin":
        return best - second
    return 1 + (prob * prob.log()).sum().item() / torch.tensor(len(prob)).log().item()
