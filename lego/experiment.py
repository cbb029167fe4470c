"""Experiments 001 and 002 end to end: train, score, generate, time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lego.calibration import Calibration, calibrate_by_quantile
from lego.checkpoint import Checkpoint, save_checkpoint
from lego.config import Criterion, ExperimentConfig, ModelConfig, UpperKV
from lego.cost import dense_true_cost, expected_true_cost, layer_cost
from lego.data import Corpus, TokenSplit, num_windows, prepare_corpus, window_batch
from lego.evaluation import (
    TokenScores,
    perplexity,
    quality,
    routed,
    score_tokens,
    stepwise_nll,
)
from lego.model import LegoModel
from lego.strategies import EarlyExit, FullDepth, Speculative, Strategy, Uncached
from lego.timed_generation import (
    TimedGeneration,
    early_exit_results,
    kv_cache_results,
    native_engine_results,
    prompt_windows,
    time_generation,
)
from lego.training.loop import Evaluation
from lego.training.phases import Trained, Watch, train_dense, train_lego
from lego.training.windows import Windows

# windows of the validation split that are also decoded step by step
_STEPWISE_WINDOWS = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run found: results as written to results.json, and what the plots are drawn from."""

    results: dict[str, Any]
    history: dict[str, list[Evaluation]]
    scores: TokenScores
    checkpoint: Checkpoint


def load_corpus(config: ExperimentConfig) -> Corpus:
    """The corpus of a run; ValueError, before any training, if it is missing or too small."""
    corpus = prepare_corpus(config.data)
    Windows.split(corpus.train.ids, config.train)
    for split in (corpus.calibration, corpus.validation):
        num_windows(split.ids, config.train.seq_len)
    prompt_windows(corpus.validation, config.timing.num_prompts, config.timing.prompt_tokens)
    return corpus


def run_experiment(config: ExperimentConfig, corpus: Corpus, folder: Path, watch: Watch) -> Outcome:
    """Train both phases and both baselines, evaluate, generate and time.

    Phases found whole in folder/training are not repeated. Checkpoints are written to
    folder/checkpoint and folder/baselines.
    """
    import lego.engine  # noqa: F401  if it cannot be imported, then before the training

    trained, checkpoint = train_checkpoint(config, corpus, folder, watch)
    windows = Windows.split(corpus.train.ids, config.train)
    model_config, training = trained.model.config, folder / "training"
    dense = {}
    for name, depth in _baseline_depths(model_config).items():
        dense[name] = train_dense(model_config, depth, config.train, windows, training, watch)
        save_checkpoint(folder / "baselines" / name, Checkpoint(dense[name], corpus.tokenizer))
    assert checkpoint.calibration is not None
    results, scores = _measure(trained, checkpoint.calibration, corpus, config)
    cheapest = min(results["criteria"], key=lambda name: results["criteria"][name]["true_cost"])
    routed_nll, _ = routed(scores, cheapest, results["criteria"][cheapest]["threshold"])
    baselines = {
        name: _baseline_results(model, corpus.validation, model_config, routed_nll, config)
        for name, model in dense.items()
    }
    results = {"data": _data_results(corpus), **results, "baselines": baselines}
    results["compared_by"] = cheapest
    history = dict(trained.history)
    if config.exit.compare_upper_kv:
        results["comparison"], other_history = _compare(config, corpus, model_config, folder, watch)
        history |= other_history
    return Outcome(results=results, history=history, scores=scores, checkpoint=checkpoint)


def train_checkpoint(
    config: ExperimentConfig, corpus: Corpus, folder: Path, watch: Watch
) -> tuple[Trained, Checkpoint]:
    """Train both phases, calibrate the thresholds and save folder/checkpoint."""
    model_config = replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
    windows = Windows.split(corpus.train.ids, config.train)
    trained = train_lego(model_config, config.train, windows, folder / "training", watch)
    calibration = _calibrate(trained.model, corpus, config)
    checkpoint = Checkpoint(trained.model, corpus.tokenizer, calibration)
    save_checkpoint(folder / "checkpoint", checkpoint)
    return trained, checkpoint


