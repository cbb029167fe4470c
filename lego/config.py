"""Configuration of models, training, data and whole experiments, with the three presets.

Every class is frozen, keyword-only and checks itself: a bad value is a ValueError that names the
field, what must hold and what came.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

UpperKV = Literal["exit_state", "own"]
Criterion = Literal["max_prob", "margin", "entropy", "gate"]
KVPolicy = Literal["exact", "hole", "propagate", "recompute"]
Recipe = Literal["lego", "joint"]
RopeType = Literal["default", "linear", "llama3"]
TokenizerKind = Literal["bpe", "word"]


# the KV policies that go with each kind of upper block, the default first
KV_POLICIES: dict[UpperKV, tuple[KVPolicy, ...]] = {
    "exit_state": ("exact",),
    "own": ("recompute", "propagate", "hole"),
}


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: {rule}, got {got}")


def _require_choice(name: str, value: object, choices: Any) -> None:
    legal = get_args(choices)
    _require(value in legal, name, f"must be one of {legal}", repr(value))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one model: exit_layer lower layers, then num_layers - exit_layer upper ones.

    A dense model (a baseline) has exit_layer == num_layers: its upper block is empty.

    Attributes:
        vocab_size: Replaced by the size of the tokenizer when a model is trained on a corpus.
        dim: Model width.
        num_layers: All layers.
        exit_layer: Layers of the lower block.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; a divisor of num_heads.
        hidden_dim: Width of the SwiGLU MLP.
        max_seq_len: Positions that a cache may hold.
        upper_kv: Where upper layers take keys and values from: the exit state or their own stream.
        rope_theta: Base of the rotary angles.
        rope_type: Which rotary frequencies are scaled: none, all (linear) or low ones (llama3).
        rope_factor: What scaled frequencies are divided by; 1 if none are.
        rope_low_freq_factor: Turns in rope_original_seq_len up to which a frequency is low;
            llama3 alone.
        rope_high_freq_factor: Turns from which it is not; between the two it is in part.
        rope_original_seq_len: Positions before the scaling.
        norm_eps: Added to the mean square by every norm.
        qk_norm: Normalise queries and keys by head.
        qkv_bias: Biases in the query, key and value projections.
        tie_embeddings: The head is the embedding.
    """

    vocab_size: int = 2048
    dim: int = 128
    num_layers: int = 4
    exit_layer: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    hidden_dim: int = 352
    max_seq_len: int = 512
    upper_kv: UpperKV = "exit_state"
    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_seq_len: int = 8192
    norm_eps: float = 1e-5
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "hidden_dim"):
            _require(
                getattr(self, name) >= 1, f"ModelConfig.{name}", "must be >= 1", getattr(self, name)
            )
        _require(
            1 <= self.exit_layer <= self.num_layers,
            "ModelConfig.exit_layer",
            f"must be in [1, num_layers={self.num_layers}]",
            self.exit_layer,
        )
        _require(
            self.dim % (2 * self.num_heads) == 0,
            "ModelConfig.dim",
            f"must be a multiple of 2 * num_heads={2 * self.num_heads}",
            self.dim,
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "ModelConfig.num_kv_heads",
            f"must divide num_heads={self.num_heads}",
            self.num_kv_heads,
        )
        _require(self.max_seq_len >= 2, "ModelConfig.max_seq_len", "must be >= 2", self.max_seq_len)
        _require_choice("ModelConfig.upper_kv", self.upper_kv, UpperKV)
        self._check_rope()

    def _check_rope(self) -> None:
        theta, length = self.rope_theta, self.rope_original_seq_len
        _require(0 < theta < float("inf"), "ModelConfig.rope_theta", "must be positive", theta)
        _require_choice("ModelConfig.rope_type", self.rope_type, RopeType)
        factor, low, high = self.rope_factor, self.rope_low_freq_factor, self.rope_high_freq_factor
        name = "ModelConfig.rope_factor"
        _require(1 <= factor < float("inf"), name, "must be finite and >= 1", factor)
        unscaled = self.rope_type == "default"
        _require(factor == 1 or not unscaled, name, "must be 1 with rope_type='default'", factor)
        _require(
            0 < low < high < float("inf"),
            "ModelConfig.rope_low_freq_factor",
            f"must be in (0, rope_high_freq_factor={high})",
            low,
        )
        name = "ModelConfig.rope_original_seq_len"
        _require(isinstance(length, int) and length >= 1, name, "must be an int >= 1", length)
        if self.rope_type != "llama3":
            for name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_seq_len"):
                value, default = getattr(self, name), getattr(ModelConfig, name)
                rule = f"must be {default} without rope_type='llama3'"
                _require(value == default, f"ModelConfig.{name}", rule, value)

    @property
    def rope_band(self) -> tuple[float, float] | None:
        """The two freq_factors of llama3 in turns per position; None for other types."""
        if self.rope_type != "llama3":
            return None
        length = self.rope_original_seq_len
        return self.rope_low_freq_factor / length, self.rope_high_freq_factor / length

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_upper_layers(self) -> int:
        return self.num_layers - self.exit_layer

    def dense(self, num_layers: int) -> ModelConfig:
        """The same model with `num_layers` layers and no exit: a baseline."""
        return replace(self, num_layers=num_layers, exit_layer=num_layers)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it becomes token ids.

    Attributes:
        name: pydocs, stdlib, wikitext2, wikitext2-mini, or a path to a .txt or .jsonl file.
        data_dir: Folder with the token files of a WikiText corpus, instead of a download.
        tokenizer: Byte-level BPE, or whole words between spaces.
        vocab_size: Tokens at most; a small text may give fewer.
    """

    name: Annotated[str, tyro.conf.arg(prefix_name=False, name="data")] = "pydocs"
    data_dir: Annotated[Path | None, tyro.conf.arg(prefix_name=False)] = None
    tokenizer: TokenizerKind = "bpe"
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        _require(bool(self.name), "DataConfig.name", "must not be empty", repr(self.name))
        _require(self.vocab_size >= 258, "DataConfig.vocab_size", "must be >= 258", self.vocab_size)
        _require_choice("DataConfig.tokenizer", self.tokenizer, TokenizerKind)

    def resolved(self) -> DataConfig:
        """The same with absolute paths, so that a run is found from any folder."""
        name = str(Path(self.name).resolve()) if Path(self.name).is_file() else self.name
        data_dir = None if self.data_dir is None else self.data_dir.resolve()
        return replace(self, name=name, data_dir=data_dir)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained; the same values serve both phases and the baselines.

    Attributes:
        recipe: lego is phase 1, mining, phase 2; joint trains both exits together.
        max_tokens: Train on so many tokens, windows spread evenly over the split; 0 for all.
        seq_len: Tokens of a window.
        batch_size: Windows of a step.
        epochs: Passes over the training tokens, a phase; early stopping may end it before.
        learning_rate: Of AdamW at its peak: linear warm-up, then a cosine to a tenth.
        warmup_steps: Steps of warm-up, a quarter of all steps at most.
        weight_decay: Of matrices; vectors have none.
        grad_clip: Largest norm of the gradient.
        hard_example_ratio: Share of tokens, the least confident, that phase 2 learns from.
        evals_per_epoch: How often the held-out loss is measured.
        patience: Measurements without a better held-out loss before a phase ends.
        holdout_ratio: Share of the training windows held out for early stopping.
        joint_exit_weight: Weight of the exit loss against the final loss; joint alone.
        layer_dropout: Largest probability to skip an upper layer in a step; joint alone.
        bf16: Compute in bfloat16 where autocast allows.
        seed: Of initial weights and data order.
        checkpoint_seconds: A kill loses at most so much work.
    """

    recipe: Recipe = "lego"
    max_tokens: int = 0
    seq_len: int = 128
    batch_size: int = 4
    epochs: int = 2
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    hard_example_ratio: float = 0.5
    evals_per_epoch: int = 4
    patience: int = 3
    holdout_ratio: float = 0.04
    joint_exit_weight: float = 0.5
    layer_dropout: float = 0.1
    bf16: bool = False
    seed: int = 0
    checkpoint_seconds: float = 15.0

    def __post_init__(self) -> None:
        names = ("seq_len", "batch_size", "epochs", "evals_per_epoch", "patience")
        for name in names:
            _require(
                getattr(self, name) >= 1, f"TrainConfig.{name}", "must be >= 1", getattr(self, name)
            )
        for name in ("learning_rate", "grad_clip"):
            value = getattr(self, name)
            _require(0 < value < float("inf"), f"TrainConfig.{name}", "must be positive", value)
        for name in ("hard_example_ratio", "holdout_ratio", "joint_exit_weight"):
            value = getattr(self, name)
            _require(0 < value < 1, f"TrainConfig.{name}", "must be in (0, 1)", value)
        _require(
            0 <= self.layer_dropout < 1,
            "TrainConfig.layer_dropout",
            "must be in [0, 1)",
            self.layer_dropout,
        )
        for name in ("max_tokens", "warmup_steps", "weight_decay", "checkpoint_seconds", "seed"):
            _require(
                getattr(self, name) >= 0, f"TrainConfig.{name}", "must be >= 0", getattr(self, name)
            )
        _require(self.seed < 2**63, "TrainConfig.seed", "must be < 2**63", self.seed)
        _require_choice("TrainConfig.recipe", self.recipe, Recipe)


