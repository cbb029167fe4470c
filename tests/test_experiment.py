"""Experiments 001 and 002 end to end: the numbers fit together."""

import json
import math
import signal

import pytest
import torch

import lego.terminal
from lego.checkpoint import load_checkpoint
from lego.cli import run_command
from lego.cost import dense_true_cost, expected_true_cost
from lego.data import prepare_corpus
from lego.evaluation import quality, routed, score_tokens
from lego.run_folder import RunFolder
from tests.runs import (
    Killer,
    finished_run,
    in_process,
    run_args,
    same_tensors,
)

CRITERIA = ["max_prob", "margin", "entropy", "gate"]


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv("LEGO_CACHE", str(finished_run()[2]))


@pytest.fixture(scope="module")
def results():
    return RunFolder(finished_run()[0]).results()


def test_keys(results):
    """What the documentation promises is there; more may be."""
    first, second = results["experiment_001"], results["experiment_002"]
    assert {"name", "sha256", "tokens"} <= results["data"].keys()
    for phase in ("phase1", "phase2"):
        assert {"val_ppl", "val_acc", "hard_ppl"} <= first[phase].keys()
    assert {"shallow_ratio", "layer_cost", "true_cost", "routed_ppl"} <= first["two_stage"].keys()
    cache_keys = {"uncached_ms_per_token", "cached_ms_per_token", "speedup"}
    assert cache_keys <= first["kv_cache"].keys()
    wanted = "shallow_tokens deep_tokens shallow_ratio layer_cost layer_savings true_cost speedup"
    wanted += " full_ms_per_token exit_ms_per_token realised_savings time_efficiency"
    assert set(wanted.split()) <= second.keys()
    assert list(results["baselines"]) == ["dense_shallow", "dense_deep"]
    for baseline in results["baselines"].values():
        assert {"val_ppl", "true_cost"} <= baseline.keys()
    assert {"threshold", "environment"} <= results.keys()
    assert {"torch", "python", "cpu", "lego"} <= results["environment"].keys()


def test_generation_adds_up(results):
    for name in ("experiment_002", "experiment_002_gate"):
        found = results[name]
        shallow, deep = found["shallow_tokens"], found["deep_tokens"]
        assert shallow + deep == 2 * 5
        assert found["shallow_ratio"] == shallow / 10
        assert found["layer_cost"] == pytest.approx((2 * shallow + 4 * deep) / 40)
        assert found["layer_savings"] == pytest.approx(1 - found["layer_cost"])
        assert found["time_efficiency"] == pytest.approx(found["true_cost"] * found["speedup"])
        assert min(found["full_ms_per_token"], found["exit_ms_per_token"]) > 0
        if found["true_cost"] > 0.9:
            assert found["realised_savings"] is None
        else:
            saved = (1 - 1 / found["speedup"]) / (1 - found["true_cost"])
            assert found["realised_savings"] == pytest.approx(saved)


def test_native_engine_does_what_the_reference_does(results):
    native = results["native_engine"]
    for name, reference in (("exit", "experiment_002"), ("gate", "experiment_002_gate")):
        for key in ("shallow_ratio", "layer_cost", "true_cost"):
            assert native[name][key] == results[reference][key]
    speculative = native["speculative"]
    assert native["same_tokens"] == speculative["same_tokens"] == 10
    assert speculative["shallow_tokens"] == 0
    assert 0 < speculative["upper_passes_per_token"] <= 1 <= speculative["head_calls_per_token"]
    assert min(native["full_ms_per_token"], native["speedup_over_reference"]) > 0


def test_quality_is_that_of_the_checkpoint(results):
    """Everything that does not need a clock, again from the files of the run."""
    folder = RunFolder(finished_run()[0])
    found, config = load_checkpoint(folder.checkpoint), folder.config()
    corpus = prepare_corpus(config.data)
    assert results["data"]["sha256"] == corpus.sha256
    splits = (corpus.train, corpus.calibration, corpus.validation)
    assert results["data"]["tokens"] == sum(len(split.ids) for split in splits)
    scores = score_tokens(found.model, corpus.validation, 16)
    first = results["experiment_001"]
    for phase, nll, correct in (
        ("phase1", scores.nll_shallow, scores.correct_shallow),
        ("phase2", scores.nll_deep, scores.correct_deep),
    ):
        assert first[phase]["val_ppl"] == pytest.approx(math.exp(nll.double().mean()))
        assert first[phase]["val_acc"] == pytest.approx(float(correct.double().mean()))
        # the share of hard tokens weighs both halves
        hard = first["hard_share"]
        parts = hard * math.log(first[phase]["hard_ppl"])
        parts += (1 - hard) * math.log(first[phase]["easy_ppl"])
        assert math.exp(parts) == pytest.approx(first[phase]["val_ppl"], rel=1e-5)
    assert list(results["criteria"]) == list(found.calibration.threshold) == CRITERIA
    assert results["threshold"] == found.calibration.threshold["max_prob"]
    assert first["two_stage"] == results["criteria"]["max_prob"]
    for name, threshold in found.calibration.threshold.items():
        part = results["criteria"][name]
        ratio = float((scores.confidence[name] >= threshold).double().mean())
        assert part["shallow_ratio"] == pytest.approx(ratio)
        assert part["layer_cost"] == pytest.approx(1 - ratio / 2)
        assert part["true_cost"] == pytest.approx(
            expected_true_cost(found.model.config, ratio, name)
        )
        ppl = quality(*routed(scores, name, threshold), corpus.validation).ppl
        assert part["routed_ppl"] == pytest.approx(ppl)


def test_thresholds_come_from_the_calibration_split():
    folder = RunFolder(finished_run()[0])
    found, corpus = load_checkpoint(folder.checkpoint), prepare_corpus(folder.config().data)
    scores = score_tokens(found.model, corpus.calibration, 16)
    assert found.calibration.num_tokens == len(scores.nll_shallow)
    for name, threshold in found.calibration.threshold.items():
        share = float((scores.confidence[name] >= threshold).double().mean())
        assert share == pytest.approx(0.5, abs=1.5 / found.calibration.num_tokens)


def test_parallel_evaluation_is_what_decoding_does(results):
    step = results["stepwise"]
    assert step["tokens"] > 0
    assert step["stepwise_ppl"] == pytest.approx(step["routed_ppl"], rel=1e-4)
    assert step["difference"] == step["stepwise_ppl"] - step["routed_ppl"]


def test_baselines_are_the_models_saved(results):
    folder = RunFolder(finished_run()[0])
    corpus = prepare_corpus(folder.config().data)
    lego_config = load_checkpoint(folder.checkpoint).model.config
    for name, depth in (("dense_shallow", 2), ("dense_deep", 4)):
        dense = load_checkpoint(folder.path / "baselines" / name)
        part = results["baselines"][name]
        assert dense.calibration is None and part["num_layers"] == depth
        assert (len(dense.model.lower), len(dense.model.upper)) == (depth, 0)
        scores = score_tokens(dense.model, corpus.validation, 16)
        assert part["val_ppl"] == pytest.approx(math.exp(scores.nll_deep.double().mean()))
        assert part["true_cost"] == dense_true_cost(lego_config, depth)


def killed_run(args, at):
    """`lego run` in a process that dies in phase at[0], step at[1]."""
    torch.set_num_threads(1)
    stepped = lego.terminal.PhaseWatcher.stepped

    def stepping(self, step, loss, tokens):
        stepped(self, step, loss, tokens)
        Killer(self.phase, at).stepped(step, loss, tokens)

    lego.terminal.PhaseWatcher.stepped = stepping
    raise SystemExit(run_command(args))


def untimed(results):
    """What the same weights always give: no milliseconds, no machine."""
    first = results["experiment_001"]
    generated = [
        {k: results[name][k] for k in ("shallow_tokens", "deep_tokens", "true_cost")}
        for name in ("experiment_002", "experiment_002_gate")
    ]
    first = {k: v for k, v in first.items() if k != "kv_cache"}
    kept = ("data", "criteria", "stepwise", "threshold", "baselines")
    return first, generated, {k: results[k] for k in kept}


def test_killed_run_goes_on(tmp_path, results, capsys):
    """Killed twice: then the numbers are those of the run never killed."""
    args = run_args(finished_run()[1], tmp_path / "run", "--train.checkpoint-seconds", "0")
    for kill in (("phase2_exit_state", 5), ("dense_4", 7)):
        assert in_process(killed_run, args, kill) == -signal.SIGKILL
        assert not (tmp_path / "run" / "results.json").exists()
    assert run_command(args) == 0
    assert untimed(RunFolder(tmp_path / "run").results()) == untimed(results)
    ours = load_checkpoint(tmp_path / "run" / "checkpoint")
    theirs = load_checkpoint(finished_run()[0] / "checkpoint")
    assert same_tensors(ours.model.state_dict(), theirs.model.state_dict())
    sample = (tmp_path / "run" / "sample.txt").read_bytes()
    assert sample == (finished_run()[0] / "sample.txt").read_bytes()
    done = [line for line in capsys.readouterr().out.splitlines() if "(done before)" in line]
    assert [line.split()[0] for line in done] == ["phase1", "phase2_exit_state", "dense_2"]


def test_source_model_with_comparison(tmp_path, capsys):
    """upper_kv own with policy hole, then the exact model on the same phase 1."""
    more = ("--model.upper-kv", "own", "--exit.kv-policy", "hole", "--exit.compare-upper-kv")
    args = run_args(finished_run()[1], tmp_path / "run", *more, "--json")
    assert run_command(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["upper_kv"], found["kv_policy"]) == ("own", "hole")
    other = found["comparison"]
    assert (other["upper_kv"], other["kv_policy"]) == ("exit_state", "exact")
    assert {"experiment_001", "experiment_002", "criteria", "threshold"} <= other.keys()
    assert found["experiment_001"]["phase1"] == other["experiment_001"]["phase1"]
    assert found["experiment_001"]["phase2"] != other["experiment_001"]["phase2"]
    step = other["stepwise"]
    assert step["stepwise_ppl"] == pytest.approx(step["routed_ppl"], rel=1e-4)
    names = {path.stem for path in (tmp_path / "run" / "training").iterdir()}
    assert names == {"phase1", "phase2_own", "phase2_exit_state", "dense_2", "dense_4"}
    assert load_checkpoint(tmp_path / "run" / "checkpoint").model.config.upper_kv == "own"


def test_joint_recipe(tmp_path, capsys):
    args = run_args(finished_run()[1], tmp_path / "run", "--train.recipe", "joint", "--json")
    assert run_command(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experiment_002"]["shallow_tokens"] + found["experiment_002"]["deep_tokens"] == 10
    names = {path.stem for path in (tmp_path / "run" / "training").iterdir()}
    assert names == {"joint_exit_state", "dense_2", "dense_4"}
