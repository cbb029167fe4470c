"""accelerate(model): generate() of a transformers model on the native decoder, with early exit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from lego_kernels.decoder.checks import Criterion, KVPolicy
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.rows import Rows
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.speculative import SpeculativeDecoder
from lego_kernels.decoder.weights import DecoderWeights
from lego_kernels.hf.arguments import check_arguments
from lego_kernels.hf.generation import (
    EarlyExitOutput,
    Stopping,
    check_prompts,
    generate,
    sampling_of,
    unpadded,
)
from lego_kernels.hf.packing import Memory, SharedWeights
from lego_kernels.hf.support import check_model

Mode = Literal["full", "early_exit", "speculative"]
CRITERIA = ("max_prob", "margin", "entropy")
KV_POLICIES = ("recompute", "propagate", "hole")


@dataclass(frozen=True, kw_only=True)
class _Strategy:
    """The arguments of accelerate() that say what a token runs, checked."""

    mode: Mode
    exit_layer: int
    num_layers: int
    criterion: Criterion
    threshold: float
    kv_policy: KVPolicy
    draft_tokens: int

    @property
    def all_layers(self) -> bool:
        return self.exit_layer == self.num_layers

    @property
    def kv_exact(self) -> bool:
        return self.kv_policy == "recompute" or self.all_layers

    def decoder(self, weights: DecoderWeights, rows: int, slots: int, sampling: Sampling) -> Rows:
        """For so many rows, whose inputs take positions in [0, slots)."""
        if self.all_layers:
            return Decoder(weights, rows, slots, sampling=sampling)
        options: dict[str, Any] = {"criterion": self.criterion, "sampling": sampling}
        if self.mode == "speculative":
            options |= {"draft_tokens": self.draft_tokens, "stop_confidence": self.threshold}
            return SpeculativeDecoder(weights, rows, slots, **options)
        options |= {"threshold": self.threshold, "kv_policy": self.kv_policy}
        return Decoder(weights, rows, slots, **options)


class Accelerated:
    """A model whose generate() runs on the native decoder; the model itself works as before.

    memory: bytes that it shares with the model, and bytes that it added. kv_exact: whether tokens
    leave the keys and values of full depth behind.
    """

    def __init__(self, model: PreTrainedModel, strategy: _Strategy) -> None:
        self._model, self._strategy = model, strategy
        self._shared: SharedWeights | None = SharedWeights(model, strategy.exit_layer)
        self.memory: Memory = self._shared.memory
        self.kv_exact = strategy.kv_exact

    @property
    def shares_weights(self) -> bool:
        """Whether the decoder reads the model's own parameters; else generate() raises."""
        return self._shared is not None and self._shared.is_shared

    def undo(self) -> None:
        """Give the model parameters of its own again; a second call does nothing."""
        if self._shared is not None:
            self._shared.release()
        self._shared = None

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        stopping_criteria: Any = None,
        streamer: Any = None,
        **arguments: Any,
    ) -> Tensor | EarlyExitOutput:
        """What model.generate gives for the same arguments, in the way that accelerate() set.

        arguments: input_ids, attention_mask (padded on the left), and the settings max_new_tokens,
        max_length, max_time, do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id,
        bos_token_id, num_return_sequences and return_dict_in_generate, which come from
        generation_config and the model's own where they are not given. Draws are by Gumbel-max
        from a seed that torch's generator gives: the distribution is transformers', the tokens of
        a seed are not. Returns ids int64 [B, length], or EarlyExitOutput.
        Raises: ValueError, before anything runs, for what is not supported, by name. RuntimeError
            if the model's parameters are no longer those of the acceleration. FloatingPointError
            if a logit is NaN.
        """
        if self._shared is None:
            raise RuntimeError("generate: the acceleration must not be undone, got one that is")
        if not self.shares_weights:
            raise RuntimeError(
                "generate: the model must hold the parameters it was accelerated with, got others "
                "(undo(), to() or an adapter replaces them), so accelerate it again"
            )
        check_model(self._model)
        check_arguments(self._model, generation_config, arguments)
        ids = arguments.get("input_ids") if inputs is None else inputs
        if ids is not None:
            check_prompts(ids, arguments.get("attention_mask"))
        return GenerationMixin.generate(
            self._model,
            inputs,
            generation_config=generation_config,
            stopping_criteria=stopping_criteria,
            # which puts the prompt; a loop of one's own is not handed the streamer
            streamer=streamer,
            custom_generate=partial(self._decode, self._shared.weights, streamer),
            **arguments,
        )

    def _decode(
        self,
        weights: DecoderWeights,
        streamer: Any,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | EarlyExitOutput:
        """The loop that transformers calls once it has prepared inputs, settings and criteria."""
        prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
        stopping = Stopping(stopping_criteria, generation_config, input_ids.size(1))
        # the last new token is never an input
        slots = max(map(len, prompts)) + stopping.max_new - 1
        if slots > weights.cos.size(0):
            raise ValueError(
                "generate: prompt and new tokens but the last must fit max_position_embeddings and "
                f"the sliding window, {weights.cos.size(0)} tokens, got {slots}"
            )
        sampling = sampling_of(generation_config)
        decoder = self._strategy.decoder(weights, len(prompts), slots, sampling)
        ids, exit_layers, confidences = generate(decoder, prompts, input_ids, stopping, streamer)
        if not generation_config.return_dict_in_generate:
            return ids
        return EarlyExitOutput(
            sequences=ids,
            exit_layers=exit_layers,
            confidences=confidences,
            kv_exact=self.kv_exact,
            counts=decoder.counts,
        )


def accelerate(
    model: PreTrainedModel,
    *,
    mode: Mode = "full",
    exit_layer: int | None = None,
    criterion: Criterion = "max_prob",
    threshold: float | None = None,
    kv_policy: KVPolicy = "recompute",
    draft_tokens: int = 4,
) -> Accelerated:
    """The model's generate() on the native CPU decoder; undo() on what is returned ends it.

    model: a Llama, Mistral, Qwen2 or Qwen3 causal LM of transformers, in eval mode, on the CPU, in
    float32, bfloat16 or float16. Its q, k, v and its gate and up weights become views of packed
    ones; nothing else of it changes, and it works as before.
    mode: `full` runs every layer and gives model.generate's tokens. `speculative` gives them too:
    the first exit_layer layers draft up to draft_tokens (>= 1) tokens, until one's confidence is
    below threshold (0.5 if not given), and the others verify. `early_exit` lets a token leave after
    exit_layer iff its confidence >= threshold, which must be given, through the model's own last
    norm and head. exit_layer is in [1, layers], unset in `full`; at the number of layers every mode
    is `full`. draft_tokens is for `speculative` alone.
    criterion: max_prob, margin or entropy.
    kv_policy: what a token that left owes the layers above. `recompute` is exact: it settles what
    full depth computes. `propagate` and `hole` are inexact, and later tokens differ.
    Raises: ValueError or RuntimeError, with the model as it was, for what is not supported.
    """
    check_model(model)
    num_layers = len(model.model.layers)
    _check_options(mode, exit_layer, criterion, threshold, kv_policy, draft_tokens)
    if exit_layer is not None and exit_layer not in range(1, num_layers + 1):
        raise ValueError(f"accelerate: exit_layer must be in [1, {num_layers}], got {exit_layer}")
    exit_layer = None if exit_layer is None else int(exit_layer)
    strategy = _Strategy(
        mode=mode,
        exit_layer=num_layers if exit_layer is None else exit_layer,
        num_layers=num_layers,
        criterion=criterion,
        threshold=0.5 if threshold is None else threshold,
        kv_policy=kv_policy,
        draft_tokens=draft_tokens,
    )
    return Accelerated(model, strategy)


def _check_options(
    mode: str,
    exit_layer: int | None,
    criterion: str,
    threshold: float | None,
    kv_policy: str,
    draft_tokens: int,
) -> None:
    # a gate is left out, since these models have none
    policies = KV_POLICIES if mode == "early_exit" else KV_POLICIES[:1]
    for name, value, legal, where in (
        ("mode", mode, get_args(Mode), ""),
        ("criterion", criterion, CRITERIA, ""),
        ("kv_policy", kv_policy, policies, f" in mode {mode}"),
    ):
        if value not in legal:
            raise ValueError(f"accelerate: {name} must be one of {legal}{where}, got {value!r}")
    if mode == "full" and threshold is not None:
        raise ValueError(f"accelerate: threshold must be unset in mode full, got {threshold}")
    if mode == "full" and exit_layer is not None:
        raise ValueError(f"accelerate: exit_layer must be unset in mode full, got {exit_layer}")
    if mode != "full" and exit_layer is None:
        raise ValueError(f"accelerate: exit_layer must be given in mode {mode}, got None")
    if mode == "early_exit" and threshold is None:
        raise ValueError("accelerate: threshold must be given in mode early_exit, got None")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("accelerate: threshold must be a number, got nan")
    if not isinstance(draft_tokens, int) or draft_tokens < 1:
        raise ValueError(f"accelerate: draft_tokens must be an int >= 1, got {draft_tokens}")
