"""The command line: end to end on a tiny text, and every mistake in one line."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lego.checkpoint import load_checkpoint
from lego.cli import run_command
from lego.run_folder import RunFolder
from tests.runs import (
    finished_run,
    run_args,
    sentences,
)

RUN_FILES = {"results.json", "config.toml", "loss.svg", "confidence.svg", "cost.svg"}
RUN_FILES |= {"sample.txt", "checkpoint", "baselines", "events", "training"}


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv("LEGO_CACHE", str(finished_run()[2]))


def snapshot(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_run_prints_results_json_and_nothing_else():
    folder, _, _, stdout, stderr = finished_run()
    assert json.loads(stdout) == RunFolder(folder).results()
    assert stdout.startswith("{") and stdout.endswith("}\n")
    for phase in ("phase1", "phase2_exit_state", "dense_2", "dense_4"):
        assert f"\n{phase} " in stderr
    assert "Experiment 001" in stderr and "\x1b[" not in stderr


def test_run_leaves_its_files():
    folder = finished_run()[0]
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    assert {path.name for path in (folder / "baselines").iterdir()} == {
        "dense_shallow",
        "dense_deep",
    }
    checkpoint = load_checkpoint(folder / "checkpoint")
    sample = (folder / "sample.txt").read_text(encoding="utf-8")
    assert len(checkpoint.tokenizer.encode(sample)) > 4
    assert all(any((folder / "events" / p.name).iterdir()) for p in (folder / "events").iterdir())


def test_second_run_repeats_nothing():
    """`python -m lego`, in a process of its own."""
    folder, data, _, stdout, _ = finished_run()
    before = snapshot(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = subprocess.run(
        [sys.executable, "-m", "lego", *run_args(data, folder, "--json")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(stdout)
    assert f"This run was done before; its folder is {folder}" in done.stderr
    assert snapshot(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_train_then_run(tmp_path, capsys):
    data = finished_run()[1]
    args = run_args(data, tmp_path / "run", "--json")
    assert run_command(["train", *args[1:]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == str(tmp_path / "run" / "checkpoint")
    assert list(found["calibration"]["threshold"]) == ["max_prob", "margin", "entropy", "gate"]
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {"config.toml", "training", "events", "checkpoint"}
    before = snapshot(tmp_path / "run" / "training")
    assert run_command(args) == 0
    out, err = capsys.readouterr()
    done = [line.split()[0] for line in err.splitlines() if line.endswith("(done before)")]
    assert done == ["phase1", "phase2_exit_state"]
    after = snapshot(tmp_path / "run" / "training")
    assert {name: after[name] for name in before} == before
    whole = json.loads(finished_run()[3])
    assert json.loads(out)["criteria"] == whole["criteria"]


def test_train_with_scaled_angles(tmp_path):
    args = {"type": "llama3", "factor": 8, "low-freq-factor": 0.5, "original-seq-len": 16}
    more = [str(x) for name, value in args.items() for x in (f"--model.rope-{name}", value)]
    data = finished_run()[1]
    command = ["train", *run_args(data, tmp_path, *more, "--train.max-tokens", "400")[1:]]
    assert run_command(command) == 0
    config = RunFolder(tmp_path).config().model
    assert (config.rope_type, config.rope_factor, config.rope_original_seq_len) == ("llama3", 8, 16)
    assert config.rope_band == (0.5 / 16, 4.0 / 16)
    trained = load_checkpoint(tmp_path / "checkpoint").model.config
    assert trained == replace(config, vocab_size=trained.vocab_size)
    assert run_command(command) == 0  # it goes on from there
    assert run_command([*command, "--model.rope-factor", "4"]) == 2


def test_evaluate(capsys):
    folder = finished_run()[0]
    assert run_command(["evaluate", str(folder), "--json"]) == 0
    found, results = json.loads(capsys.readouterr().out), RunFolder(folder).results()
    assert found["criteria"] == results["criteria"]
    first = results["experiment_001"]
    assert found["exits"]["shallow"]["ppl"] == first["phase1"]["val_ppl"]
    assert found["exits"]["deep"]["ppl"] == first["phase2"]["val_ppl"]
    assert run_command(["evaluate", str(folder), "--shallow-ratio", "1"]) == 0
    out = capsys.readouterr().out
    assert "Two-stage inference (validation)" in out and "gate" in out


def fails(capsys, args, message):
    """Exit code 2, one line on stderr."""
    capsys.readouterr()
    assert run_command([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("lego: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert message in err, err
    return out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nonsense", "name must be pydocs, stdlib"),
        ("missing.txt", "file must exist, got"),
        ("empty.txt", "empty.txt"),
        ("blank.txt", "blank.txt"),
        ("binary.txt", "binary.txt"),
        ("tiny.txt", "a split must hold >= 17 ids for seq_len=16"),
    ],
)
@pytest.mark.parametrize("command", ["run", "train"])
def test_bad_data(tmp_path, capsys, monkeypatch, command, data, message):
    """Nothing is left behind that would claim the folder."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_bytes(b"")
    Path("blank.txt").write_bytes(b"\n \n\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("tiny.txt").write_text("one\n\ntwo\n\nthree")
    fails(capsys, [command, *run_args(data, "run")[1:]], message)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--train.seq-len", "49"), "max_seq_len: must be >= 49"),
        (("--timing.new-tokens", "100"), "max_seq_len: must be >= 104"),
        (("--model.exit-layer", "4"), "exit_layer: must be < num_layers=4"),
        (
            ("--exit.kv-policy", "hole"),
            "ExperimentConfig.exit.kv_policy: must be one of ('exact',)",
        ),
        (("--timing.num-prompts", "5000"), "the split must hold 5000 prompts of 4 tokens"),
        (("--train.max-tokens", "31"), "there must be 2 windows of 16 tokens to train, got 1"),
    ],
)
def test_bad_configuration(tmp_path, capsys, more, message):
    """Refused before the first step, so that no training is wasted and no folder claimed."""
    args = run_args(finished_run()[1], tmp_path / "run", *more)
    fails(capsys, args, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--preset", "none"],
        ["run", "--train.epochs", "many"],
        ["run", "--model.upper-kv", "none"],
        ["run", "--model.dim", "17"],
        ["run", "--model.rope-type", "yarn"],
        ["run", "--model.rope-factor", "8"],
        ["train", "--train.learning-rate", "nan"],
        ["generate", "run", "--prompt", "x", "--mode", "none"],
        ["generate", "run"],
        ["nonsense"],
        ["run", "--nonsense"],
    ],
    ids=" ".join,
)
def test_bad_options(tmp_path, capsys, monkeypatch, args):
    """What the option parser refuses, it explains in its own words."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run_command(args)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert err and not out and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prompt", "ann " * 60), "new tokens must fit max_seq_len=48, got"),
        (("--prompt", "ann", "--max-new-tokens", "48"), "new tokens must fit max_seq_len=48"),
        (("--prompt", "ann", "--max-new-tokens", "-1"), "max_new_tokens must be >= 0, got -1"),
        (("--prompt", ""), "prompt must hold at least one token, got ''"),
        (("--prompt", "ann", "--threshold", "nan"), "threshold: must be a number, got nan"),
        (("--prompt", "ann", "--kv-policy", "hole"), "kv_policy: must be one of ('exact',)"),
        (("--prompt", "ann", "--kv-policy", "recompute"), "got 'recompute'"),
        (("--prompt", "ann", "--temperature", "-1"), "temperature: must be finite and >= 0"),
        (("--prompt", "ann", "--top-p", "0"), "top_p: must be in (0, 1], got 0"),
        (
            ("--prompt", "ann", "--mode", "speculative", "--draft-tokens", "0"),
            "Speculative.draft_tokens: must be >= 1, got 0",
        ),
    ],
)
@pytest.mark.parametrize("json_", [(), ("--json",)], ids=["text", "json"])
def test_bad_generation(capsys, more, message, json_):
    args = ["generate", finished_run()[0], "--max-new-tokens", "4", *more, *json_]
    assert fails(capsys, args, message) == ""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["removed", "half"])
def test_damaged_checkpoint(tmp_path, capsys, name, damage):
    shutil.copytree(finished_run()[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    before = snapshot(tmp_path)
    for args in (["generate", tmp_path / "run", "--prompt", "a"], ["evaluate", tmp_path / "run"]):
        fails(capsys, args, name)
    assert snapshot(tmp_path) == before


def test_no_run_folder(tmp_path, capsys):
    fails(capsys, ["evaluate", tmp_path / "none"], f"got {tmp_path / 'none'}")
    fails(capsys, ["generate", tmp_path / "none", "--prompt", "a"], str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_folder_of_another_run(capsys):
    folder, data, *_ = finished_run()
    before = snapshot(folder)
    for command in ("run", "train"):
        args = [command, *run_args(data, folder, "--train.seed", "7")[1:]]
        message = f"{folder} must have been made with train.seed = 7, got 0; choose another --out"
        assert fails(capsys, args, message) == ""
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["config.toml", "results.json"])
def test_damaged_run(tmp_path, capsys, name):
    folder, data, *_ = finished_run()
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-30])
    before = snapshot(tmp_path)
    fails(capsys, run_args(data, tmp_path / "run"), name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("ratio", ["-0.1", "1.5", "nan"])
def test_bad_shallow_ratio(capsys, ratio):
    args = ["evaluate", finished_run()[0], "--shallow-ratio", ratio]
    fails(capsys, args, "shallow_ratio must be in [0, 1], got")


def test_text_that_changed_under_the_run(tmp_path, capsys):
    """A trained phase belongs to its text: another one under the same name is refused."""
    data = tmp_path / "book.txt"
    data.write_text(sentences(120))
    args = run_args(data, tmp_path / "run")
    assert run_command(["train", *args[1:]]) == 0
    data.write_text(sentences(120, seed=1))
    before = snapshot(tmp_path / "run")
    fails(capsys, args, "")
    fails(capsys, ["evaluate", tmp_path / "run"], "")
    assert snapshot(tmp_path / "run") == before


def test_brackets_in_a_folder_name(tmp_path, capsys):
    """The terminal's markup language does not read what users write."""
    folder = finished_run()[0]
    (tmp_path / "a[").mkdir()
    shutil.copytree(folder, tmp_path / "a[" / "b]")
    assert run_command(run_args(finished_run()[1], tmp_path / "a[" / "b]")) == 0
    assert f"its folder is {tmp_path}/a[/b]\n" in capsys.readouterr().out


def test_interrupted(capsys, monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lego.commands.run", interrupt)
    assert run_command(run_args("pydocs", tmp_path / "run")) == 130
    assert capsys.readouterr().err == (
        "lego: interrupted; `run` and `train` go on from their last save\n"
    )


def test_disk_full(capsys, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lego.training.loop.replacing_file", full)
    fails(capsys, run_args(finished_run()[1], tmp_path / "run"), "No space left on device")
    assert not (tmp_path / "run" / "results.json").exists()
