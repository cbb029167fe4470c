"""The native engine: a LegoModel's weights in a decoder of lego_kernels."""

from __future__ import annotations

from typing import Literal

from lego.counts import Counts
from lego.decoding import GeneratedToken
from lego.generation import Engine, ReferenceEngine
from lego.layers import Block
from lego.model import LegoModel
from lego.sampling import Sampling
from lego.strategies import EarlyExit, Speculative, Strategy, Uncached
from lego_kernels import library
from lego_kernels.decoder import sampling as kernels
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.speculative import SpeculativeDecoder
from lego_kernels.decoder.weights import DecoderWeights, Gate, LayerWeights, UpperKV
from lego_kernels.validation import DTYPES

EngineName = Literal["auto", "reference", "native"]


class NativeEngine:
    """Decodes by native CPU kernels; generate(..., engine=NativeEngine(model)).

    Reads the model's parameters where they lie: what training writes to them shows here, but not a
    parameter put in another's place, as model.to(dtype) does.
    Raises: ValueError if why_not(model) says something.
    """

    def __init__(self, model: LegoModel) -> None:
        if problem := why_not(model):
            raise ValueError(f"NativeEngine: {problem}")
        self.model = model
        self.weights = decoder_weights(model)

    def decoder(
        self, strategy: Strategy, sampling: Sampling, num_rows: int, num_slots: int
    ) -> NativeTokens:
        """Contract of lego.generation.Engine.decoder; Uncached has no native form: ValueError."""
        how = kernels.Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        decoder: Decoder | SpeculativeDecoder
        if isinstance(strategy, Uncached):
            raise ValueError(f"NativeEngine: strategy must use caches, got {strategy}")
        if isinstance(strategy, Speculative):
            strategy.check(self.model)
            decoder = SpeculativeDecoder(
                self.weights,
                num_rows,
                num_slots,
                draft_tokens=strategy.draft_tokens,
                stop_confidence=strategy.stop_confidence,
                criterion=strategy.criterion,
                sampling=how,
            )
        elif isinstance(strategy, EarlyExit):
            decoder = Decoder(
                self.weights,
                num_rows,
                num_slots,
                threshold=strategy.threshold,
                criterion=strategy.criterion,
                kv_policy=strategy.policy_for(self.model),
                sampling=how,
            )
        else:
            decoder = Decoder(self.weights, num_rows, num_slots, sampling=how)
        return NativeTokens(decoder)


class NativeTokens:
    """A decoder of lego_kernels as a lego.decoding.TokenDecoder."""

    def __init__(self, decoder: Decoder | SpeculativeDecoder) -> None:
        self._decoder = decoder
        self.prefill = decoder.prefill
        self.finish = decoder.finish

    @property
    def counts(self) -> Counts:
        return Counts(**vars(self._decoder.counts))

    def step(self) -> list[GeneratedToken]:
        return list(map(GeneratedToken._make, self._decoder.step()))


def engine_for(model: LegoModel, strategy: Strategy, name: EngineName) -> Engine:
    """The engine of that name; `auto` is native where that serves the model and the strategy.

    Raises: ValueError if `native` does not serve the model.
    """
    served = not why_not(model) and not isinstance(strategy, Uncached)
    native = name == "native" or (name == "auto" and served)
    return NativeEngine(model) if native else ReferenceEngine(model)


def why_not(model: LegoModel) -> str:
    """Why the native engine does not serve a model; empty if it does."""
    dtype = model.embedding.weight.dtype
    if library.NOT_LOADED["CPU"]:
        return f"the CPU kernels must be loaded, got {library.NOT_LOADED['CPU']}"
    if model.device.type != "cpu":
        return f"the model must be on the CPU, got {model.device}"
    if dtype not in DTYPES:
        return f"the model must be float32, bfloat16 or float16, got {dtype}"
    return ""


def decoder_weights(model: LegoModel) -> DecoderWeights:
    """The weights of a model where they lie, nothing copied."""
    config = model.config
    upper_kv = gate = None
    if model.upper:
        gate = Gate(weight=model.gate.weight[0], bias=model.gate.bias)
        if config.upper_kv == "exit_state":
            proj = model.upper_kv_proj
            upper_kv = UpperKV(norm=model.kv_norm.weight, proj=proj.weight, bias=proj.bias)
    return DecoderWeights(
        embedding=model.embedding.weight,
        lower=tuple(map(_layer, model.lower)),
        upper=tuple(map(_layer, model.upper)),
        upper_kv=upper_kv,
        exit_norm=model.exit_norm.weight,
        final_norm=model.final_norm.weight if model.upper else None,
        head=model.head.weight,
        gate=gate,
        cos=model.rotary.cos,
        sin=model.rotary.sin,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        eps=config.norm_eps,
        vocab_size=config.vocab_size,
    )


def _layer(block: Block) -> LayerWeights:
    attention, mlp = block.attention, block.mlp
    return LayerWeights(
        attention_norm=block.attention_norm.weight,
        in_proj=attention.in_proj.weight,
        in_bias=attention.in_proj.bias,
        q_norm=attention.q_norm.weight if attention.qk_norm else None,
        k_norm=attention.k_norm.weight if attention.qk_norm else None,
        o_proj=attention.o_proj.weight,
        mlp_norm=block.mlp_norm.weight,
        gate_up=mlp.gate_up_proj.weight,
        down=mlp.down_proj.weight,
    )
