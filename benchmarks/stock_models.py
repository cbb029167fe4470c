"""A LegoModel as a model of transformers, and generate() as the decode benchmarks time it.

The model must have upper_kv="own", no biases and no norms of queries and keys: then it is a Llama.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.decode_cases import Run
from lego.hf_format import to_hf_config, to_hf_tensors
from lego.model import LegoModel


def stock_model(model: LegoModel) -> LlamaForCausalLM:
    """With weights of its own, in the model's dtype; no token ends a text."""
    dtype = model.embedding.weight.dtype
    values = to_hf_config(model.config, dtype, 0) | {"eos_token_id": None, "pad_token_id": 0}
    stock = LlamaForCausalLM(LlamaConfig(**values)).to(dtype)
    missing, unexpected = stock.load_state_dict(
        to_hf_tensors(model.config, model.state_dict()), strict=False
    )
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # the tied head
    return stock.eval()


class Generates:
    """generate() of a model, or of what stands in for it, greedy; the time of a token after the
    first."""

    def __init__(self, model: Any, num_layers: int, **options: Any) -> None:
        self.model, self.num_layers, self.options = model, num_layers, options

    def __call__(self, prompt: Tensor, num_tokens: int) -> Run:
        clock = _Clock()
        with torch.inference_mode():
            out = self.model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                max_new_tokens=num_tokens,
                do_sample=False,
                streamer=clock,
                **self.options,
            )
        _, *times = clock.times
        tokens = out[0, len(prompt) :].tolist()
        depth = [self.num_layers] * num_tokens
        return Run(tokens, depth, (times[-1] - times[0]) / (num_tokens - 1))


class _Clock:
    """A streamer of transformers that notes when the prompt and each token come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass
