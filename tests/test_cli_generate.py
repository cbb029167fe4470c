"""`lego generate`: every mode and option, on runs that were trained on a tiny text."""

import itertools
import json
import shutil

import pytest

from lego.checkpoint import load_checkpoint
from lego.cli import run_command
from lego.run_folder import RunFolder
from tests.runs import finished_run, own_run


def generate(capsys, folder, *more):
    args = ["generate", str(folder), "--prompt", "ann sees", "--max-new-tokens", "6", *more]
    assert run_command(args) == 0
    return capsys.readouterr()


def test_generate_modes(capsys):
    folder = finished_run()[0]
    found = {
        mode: json.loads(generate(capsys, folder, "--json", "--mode", mode).out)
        for mode in ("early-exit", "full", "speculative", "uncached")
    }
    assert found["full"]["tokens"] == found["uncached"]["tokens"]
    assert found["full"]["tokens"] == found["speculative"]["tokens"]
    assert found["full"]["exit_layer"] == found["speculative"]["exit_layer"]
    assert found["full"]["exit_layer"] == found["uncached"]["exit_layer"] == [4] * 6
    assert found["full"]["confidence"] == [None] * 6
    early = found["early-exit"]
    assert early["shallow_tokens"] == early["exit_layer"].count(2)
    threshold = RunFolder(folder).results()["threshold"]
    for depth, confidence in zip(early["exit_layer"], early["confidence"], strict=True):
        assert (confidence >= threshold) == (depth == 2)
    tokenizer = load_checkpoint(folder / "checkpoint").tokenizer
    assert early["text"] == tokenizer.decode(early["tokens"])
    assert early["stats"]["decode"] and early["stats"]["prefill"]


@pytest.mark.parametrize("mode", ["early-exit", "full", "speculative", "uncached"])
def test_generate_engines(capsys, mode):
    folder = finished_run()[0]
    names = ("auto", "native", "reference") if mode != "uncached" else ("auto", "reference")
    found = {
        name: json.loads(generate(capsys, folder, "--json", "--mode", mode, "--engine", name).out)
        for name in names
    }
    used = {name: answer["engine"] for name, answer in found.items()}
    auto = "native" if mode != "uncached" else "reference"
    assert used == {name: auto if name == "auto" else name for name in names}
    for answer in found.values():
        for key in ("tokens", "exit_layer"):
            assert answer[key] == found["reference"][key]
        counts, wanted = answer["stats"]["decode"], found["reference"]["stats"]["decode"]
        assert counts == wanted


def test_generate_native_cannot(capsys):
    args = ["generate", str(finished_run()[0]), "--prompt", "ann sees", "--max-new-tokens", "6"]
    assert run_command([*args, "--engine", "native", "--mode", "uncached"]) == 2
    assert "NativeEngine: strategy must use caches" in capsys.readouterr().err


@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy", "gate"])
def test_generate_thresholds(capsys, criterion):
    folder = finished_run()[0]
    full = json.loads(generate(capsys, folder, "--json", "--mode", "full").out)
    by = ("--json", "--criterion", criterion)
    never = json.loads(generate(capsys, folder, *by, "--threshold", "inf").out)
    assert (never["tokens"], never["shallow_tokens"]) == (full["tokens"], 0)
    always = json.loads(generate(capsys, folder, *by, "--threshold", "0").out)
    assert always["exit_layer"] == [2] * 6


@pytest.mark.parametrize("options", [(), ("--temperature", "0.5")], ids=["greedy", "sampled"])
def test_generate_speculative(capsys, options):
    def found(mode, *more):
        answer = generate(capsys, own_run(), "--json", "--mode", mode, *options, *more)
        return json.loads(answer.out)

    def drafted(*more):
        answer = found("speculative", *more)
        assert answer["tokens"] == full["tokens"] and answer["shallow_tokens"] == 0
        assert all(0 <= c <= 1 for c in answer["confidence"])
        return answer["stats"]["decode"]

    full, bold = found("full"), ("--stop-confidence", "0")
    calls = full["stats"]["decode"]["upper_layer_calls"]
    for cautious in (("--draft-tokens", "1", *bold), ("--stop-confidence", "inf")):
        counts = drafted(*cautious)
        assert counts["upper_layer_calls"] == counts["upper_passes"] == calls
    counts = drafted("--draft-tokens", "3", *bold)
    assert counts["upper_layer_calls"] > counts["upper_passes"]  # chunks of several tokens
    assert drafted("--criterion", "gate")["gate_calls"] > 0


def test_generate_policies(capsys):
    always = json.loads(generate(capsys, own_run(), "--json", "--threshold", "0").out)
    middle = ("--json", "--threshold", str(sorted(always["confidence"])[3]))
    found = {
        policy: json.loads(generate(capsys, own_run(), *middle, "--kv-policy", policy).out)
        for policy in ("recompute", "propagate", "hole")
    }
    assert (
        json.loads(generate(capsys, own_run(), *middle).out)["tokens"]
        == (found["recompute"]["tokens"])
    )
    for part in found.values():
        assert len(part["tokens"]) == 6 and 0 < part["shallow_tokens"] < 6
    # what an exited token leaves behind is paid for in three ways
    paid = [list(part["stats"]["decode"].values()) for part in found.values()]
    assert all(one != two for one, two in itertools.combinations(paid, 2))


