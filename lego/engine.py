"""The native engine: a LegoModel's weights in a decoder of lego_kernels.

Whoever may do without it imports this late: with LEGO_BACKEND=native it fails where the kernels do.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from lego.config import ModelConfig
from lego.counts import Counts
from lego.decoding import GeneratedToken
from lego.generation import Engine, EngineName, ReferenceEngine, generate
from lego.layers import Block
from lego.model import LegoModel
from lego.sampling import Sampling
from lego.strategies import EarlyExit, Speculative, Strategy, Uncached
from lego_kernels import library
from lego_kernels.decoder import sampling as kernels
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.deferral import DeferringDecoder
from lego_kernels.decoder.device_decoder import DeviceDecoder
from lego_kernels.decoder.graph_step import choose_mode
from lego_kernels.decoder.speculative import SpeculativeDecoder
from lego_kernels.decoder.weights import DecoderWeights, Gate, LayerWeights, UpperKV
from lego_kernels.validation import DTYPES


class NativeEngine:
    """Decodes by native kernels; generate(..., engine=NativeEngine(model)).

    On the CPU it serves every strategy but Uncached; with `deferral`, EarlyExit alone, whose rows
    then wait for the upper block and run it together. On CUDA it serves FullDepth, and EarlyExit
    for exit-state models.

    Reads the model's parameters where they lie: what training writes to them shows here, but not a
    parameter put in another's place, as model.to(dtype) does.
    Raises: ValueError if why_not(model) says something, or for deferral on CUDA.
    """

    def __init__(self, model: LegoModel, *, deferral: bool = False) -> None:
        if problem := why_not(model):
            raise ValueError(f"NativeEngine: {problem}")
        if deferral and model.device.type != "cpu":
            raise ValueError(f"NativeEngine: deferral must be on the CPU, got {model.device}")
        self.model, self.deferral = model, deferral
        self.weights = decoder_weights(model)

    def decoder(
        self, strategy: Strategy, sampling: Sampling, num_rows: int, num_slots: int
    ) -> NativeTokens:
        """Contract of lego.generation.Engine.decoder.

        Raises: ValueError if the strategy is not served.
        """
        how = kernels.Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        if problem := why_not(self.model, strategy):
            raise ValueError(f"NativeEngine: {problem}")
        if self.deferral and not isinstance(strategy, EarlyExit):
            raise ValueError(f"NativeEngine: deferral must come with EarlyExit, got {strategy}")
        where: dict[str, Any] = {"num_rows": num_rows, "num_slots": num_slots, "sampling": how}
        if isinstance(strategy, Speculative):
            strategy.check(self.model)
            options = vars(strategy)
            return NativeTokens(SpeculativeDecoder(self.weights, **where, **options))
        if isinstance(strategy, EarlyExit):
            policy = strategy.policy_for(self.model)
            where |= {"threshold": strategy.threshold, "criterion": strategy.criterion}
            if self.model.device.type == "cpu":
                where["kv_policy"] = policy
        if self.model.device.type != "cpu":
            return NativeTokens(DeviceDecoder(self.weights, **where))
        if isinstance(strategy, EarlyExit):
            return NativeExits(
                (DeferringDecoder if self.deferral else Decoder)(self.weights, **where)
            )
        return NativeTokens(Decoder(self.weights, **where))


class NativeTokens:
    """A decoder of lego_kernels as a lego.decoding.TokenDecoder."""

    def __init__(self, decoder: Decoder | SpeculativeDecoder | DeviceDecoder) -> None:
        self._decoder = decoder
        self.prefill = decoder.prefill
        self.finish = decoder.finish

    @property
    def counts(self) -> Counts:
        return Counts(**vars(self._decoder.counts))

    def step(self) -> list[GeneratedToken]:
        return list(map(GeneratedToken._make, self._decoder.step()))


class NativeExits(NativeTokens):
    """An early-exit decoder of the CPU as a lego.decoding.ThresholdDecoder."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self._thresholds, self.shallow_token = decoder.state.threshold, decoder.shallow_token

    def set_threshold(self, row: int, threshold: float) -> None:
        self._thresholds[row] = threshold


def engine_for(model: LegoModel, strategy: Strategy, name: EngineName) -> Engine:
    """The engine of that name; `auto` is native where that serves the model and the strategy.

    Raises: ValueError if `native` does not serve the model; its decoder() if not the strategy.
    """
    native = name == "native" or (name == "auto" and not why_not(model, strategy))
    return NativeEngine(model) if native else ReferenceEngine(model)


def why_not(model: LegoModel, strategy: Strategy | None = None) -> str:
    """Why the native engine does not serve a model, or this strategy with it; empty if it does."""
    device, dtype = model.device.type, model.embedding.weight.dtype
    if device not in ("cpu", "cuda"):
        return f"the model must be on the CPU or on CUDA, got {model.device}"
    if device == "cpu" and library.NOT_LOADED["CPU"]:
        return f"the CPU kernels must be loaded, got {library.NOT_LOADED['CPU']}"
    if dtype not in DTYPES:
        return f"the model must be float32, bfloat16 or float16, got {dtype}"
    if isinstance(strategy, Uncached):
        return f"strategy must use caches, got {strategy}"
    exits_own = isinstance(strategy, EarlyExit) and model.config.upper_kv == "own"
    if device == "cuda" and (exits_own or isinstance(strategy, Speculative)):
        return f"strategy must be FullDepth or exact EarlyExit on CUDA, got {strategy}"
    return ""


def native_mode(device: str) -> tuple[str, str]:
    """How the native engine steps on a device, "" if not at all, and why not better."""
    if device == "cpu":
        missing = library.NOT_LOADED["CPU"]
        return ("", missing) if missing else ("decode_step", "the CPU kernels are loaded")
    return choose_mode("auto", torch.device(device))


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


@torch.no_grad()
def agrees_with_reference(device: str) -> bool:
    """Whether the native engine generates what the reference does, some tokens deep, some not."""
    config = ModelConfig(vocab_size=97, dim=32, num_heads=2, num_kv_heads=1, hidden_dim=40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LegoModel(config).requires_grad_(False)
        model.gate.weight.normal_()
    model, prompts = model.to(device), [[1, 2, 3], [4]]
    # what a gate that lets no token go is sure of, so that half of these would go
    never = generate(model, prompts, 8, EarlyExit(threshold=math.inf, criterion="gate"))
    middle = statistics.median(value for row in never.confidence for value in row)
    strategy = EarlyExit(threshold=middle, criterion="gate")
    reference = generate(model, prompts, 8, strategy)
    native = generate(model, prompts, 8, strategy, engine=NativeEngine(model))
    return (native.tokens, native.exit_layer) == (reference.tokens, reference.exit_layer)
