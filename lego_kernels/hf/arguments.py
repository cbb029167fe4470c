"""What generate() takes of transformers' arguments and settings, and which it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

ARGUMENTS = (
    "inputs",
    "input_ids",
    "attention_mask",
    "generation_config",
    "stopping_criteria",
    "streamer",
)
SETTINGS = (
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "max_time",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
    "temperature",
    "top_k",
    "top_p",
)
# of beams, assistants, caches and compilation, which change nothing where those are not used, and
# what our own classes have read before
_IDLE = {
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "cache_config",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_exit",
    "early_stopping",
    "length_penalty",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "prefill_chunk_size",
    "target_lookbehind",
    "transformers_version",
}
# the value that changes nothing, where it is not one that is false
_NEUTRAL = {
    "cache_implementation": "dynamic",
    "encoder_repetition_penalty": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "repetition_penalty": 1,
    "top_h": None,
    "typical_p": 1,
    "use_cache": True,
}


def check_arguments(
    model: PreTrainedModel, config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> None:
    """Raise ValueError, by name, for what a call asks and the decoder would not do.

    config: as passed to the call; settings come from arguments, then from it, then from the
    model's own. None of an argument or a setting is that it is not given.
    """
    known = {
        *inspect.signature(GenerationMixin.generate).parameters,
        "tokenizer",
        "assistant_tokenizer",
    }
    known |= {*inspect.signature(model.forward).parameters} - {"kwargs"}
    settings = {*vars(GenerationConfig())}
    for name, value in arguments.items():
        if name not in (*ARGUMENTS, *settings) and (name not in known or value is not None):
            raise ValueError(
                f"generate: arguments must be of {', '.join(ARGUMENTS)} or settings of "
                f"{', '.join(SETTINGS)}, got {name}"
            )
    given = vars(config or GenerationConfig())
    merged = dict(vars(model.generation_config))
    merged |= {name: value for name, value in given.items() if value is not None}
    merged |= {name: value for name, value in arguments.items() if name in settings}
    for name, value in merged.items():
        if name.startswith("_") or name in (*SETTINGS, *_IDLE) or value is None:
            continue
        neutral = _NEUTRAL.get(name)
        if bool(value) if name not in _NEUTRAL else value != neutral:
            wanted = "unset" if neutral is None else f"{neutral} or unset"
            raise ValueError(
                f"generate: {name} must be {wanted}, got {value!r}; "
                f"settings are {', '.join(SETTINGS)}"
            )
