"""Configurations check themselves."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial

import pytest

from lego.config import (
    PRESETS,
    DataConfig,
    ExitConfig,
    ExperimentConfig,
    ModelConfig,
    TimingConfig,
    TrainConfig,
)

LLAMA3 = partial(ModelConfig, rope_type="llama3")


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (ModelConfig, {"vocab_size": 0}, "vocab_size: must be >= 1, got 0"),
        (ModelConfig, {"dim": 0}, "dim: must be >= 1, got 0"),
        (ModelConfig, {"dim": 36}, "dim: must be a multiple of 2 * num_heads=8, got 36"),
        (ModelConfig, {"num_layers": 0}, "num_layers: must be >= 1, got 0"),
        (ModelConfig, {"num_heads": 0}, "num_heads: must be >= 1, got 0"),
        (ModelConfig, {"num_kv_heads": 0}, "num_kv_heads: must be >= 1, got 0"),
        (ModelConfig, {"num_kv_heads": 3}, "num_kv_heads: must divide num_heads=4, got 3"),
        (ModelConfig, {"hidden_dim": -1}, "hidden_dim: must be >= 1, got -1"),
        (ModelConfig, {"exit_layer": 0}, "exit_layer: must be in [1, num_layers=4], got 0"),
        (ModelConfig, {"exit_layer": 5}, "exit_layer: must be in [1, num_layers=4], got 5"),
        (ModelConfig, {"max_seq_len": 1}, "max_seq_len: must be >= 2, got 1"),
        (ModelConfig, {"upper_kv": "x"}, "upper_kv: must be one of ('exit_state', 'own'), got 'x'"),
        (
            ModelConfig,
            {"rope_type": "yarn"},
            "rope_type: must be one of ('default', 'linear', 'lla",
        ),
        (LLAMA3, {"rope_factor": 0.5}, "rope_factor: must be finite and >= 1, got 0.5"),
        (LLAMA3, {"rope_factor": math.nan}, "rope_factor: must be finite and >= 1, got nan"),
        (LLAMA3, {"rope_factor": math.inf}, "rope_factor: must be finite and >= 1, got inf"),
        (ModelConfig, {"rope_factor": 8.0}, "rope_factor: must be 1 with rope_type='default', got"),
        (
            LLAMA3,
            {"rope_low_freq_factor": 4.0},
            "rope_low_freq_factor: must be in (0, rope_high_freq_factor=4.0), got 4.0",
        ),
        (LLAMA3, {"rope_low_freq_factor": 0.0}, "rope_low_freq_factor: must be in (0, rope_high"),
        (LLAMA3, {"rope_high_freq_factor": math.inf}, "rope_low_freq_factor: must be in (0, rope"),
        (LLAMA3, {"rope_original_seq_len": 16.5}, "rope_original_seq_len: must be an int"),
        (ModelConfig, {"rope_theta": math.nan}, "rope_theta: must be positive, got nan"),
        (
            ModelConfig,
            {"rope_low_freq_factor": 2.0},
            "rope_low_freq_factor: must be 1.0 without rope_type='llama3', got 2.0",
        ),
        (LLAMA3, {"rope_original_seq_len": 0}, "rope_original_seq_len: must be an int >= 1, got 0"),
        (DataConfig, {"name": ""}, "name: must not be empty, got ''"),
        (DataConfig, {"vocab_size": 257}, "vocab_size: must be >= 258, got 257"),
        (DataConfig, {"tokenizer": "c"}, "tokenizer: must be one of ('bpe', 'word'), got 'c'"),
        (TrainConfig, {"seq_len": 0}, "seq_len: must be >= 1, got 0"),
        (TrainConfig, {"batch_size": 0}, "batch_size: must be >= 1, got 0"),
        (TrainConfig, {"epochs": 0}, "epochs: must be >= 1, got 0"),
        (TrainConfig, {"evals_per_epoch": 0}, "evals_per_epoch: must be >= 1, got 0"),
        (TrainConfig, {"patience": 0}, "patience: must be >= 1, got 0"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate: must be positive, got 0.0"),
        (TrainConfig, {"learning_rate": math.nan}, "learning_rate: must be positive, got nan"),
        (TrainConfig, {"learning_rate": math.inf}, "learning_rate: must be positive, got inf"),
        (TrainConfig, {"grad_clip": -1.0}, "grad_clip: must be positive, got -1.0"),
        (TrainConfig, {"hard_example_ratio": 0.0}, "hard_example_ratio: must be in (0, 1)"),
        (TrainConfig, {"hard_example_ratio": 1.0}, "hard_example_ratio: must be in (0, 1)"),
        (TrainConfig, {"holdout_ratio": math.nan}, "holdout_ratio: must be in (0, 1), got nan"),
        (TrainConfig, {"joint_exit_weight": 1.0}, "joint_exit_weight: must be in (0, 1)"),
        (TrainConfig, {"layer_dropout": 1.0}, "layer_dropout: must be in [0, 1), got 1.0"),
        (TrainConfig, {"max_tokens": -1}, "max_tokens: must be >= 0, got -1"),
        (TrainConfig, {"warmup_steps": -1}, "warmup_steps: must be >= 0, got -1"),
        (TrainConfig, {"weight_decay": -0.1}, "weight_decay: must be >= 0, got -0.1"),
        (TrainConfig, {"checkpoint_seconds": -1.0}, "checkpoint_seconds: must be >= 0"),
        (TrainConfig, {"seed": -1}, "seed: must be >= 0, got -1"),
        (TrainConfig, {"recipe": "x"}, "recipe: must be one of ('lego', 'joint'), got 'x'"),
        (ExitConfig, {"criterion": "x"}, "criterion: must be one of"),
        (ExitConfig, {"kv_policy": "x"}, "kv_policy: must be one of"),
        (TimingConfig, {"num_prompts": 0}, "num_prompts: must be >= 1, got 0"),
        (TimingConfig, {"prompt_tokens": 0}, "prompt_tokens: must be >= 1, got 0"),
        (TimingConfig, {"new_tokens": 0}, "new_tokens: must be >= 1, got 0"),
        (TimingConfig, {"num_threads": 0}, "num_threads: must be >= 1, got 0"),
        (TimingConfig, {"rounds": 1}, "rounds: must be >= 2, got 1"),
    ],
    ids=str,
)
def test_bad_value(make, changes, message):
    with pytest.raises(ValueError) as error:
        make(**changes)
    name = getattr(make, "func", make).__name__
    assert str(error.value).startswith(f"{name}.{message}")


def test_bad_experiment():
    model = ModelConfig(max_seq_len=48)
    with pytest.raises(ValueError, match="max_seq_len: must be >= 128, the longest sequence"):
        ExperimentConfig(model=model)
    train, timing = TrainConfig(seq_len=48), TimingConfig(prompt_tokens=20, new_tokens=29)
    with pytest.raises(ValueError, match="max_seq_len: must be >= 49"):
        ExperimentConfig(model=model, train=train, timing=timing)
    ExperimentConfig(model=model, train=train, timing=replace(timing, new_tokens=28))
    with pytest.raises(ValueError, match="exit_layer: must be < num_layers=4, got 4"):
        ExperimentConfig(model=ModelConfig(exit_layer=4))


@pytest.mark.parametrize(
    "value",
    [
        ModelConfig(exit_layer=4),
        ModelConfig(vocab_size=1, num_heads=4, num_kv_heads=1, max_seq_len=2),
        ModelConfig(rope_type="linear", rope_factor=1.0),
        ModelConfig(rope_type="llama3", rope_factor=1.0, rope_original_seq_len=1),
        DataConfig(vocab_size=258),
        TrainConfig(layer_dropout=0.0, weight_decay=0.0, checkpoint_seconds=0.0, warmup_steps=0),
        ExitConfig(criterion="gate", kv_policy="recompute"),
        TimingConfig(rounds=2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_edges_are_legal_and_frozen(value):
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, 3)


def test_shape():
    config = ModelConfig(dim=48, num_heads=3, num_kv_heads=1, num_layers=7, exit_layer=3)
    assert (config.head_dim, config.num_upper_layers) == (16, 4)
    dense = config.dense(2)
    assert (dense.num_layers, dense.exit_layer, dense.num_upper_layers) == (2, 2, 0)
    assert replace(dense, num_layers=7, exit_layer=3) == config


def test_rope_band():
    assert ModelConfig().rope_band is None
    assert ModelConfig(rope_type="linear", rope_factor=2.0).rope_band is None
    assert ModelConfig(rope_type="llama3", rope_original_seq_len=32).rope_band == (1 / 32, 4 / 32)


def test_presets():
    assert list(PRESETS) == ["quick", "seed", "wide"]
    seed = PRESETS["seed"]
    assert (seed.model.dim, seed.model.num_heads, seed.model.upper_kv) == (64, 4, "own")
    assert (seed.model.exit_layer, seed.model.num_layers) == (2, 4)
    assert seed.train.max_tokens == 10_000 * 32 and seed.train.seq_len == 32
    assert seed.exit.kv_policy == "hole" and seed.exit.compare_upper_kv
    assert PRESETS["quick"].data.name == "pydocs"