def test_generate_text(capsys):
    folder = finished_run()[0]
    text = json.loads(generate(capsys, folder, "--json").out)["text"]
    plain, streamed = generate(capsys, folder), generate(capsys, folder, "--stream")
    assert (plain.err, streamed.err) == ("", "")
    # characters that are not whole at the end are shown by neither
    assert plain.out == streamed.out and plain.out.endswith("\n")
    shown = plain.out[:-1]
    assert shown.startswith("ann sees") and ("ann sees" + text).startswith(shown)
    for more in (("--show-exits",), ("--show-exits", "--stream")):
        exits = generate(capsys, folder, *more).out
        assert exits.startswith(plain.out)
        assert "shallow (left after layer 2), deep (ran all 4)" in exits
        assert "of 6 tokens exited" in exits
    out, err = generate(capsys, folder, "--show-exits", "--stream", "--json")
    assert json.loads(out)["text"] == text and "of 6 tokens exited" in err


def test_generate_sampling(capsys):
    folder = finished_run()[0]

    def tokens(seed, *more):
        options = ("--json", "--temperature", "2", "--seed", str(seed), *more)
        return json.loads(generate(capsys, folder, *options).out)["tokens"]

    assert tokens(3) == tokens(3) != tokens(4)
    greedy = json.loads(generate(capsys, folder, "--json").out)["tokens"]
    assert tokens(3, "--top-k", "1") == tokens(4, "--top-p", "1e-9") == greedy


def test_exact_policy_needs_an_exit_state_model(capsys):
    args = ["generate", str(own_run()), "--prompt", "ann", "--max-new-tokens", "4"]
    assert run_command([*args, "--kv-policy", "exact"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("lego: ") and err.count("\n") == 1 and "got 'exact'" in err and not out


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_generate_holds_a_target(capsys, engine):
    """From whatever threshold, it goes up by the step for an exit and down for none."""
    folder, followed = finished_run()[0], 0
    options = ("--max-new-tokens", "40", "--engine", engine, "--hold-shallow-ratio", "0.5")
    for start in ("-inf", "0.5", "inf"):
        found = json.loads(generate(capsys, folder, "--json", *options, "--threshold", start).out)
        control = found["control"]
        assert control["tokens"] == len(found["tokens"])
        assert control["loss"] == control["shallow"] / control["tokens"]
        assert control["shallow"] == found["shallow_tokens"]
        first = min(max(float(start), 0.0), 1.0)
        assert control["lowest"] <= first <= control["highest"]
        if control["lowest"] > -0.029 and control["highest"] < 1.029:
            moved = 0.03 * (control["shallow"] - 0.5 * control["tokens"])
            assert control["threshold"] == pytest.approx(first + moved, abs=1e-5)
            followed += 1
    assert followed, "every threshold hit a bound"
    text = generate(capsys, folder, *options).out
    assert "held shallow ratio at 0." in text and "for a target of 0.5" in text
    probed = ("--hold-disagreement", "0.3", "--threshold", "0", "--engine", engine)
    found = json.loads(generate(capsys, folder, "--json", "--max-new-tokens", "40", *probed).out)
    assert found["control"]["probes"] > 0
    assert json.loads(generate(capsys, folder, "--json").out)["control"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hold-disagreement", "1.5"), "Controller.target: must be in [0, 1], got 1.5"),
        (("--hold-shallow-ratio", "0.5", "--mode", "full"), "must come with early-exit, got full"),
        (
            ("--hold-shallow-ratio", "0.5", "--hold-disagreement", "0.1"),
            "one target must be held, got --hold-shallow-ratio and --hold-disagreement",
        ),
    ],
    ids=" ".join,
)
def test_generate_refuses_targets(capsys, options, message):
    args = ["generate", str(finished_run()[0]), "--prompt", "ann sees", *options]
    assert run_command(args) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_generate_from_the_checkpoint_of_a_run(capsys, tmp_path):
    """Its folder has the run's criterion and policy; copied elsewhere, it has the defaults."""
    folder = tmp_path / "run"
    shutil.copytree(own_run(), folder)
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(
        config.replace('criterion = "max_prob"', 'criterion = "gate"')
    )
    shutil.copytree(folder / "checkpoint", tmp_path / "alone")
    found = {
        path.name: json.loads(generate(capsys, path, "--json").out)["stats"]["decode"]["gate_calls"]
        for path in (folder, folder / "checkpoint", tmp_path / "alone")
    }
    assert found["run"] == found["checkpoint"] > 0 == found["alone"]
