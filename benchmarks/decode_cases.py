"""What the decode benchmarks run: models, prompts, and one token after another, timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lego.config import ModelConfig
from lego.engine import decoder_weights
from lego.generation import GeneratedToken, generate
from lego.model import LegoModel
from lego.strategies import Strategy
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.device_decoder import DeviceDecoder
from lego_kernels.decoder.rows import NewToken

PROMPT_TOKENS = 16
SHAPES = {
    "seed": ModelConfig(
        vocab_size=4096,
        dim=64,
        num_layers=4,
        exit_layer=2,
        num_heads=4,
        num_kv_heads=4,
        hidden_dim=176,
        max_seq_len=2304,
    ),
    "wide": ModelConfig(
        vocab_size=2048,
        dim=256,
        num_layers=8,
        exit_layer=4,
        num_heads=8,
        num_kv_heads=8,
        hidden_dim=704,
        max_seq_len=8448,
    ),
    # SmolLM2-135M
    "smol": ModelConfig(
        vocab_size=49152,
        dim=576,
        num_layers=30,
        exit_layer=15,
        num_heads=9,
        num_kv_heads=3,
        hidden_dim=1536,
        max_seq_len=2304,
    ),
}
# what only a GPU is asked for: GPT-2 124M's sizes, the MLP with as many weights, and Llama-3.2-1B
SHAPES["gpt2"] = ModelConfig(
    vocab_size=50257,
    dim=768,
    num_layers=12,
    exit_layer=6,
    num_heads=12,
    num_kv_heads=12,
    hidden_dim=2048,
    max_seq_len=2304,
)
SHAPES["llama1b"] = ModelConfig(
    vocab_size=128256,
    dim=2048,
    num_layers=16,
    exit_layer=8,
    num_heads=32,
    num_kv_heads=8,
    hidden_dim=8192,
    rope_theta=500_000.0,
    max_seq_len=2304,
)
# the experiment that this project starts from: ordinary upper layers, holes, some 70,000 words
SHAPES["source"] = replace(SHAPES["seed"], vocab_size=70_000, upper_kv="own")


class Run(NamedTuple):
    """One generation of a row; the first new token is not timed, so that no prompt is."""

    tokens: list[int]
    exit_layer: list[int]
    seconds: float  # a token


Runner = Callable[[Tensor, int], Run]


@functools.lru_cache(maxsize=2)
def random_model(shape: str, dtype: str, device: str = "cpu", **changes: Any) -> LegoModel:
    """A model that says something new every step: with the usual initial values attention is flat
    and the embedding outweighs the layers, so that a tied head repeats one token for ever."""
    torch.manual_seed(0)
    config = replace(SHAPES[shape], **changes)
    with torch.device(device):
        model = LegoModel(config).requires_grad_(False)
    for block in (*model.lower, *model.upper):
        for projection in (block.attention.o_proj, block.mlp.down_proj):
            projection.weight *= 2 * (2 * config.num_layers) ** 0.5
        for projection in (block.attention.in_proj, block.mlp.gate_up_proj):
            projection.weight *= 4
    if config.upper_kv == "exit_state":
        model.upper_kv_proj.weight *= 4
    if model.upper:
        model.gate.weight.normal_(std=config.dim**-0.5)
    return model.to(getattr(torch, dtype))


def random_prompt(config: ModelConfig, num_tokens: int = PROMPT_TOKENS) -> Tensor:
    return torch.randint(
        config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1)
    )


class Engine:
    """The native decoder on one row, which can take its prompt again and again."""

    Kind: type[Decoder] | type[DeviceDecoder] = Decoder

    def __init__(self, model: LegoModel, num_slots: int, **options: Any) -> None:
        self.decoder = self.Kind(decoder_weights(model), 1, num_slots, **options)
        self.confidence: list[float] = []
        self._before = replace(self.decoder.counts)

    @property
    def counts(self) -> Counts:
        """Calls of the timed tokens of the last run."""
        after, before = vars(self.decoder.counts), vars(self._before)
        return Counts(**{name: after[name] - before[name] for name in after})

    def __call__(self, prompt: Tensor, num_tokens: int) -> Run:
        decoder = self.decoder
        decoder.prefill([prompt])
        first = decoder.step()
        self._before = replace(decoder.counts)
        start = perf_counter()
        rest = self._steps(num_tokens - 1)
        seconds = perf_counter() - start
        new = [*first, *rest]
        self.confidence = [n.confidence for n in new]
        return Run([n.token for n in new], [n.exit_layer for n in new], seconds / len(rest))

    def _steps(self, num_tokens: int) -> list[NewToken]:
        return [self.decoder.step()[0] for _ in range(num_tokens)]


class DeviceEngine(Engine):
    """The same by DeviceDecoder, on the model's device, which is kept a step ahead of the host."""

    Kind = DeviceDecoder

    def _steps(self, num_tokens: int) -> list[NewToken]:
        self.decoder.launch()
        new = [self.decoder.step()[0] for _ in range(num_tokens - 1)]
        return [*new, *self.decoder.collect()]


