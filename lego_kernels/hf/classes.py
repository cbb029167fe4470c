"""Classes of transformers models whose own generate() runs on the native decoder.

For programs that call model.generate themselves: pipelines, evaluation harnesses. What a token runs
is `early_exit` of the GenerationConfig, which saves and loads with the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from lego_kernels.hf.accelerated import Accelerated, accelerate
from lego_kernels.hf.generation import EarlyExitOutput


class _EarlyExit:
    """generate() as accelerate(model, **generation_config.early_exit) has it, a dict of options.

    Without `early_exit` it is that of transformers. The weights are packed at the first call, and
    again after what replaces them, such as to(). A call's own generation_config goes before the
    model's.
    """

    _fast: tuple[dict[str, Any], Accelerated] | None = None

    def set_early_exit(self, **options: Any) -> None:
        """Take these options of accelerate() from now on; they are saved with the model.

        Raises: what accelerate() raises, with the options as they were.
        """
        model: Any = self
        self._fast = options, accelerate(model, **options)
        # transformers would not load what it does not know into settings that it made itself
        model.generation_config._from_model_config = False
        model.generation_config.early_exit = dict(options)

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **arguments: Any
    ) -> Tensor | EarlyExitOutput:
        model: Any = self
        options = _options(generation_config)
        if options is None:
            options = _options(model.generation_config)
        if options is None:
            return GenerationMixin.generate(model, inputs, generation_config, **arguments)
        if self._fast is None or self._fast[0] != options or not self._fast[1].shares_weights:
            self._fast = options, accelerate(model, **options)
        return self._fast[1].generate(inputs, generation_config, **arguments)

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs weights of its own."""
        return {name: value for name, value in vars(self).items() if name != "_fast"}


def _options(config: GenerationConfig | None) -> dict[str, Any] | None:
    """A copy, so that it differs from what is changed later."""
    options = getattr(config, "early_exit", None)
    if options is not None and not isinstance(options, dict):
        raise ValueError(
            f"generate: early_exit must be a dict of the options of accelerate(), got {options!r}"
        )
    return None if options is None else dict(options)


class EarlyExitLlamaForCausalLM(_EarlyExit, LlamaForCausalLM):
    """LlamaForCausalLM with early exit in generate()."""


class EarlyExitMistralForCausalLM(_EarlyExit, MistralForCausalLM):
    """MistralForCausalLM with early exit in generate()."""


class EarlyExitQwen2ForCausalLM(_EarlyExit, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with early exit in generate()."""


class EarlyExitQwen3ForCausalLM(_EarlyExit, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with early exit in generate()."""
