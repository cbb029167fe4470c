"""`lego evaluate --frontier`: what it prints, writes and refuses."""

import io
import json
import shutil

import pytest
from rich.console import Console

from lego.cli import run_command
from lego.frontier import BASELINES, FrontierOptions, measure_frontier
from lego.frontier_command import print_frontier
from tests.models import CRITERIA, tiny_model
from tests.runs import finished_run


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv("LEGO_CACHE", str(finished_run()[2]))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(folder, stdout) of `lego evaluate --frontier --json` on the tiny trained run."""
    root = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGO_CACHE", str(finished_run()[2]))
        shutil.copytree(finished_run()[0], root / "run")
        stdout = io.StringIO()
        patch.setattr("sys.stdout", stdout)
        args = ["evaluate", str(root / "run"), "--frontier", "--json", "--windows", "5"]
        assert run_command([*args, "--ratios", "0", "0.5", "0.9", "--risks", "0.5"]) == 0
    return root / "run", stdout.getvalue()


SETTING_KEYS = {
    "criterion",
    "kv_policy",
    "ratio",
    "risk",
    "threshold",
    "shallow_ratio",
    "bits_per_byte",
}
SETTING_KEYS |= {"bits_per_byte_interval", "agreement", "agreement_interval", "mean_layers"}
SETTING_KEYS |= {
    "expected_true_cost",
    "minus_full_depth",
    "minus_dense_at_equal_cost",
    "generation",
}
SETTING_KEYS |= {"minus_dense_at_equal_cost_interval", "minus_full_depth_interval"}


def test_command_prints_and_writes_json(evaluated):
    folder, stdout = evaluated
    found = json.loads(stdout)
    assert stdout == (folder / "frontier.json").read_text()
    assert set(found) == {
        *("num_layers", "exit_layer", "upper_kv", "num_windows", "seq_len", "engine", "timing"),
        *("agreement_of_exits", "criteria", "models", "settings", "break_even", "environment"),
    }
    assert list(found["criteria"]) == [*CRITERIA, "oracle", "random"]
    assert list(found["models"]) == ["full", *BASELINES]
    assert len(found["settings"]) == 16 and len(found["break_even"]) == 4
    for setting in found["settings"]:
        assert set(setting) == SETTING_KEYS
        assert {"threshold", "true_cost", "layer_cost", "tokens_per_second", "speedup"} <= set(
            setting["generation"]
        )
        assert abs(setting["shallow_ratio"] - setting["ratio"]) < 0.2
    assert found["settings"][0]["threshold"] is None  # inf, which JSON lacks


def test_plot(evaluated):
    svg = (evaluated[0] / "frontier.svg").read_text()
    for text in ("max_prob, exact", "dense-shallow (2 layers)", "ms per token", "bits per byte"):
        assert f">{text}</text>" in svg


def test_tables_fit_100_columns(evaluated):
    found = json.loads(evaluated[1])
    # as wide as figures get
    for setting in found["settings"]:
        setting["kv_policy"] = "propagate"
        setting["generation"]["tokens_per_second"] = 12345.6
        setting["generation"]["true_cost"] = 1.234
    out = io.StringIO()
    print_frontier(Console(file=out, width=100, soft_wrap=True), found)
    lines = out.getvalue().splitlines()
    tables = [line for line in lines if not line.endswith(".")]
    assert max(map(len, tables)) <= 100
    (row, *_, at_risk) = [line for line in lines if "margin" in line and "12,346" in line]
    assert all(part in row for part in ("123.4 %", "100.0 %", "\N{PLUS-MINUS SIGN}", "x"))
    assert at_risk.lstrip().startswith("50.0 %")
    exits = sum(setting["shallow_ratio"] > 0 for setting in found["settings"])
    assert f"LEGO against dense models at equal true cost, {exits} settings" in out.getvalue()


def fails(capsys, folder, message, *more):
    """Exit code 2, one line on stderr, nothing on stdout, nothing written."""
    capsys.readouterr()
    assert run_command(["evaluate", str(folder), "--frontier", *more]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and err.startswith("lego: ") and not out
    assert not (folder / "frontier.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ratios", "0.5", "1.5"), "ratios must be shares in [0, 1], got 0.5, 1.5"),
        (("--ratios", "-0.1"), "ratios must be shares in [0, 1], got -0.1"),
        (("--ratios", "nan"), "ratios must be shares in [0, 1], got nan"),
        (("--ratios", "0.5", "0.5"), "ratios must differ, got 0.5, 0.5"),
        (("--risks", "2"), "risks must be shares in [0, 1], got 2"),
        (("--risks", "0.1", "0.1"), "risks must differ, got 0.1, 0.1"),
        (("--windows", "1"), "windows must be >= 2, got 1"),
        (("--shallow-ratio", "0.5"), "--frontier must come with --ratios, got --shallow-ratio"),
    ],
    ids=" ".join,
)
def test_bad_options(capsys, more, message):
    fails(capsys, finished_run()[0], message, *more)


def test_no_ratios():
    with pytest.raises(ValueError, match="ratios must hold at least one share, got none"):
        FrontierOptions(ratios=())


def test_a_run_without_baselines(tmp_path, capsys):
    shutil.copytree(finished_run()[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "baselines" / "dense_deep")
    message = f"`lego run --out {tmp_path / 'run'}` with the run's options trains them"
    fails(capsys, tmp_path / "run", message)
    with pytest.raises(ValueError, match="baselines must hold dense_shallow, got"):
        measure_frontier(tiny_model(), {}, None, None, FrontierOptions())


def test_a_dense_model(tmp_path, capsys):
    shutil.copytree(finished_run()[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    shutil.copytree(tmp_path / "run" / "baselines" / "dense_deep", tmp_path / "run" / "checkpoint")
    message = "must have an upper block, got a dense model; train one with exit_layer < num_layers"
    fails(capsys, tmp_path / "run", message)


@pytest.mark.parametrize("more", [("--ratios", "0.5"), ("--windows", "5")], ids=" ".join)
def test_options_of_the_frontier_alone(capsys, more):
    assert run_command(["evaluate", str(finished_run()[0]), *more]) == 2
    out, err = capsys.readouterr()
    assert "must come with --frontier" in err and not out
