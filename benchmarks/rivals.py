"""llama.cpp on the weights of a LegoModel, which must be a Llama as stock_models.py has it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from time import perf_counter
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.decode_cases import Run
from lego.hf_format import to_hf_tensors
from lego.model import LegoModel

_GGML_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def write_gguf(model: LegoModel, path: Path) -> None:
    """The model as a file of llama.cpp, in its own dtype, without a tokenizer."""
    config = model.config
    assert config.rope_type == "default", config.rope_type
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for name, weight in to_hf_tensors(config, model.state_dict()).items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        x = weight.float() if weight.dim() == 1 else weight
        x = x if heads is None else interleave_halves(x, heads)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            x.contiguous().view(torch.uint8).numpy(),
            raw_dtype=_GGML_TYPES[x.dtype],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys for llama.cpp, which rotates neighbours where we rotate halves."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class LlamaCpp:
    """llama.cpp on one thread; keys and values float32 beside float32 weights, float16 else."""

    def __init__(self, path: Path, config: Any, num_slots: int) -> None:
        llama_cpp.llama_log_set(_QUIET, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = num_slots
        options.n_threads = options.n_threads_batch = 1
        # with it, logits of float32 weights are off by 2e-3, and no token comes sooner
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if gguf.GGUFReader(path).tensors[0].tensor_type == gguf.GGMLQuantizationType.F32:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._vocab_size, self._num_layers = config.vocab_size, config.num_layers

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def __call__(self, prompt: Tensor, num_tokens: int) -> Run:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        tokens = [self._next(prompt.tolist())]
        start = perf_counter()
        for _ in range(num_tokens - 1):
            tokens.append(self._next(tokens[-1:]))
        seconds = (perf_counter() - start) / (num_tokens - 1)
        return Run(tokens, [self._num_layers] * num_tokens, seconds)

    def _next(self, ids: list[int]) -> int:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(
            self._context, llama_cpp.llama_batch_get_one(array, len(ids))
        )
        assert failed == 0, failed
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


@llama_cpp.llama_log_callback
def _QUIET(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def rival_versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "llama_cpp": llama_cpp.__version__}