@dataclass(frozen=True, kw_only=True)
class ExitConfig:
    """How tokens leave early when a run is evaluated and timed.

    The threshold is the confidence that 1 - hard_example_ratio of the calibration tokens reach.

    Attributes:
        criterion: Confidence measure of the tables.
        kv_policy: What an exited token leaves in the upper caches; the exact policy if None.
        compare_upper_kv: Train and report the other upper_kv as well, on the same phase 1.
    """

    criterion: Criterion = "max_prob"
    kv_policy: KVPolicy | None = None
    compare_upper_kv: bool = False

    def __post_init__(self) -> None:
        _require_choice("ExitConfig.criterion", self.criterion, Criterion)
        if self.kv_policy is not None:
            _require_choice("ExitConfig.kv_policy", self.kv_policy, KVPolicy)


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """Paired timing of greedy generation at batch 1.

    Attributes:
        num_prompts: Prompts, one after the other, from the validation split.
        prompt_tokens: Length of each.
        new_tokens: Tokens generated from each.
        rounds: Measurements of every strategy, in turns.
        num_threads: CPU threads while timing.
    """

    num_prompts: int = 8
    prompt_tokens: int = 8
    new_tokens: int = 32
    rounds: int = 9
    num_threads: int = 1

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "new_tokens", "num_threads"):
            _require(
                getattr(self, name) >= 1,
                f"TimingConfig.{name}",
                "must be >= 1",
                getattr(self, name),
            )
        _require(self.rounds >= 2, "TimingConfig.rounds", "must be >= 2", self.rounds)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that a run depends on. model.vocab_size is replaced by the tokenizer's."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    exit: ExitConfig = field(default_factory=ExitConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)

    def __post_init__(self) -> None:
        longest = max(self.train.seq_len, self.timing.prompt_tokens + self.timing.new_tokens)
        _require(
            longest <= self.model.max_seq_len,
            "ExperimentConfig.model.max_seq_len",
            f"must be >= {longest}, the longest sequence of train and timing",
            self.model.max_seq_len,
        )
        policies = KV_POLICIES[self.model.upper_kv]
        _require(
            self.exit.kv_policy in (None, *policies),
            "ExperimentConfig.exit.kv_policy",
            f"must be one of {policies} for upper_kv={self.model.upper_kv!r}",
            repr(self.exit.kv_policy),
        )
        _require(
            self.model.num_upper_layers >= 1,
            "ExperimentConfig.model.exit_layer",
            f"must be < num_layers={self.model.num_layers}",
            self.model.exit_layer,
        )


PRESETS: dict[str, ExperimentConfig] = {
    # about two minutes on two cores, nothing to download
    "quick": ExperimentConfig(
        train=TrainConfig(max_tokens=200_000, epochs=1),
        timing=TimingConfig(num_prompts=4, rounds=7),
    ),
    # the shape, data and decoding of the two source experiments
    "seed": ExperimentConfig(
        data=DataConfig(name="wikitext2", tokenizer="word", vocab_size=70_000),
        model=ModelConfig(dim=64, hidden_dim=176, upper_kv="own"),
        train=TrainConfig(max_tokens=320_000, seq_len=32, batch_size=16, epochs=1),
        exit=ExitConfig(kv_policy="hole", compare_upper_kv=True),
    ),
    "wide": ExperimentConfig(
        data=DataConfig(name="stdlib"),
        model=ModelConfig(
            dim=256, num_layers=8, exit_layer=4, num_heads=8, num_kv_heads=8, hidden_dim=704
        ),
        train=TrainConfig(max_tokens=400_000, epochs=1, learning_rate=2e-3),
    ),
}