class EngineAt:
    """The native decoder after a prompt, which can take the same tokens again and again."""

    def __init__(self, model: LegoModel, prompt: Tensor, num_tokens: int) -> None:
        self._engine = Engine(model, len(prompt) + num_tokens)
        self.run = self._engine(prompt, num_tokens)
        self.counts = self._engine.counts
        self._after = (len(prompt), self.run.tokens[0])

    def __call__(self) -> float:
        """Seconds a token."""
        decoder, (position, token) = self._engine.decoder, self._after
        state = decoder.state
        state.position[0], state.last[0], state.upper_len[0] = position, token, position
        start = perf_counter()
        tokens = [decoder.step()[0].token for _ in self.run.tokens[1:]]
        seconds = perf_counter() - start
        assert tokens == self.run.tokens[1:]
        return seconds / len(tokens)


def reference(model: LegoModel, strategy: Strategy) -> Runner:
    """lego.generation.generate with this strategy."""

    def run(prompt: Tensor, num_tokens: int) -> Run:
        times: list[float] = []

        def note_time(new: GeneratedToken) -> None:
            times.append(perf_counter())

        out = generate(model, [prompt], num_tokens, strategy, streamer=note_time)
        seconds = (times[-1] - times[0]) / (num_tokens - 1)
        return Run(out.tokens[0], out.exit_layer[0], seconds)

    return run


def plain_reading(num_bytes: float) -> Runner:
    """A sum over a flat float32 tensor of so many bytes, once a token."""
    flat = torch.ones(round(num_bytes) // 4)

    def run(prompt: Tensor, num_tokens: int) -> Run:
        start = perf_counter()
        for _ in range(num_tokens - 1):
            flat.sum()
        return Run([], [], (perf_counter() - start) / (num_tokens - 1))

    return run


def timed(runner: Runner, prompt: Tensor, num_tokens: int) -> Callable[[], float]:
    """The runner as lego.timing.paired_seconds takes it."""
    return lambda: runner(prompt, num_tokens).seconds


@torch.no_grad()
def logits_of(model: LegoModel, prompt: Tensor, run: Run) -> Tensor:
    """The logits that each token of a run was chosen from, float64 [num_tokens, V].

    All at once, in the dtype of the model: for full depth, and for exit-state models.
    """
    device = model.embedding.weight.device
    ids = torch.cat((prompt, torch.tensor(run.tokens[:-1], dtype=torch.int64)))
    states = model(ids[None].to(device))
    new = slice(len(prompt) - 1, None)
    is_deep = torch.tensor(run.exit_layer, device=device) == model.config.num_layers
    logits = torch.where(
        is_deep[:, None],
        model.final_logits(states.final_state[0, new]),
        model.exit_logits(states.exit_state[0, new]),
    )
    return logits.double().cpu()


def assert_greedy(model: LegoModel, prompt: Tensor, run: Run) -> None:
    """Each token has the highest logit, as far as the dtype tells: in float32, none is lower than
    eager PyTorch can be wrong about in the dtype of the model."""
    exact = logits_of(_in_float32(model), prompt, run)
    error = (logits_of(model, prompt, run) - exact).abs().max()
    gap = exact.amax(dim=-1) - exact.gather(1, torch.tensor(run.tokens)[:, None])[:, 0]
    assert gap.max() <= 2 * error, (gap, error)


@functools.lru_cache(maxsize=1)
def _in_float32(model: LegoModel) -> LegoModel:
    if model.embedding.weight.dtype == torch.float32:
        return model
    with model.embedding.weight.device:
        wide = LegoModel(model.config).requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    return wide


def assert_varied(tokens: Sequence[int]) -> None:
    """A run that repeats itself would agree with anything."""
    assert len(set(tokens)) > len(tokens) // 4, tokens