def _calibrate(model: LegoModel, corpus: Corpus, config: ExperimentConfig) -> Calibration:
    confidence = score_tokens(model, corpus.calibration, config.train.seq_len).confidence
    return calibrate_by_quantile(confidence, 1 - config.train.hard_example_ratio)


def _data_results(corpus: Corpus) -> dict[str, Any]:
    splits = (corpus.train, corpus.calibration, corpus.validation)
    return {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "tokens": sum(len(split.ids) for split in splits),
        "description": corpus.description,
        "vocab_size": corpus.tokenizer.vocab_size,
    }


def _baseline_depths(config: ModelConfig) -> dict[str, int]:
    return {"dense_shallow": config.exit_layer, "dense_deep": config.num_layers}


def _baseline_results(
    dense: LegoModel,
    split: TokenSplit,
    lego: ModelConfig,
    lego_nll_N: torch.Tensor,
    config: ExperimentConfig,
) -> dict[str, Any]:
    """Quality and cost of a dense model, and how far LEGO is from it on the same tokens.

    The difference, in nats per token, has the standard error of its mean over windows.
    """
    seq_len = config.train.seq_len
    scores = score_tokens(dense, split, seq_len)
    found = quality(scores.nll_shallow, scores.correct_shallow, split)
    difference_W = (lego_nll_N - scores.nll_shallow).double().view(-1, seq_len).mean(dim=1)
    return {
        "num_layers": dense.config.num_layers,
        "val_ppl": found.ppl,
        "val_acc": found.accuracy,
        "bits_per_byte": found.bits_per_byte,
        "true_cost": dense_true_cost(lego, dense.config.num_layers),
        "lego_minus_dense_nats": difference_W.mean().item(),
        "standard_error": (difference_W.std() / len(difference_W) ** 0.5).item(),
    }


def _compare(
    config: ExperimentConfig,
    corpus: Corpus,
    model_config: ModelConfig,
    folder: Path,
    watch: Watch,
) -> tuple[dict[str, Any], dict[str, list[Evaluation]]]:
    """The same run with the other upper K/V and its exact policy, on the same phase 1."""
    upper_kv: UpperKV = "exit_state" if model_config.upper_kv == "own" else "own"
    config = replace(config, exit=replace(config.exit, kv_policy=None))
    windows = Windows.split(corpus.train.ids, config.train)
    other = replace(model_config, upper_kv=upper_kv)
    trained = train_lego(other, config.train, windows, folder / "training", watch)
    calibration = _calibrate(trained.model, corpus, config)
    results, _ = _measure(trained, calibration, corpus, config)
    return results, trained.history


def _measure(
    trained: Trained, calibration: Calibration, corpus: Corpus, config: ExperimentConfig
) -> tuple[dict[str, Any], TokenScores]:
    """Everything here is measured on the validation split."""
    model, seq_len, criterion = trained.model, config.train.seq_len, config.exit.criterion
    scores = score_tokens(model, corpus.validation, seq_len)

    def early_exit(by: Criterion) -> EarlyExit:
        return EarlyExit(
            threshold=calibration.threshold[by], criterion=by, kv_policy=config.exit.kv_policy
        )

    timed, native_engine = _time(
        model, corpus.validation, early_exit(criterion), early_exit("gate"), config
    )
    criteria = {
        name: two_stage(model, scores, corpus.validation, name, threshold)
        for name, threshold in calibration.threshold.items()
    }
    routed_nll, _ = routed(scores, criterion, calibration.threshold[criterion])
    results = {
        "experiment_001": {
            **_phase_results(trained, scores, corpus.validation),
            "two_stage": criteria[criterion],
            "kv_cache": kv_cache_results(timed),
        },
        "experiment_002": early_exit_results(timed, "exit"),
        "experiment_002_gate": early_exit_results(timed, "gate"),
        "native_engine": native_engine,
        "criteria": criteria,
        "stepwise": _stepwise(
            model, corpus.validation, routed_nll.view(-1, seq_len), early_exit(criterion)
        ),
        "threshold": calibration.threshold[criterion],
        "criterion": criterion,
        "recipe": config.train.recipe,
        "upper_kv": model.config.upper_kv,
        "kv_policy": early_exit(criterion).policy_for(model),
    }
    return results, scores


