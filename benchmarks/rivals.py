"""Other decoders on the weights of a LegoModel: transformers and llama.cpp.

The model must have upper_kv="own", no biases and no norms of queries and keys: then it is a Llama.
"""

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
from lego.model import LegoModel

_GGML_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def llama_state(model: LegoModel) -> dict[str, Tensor]:
    """The weights under the names of transformers' LlamaForCausalLM; the head is the embedding."""
    config = model.config
    widths = [n * config.head_dim for n in (config.num_heads, *[config.num_kv_heads] * 2)]
    state = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.final_norm.weight,
    }
    for index, block in enumerate([*model.lower, *model.upper]):
        layer = f"model.layers.{index}"
        q, k, v = block.attention.in_proj.weight.split(widths)
        gate, up = block.mlp.gate_up_proj.weight.chunk(2)
        state |= {
            f"{layer}.input_layernorm.weight": block.attention_norm.weight,
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": block.attention.o_proj.weight,
            f"{layer}.post_attention_layernorm.weight": block.mlp_norm.weight,
            f"{layer}.mlp.gate_proj.weight": gate,
            f"{layer}.mlp.up_proj.weight": up,
            f"{layer}.mlp.down_proj.weight": block.mlp.down_proj.weight,
        }
    return state


class Transformers:
    """LlamaForCausalLM.generate, greedy, with its usual growing cache."""

    def __init__(self, model: LegoModel) -> None:
        config = model.config
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.dim,
                intermediate_size=config.hidden_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.max_seq_len,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=0,
            )
        ).to(model.embedding.weight.dtype)
        state = llama_state(model)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self.model.load_state_dict(state)
        self.model.eval()

    def __call__(self, prompt: Tensor, num_tokens: int) -> Run:
        clock = _Clock()
        with torch.inference_mode():
            out = self.model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                max_new_tokens=num_tokens,
                do_sample=False,
                streamer=clock,
            )
        _, *times = clock.times
        tokens = out[0, len(prompt) :].tolist()
        depth = [self.model.config.num_hidden_layers] * num_tokens
        return Run(tokens, depth, (times[-1] - times[0]) / (num_tokens - 1))


class _Clock:
    """A streamer of transformers that notes when the prompt and each token come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


def write_gguf(model: LegoModel, path: Path) -> None:
    """The model as a file of llama.cpp, in its own dtype, without a tokenizer."""
    config = model.config
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
    for name, weight in llama_state(model).items():
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