def _time(
    model: LegoModel,
    split: TokenSplit,
    by_exit: EarlyExit,
    by_gate: EarlyExit,
    config: ExperimentConfig,
) -> tuple[TimedGeneration, dict[str, Any]]:
    """Every strategy in turns; and the native engine's results, or why there are none."""
    from lego.engine import NativeEngine, why_not

    strategies: dict[str, Strategy] = {
        "uncached": Uncached(),
        "uncached_last": Uncached(all_logits=False),
        "full": FullDepth(),
        "exit": by_exit,
        "gate": by_gate,
    }
    if problem := why_not(model):
        return time_generation(model, split, strategies, config.timing), {"why_not": problem}
    native: dict[str, Strategy] = {
        "native_full": FullDepth(),
        "native_exit": by_exit,
        "native_gate": by_gate,
        "native_speculative": Speculative(),
    }
    engines = dict.fromkeys(native, NativeEngine(model))
    timed = time_generation(model, split, strategies | native, config.timing, engines=engines)
    return timed, native_engine_results(timed)


def _phase_results(trained: Trained, scores: TokenScores, split: TokenSplit) -> dict[str, Any]:
    """Each phase on all tokens, and on hard and easy ones: the same tokens for both phases."""
    hard_N = scores.confidence["max_prob"] < trained.hard_threshold

    def phase(nll_N: torch.Tensor, correct_N: torch.Tensor) -> dict[str, float]:
        found = quality(nll_N, correct_N, split)
        return {
            "val_ppl": found.ppl,
            "val_acc": found.accuracy,
            "hard_ppl": perplexity(nll_N[hard_N]),
            "easy_ppl": perplexity(nll_N[~hard_N]),
            "word_ppl": found.word_ppl,
            "bits_per_byte": found.bits_per_byte,
        }

    return {
        "phase1": phase(scores.nll_shallow, scores.correct_shallow),
        "phase2": phase(scores.nll_deep, scores.correct_deep),
        "hard_share": hard_N.double().mean().item(),
    }


def two_stage(
    model: LegoModel,
    scores: TokenScores,
    split: TokenSplit,
    criterion: Criterion,
    threshold: float,
) -> dict[str, float]:
    """Routing by one criterion: shares, costs and routed quality."""
    found = quality(*routed(scores, criterion, threshold), split)
    shallow_N = scores.confidence[criterion] >= threshold
    shallow = int(shallow_N.sum())
    ratio = shallow / len(shallow_N)
    return {
        "threshold": threshold,
        "shallow_ratio": ratio,
        "layer_cost": layer_cost(model.config, shallow, len(shallow_N) - shallow),
        "true_cost": expected_true_cost(model.config, ratio, criterion),
        "routed_ppl": found.ppl,
        "routed_acc": found.accuracy,
        "bits_per_byte": found.bits_per_byte,
    }


def _stepwise(
    model: LegoModel, split: TokenSplit, routed_nll: torch.Tensor, strategy: EarlyExit
) -> dict[str, float]:
    """Is the parallel evaluation what decoding does? Both on the same windows, teacher-forced.

    routed_nll is [windows, seq_len], by the same criterion and threshold.
    """
    seq_len = routed_nll.size(1)
    count = min(_STEPWISE_WINDOWS, num_windows(split.ids, seq_len))
    place = torch.arange(count) * num_windows(split.ids, seq_len) // count
    windows = window_batch(split.ids, seq_len, place)
    nll_BT, depth_BT = stepwise_nll(model, windows, strategy)
    nll_N = routed_nll[place].flatten()
    stepwise, parallel = perplexity(nll_BT.flatten()), perplexity(nll_N)
    shallow_BT = depth_BT < model.config.num_layers
    return {
        "tokens": nll_N.numel(),
        "shallow_ratio": shallow_BT.double().mean().item(),
        "stepwise_ppl": stepwise,
        "routed_ppl": parallel,
        "difference": stepwise - parallel,
    }
