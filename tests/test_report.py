"""The HTML report: its figures are those of the run, and it loads, and breaks, nothing."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lego.checkpoint import load_checkpoint
from lego.cli import run_command
from lego.config import PRESETS
from lego.files import to_json
from lego.report.exit_map import printable
from lego.run_folder import RunFolder
from lego.sample import sample_run
from tests.report_pages import Page
from tests.runs import finished_run, sentences

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PHASE_TABLE, ROUTING_TABLE = "Experiment 001: training", "Two-stage inference"
REFERENCE_TABLE = "Experiment 002: early exit in generation, PyTorch reference"
NATIVE_TABLE = "Experiment 002: the same prompts, native engine"
DENSE_TABLE = "LEGO against dense models trained on the same tokens"
EXIT_FIGURES = {
    "shallow tokens": "shallow_tokens",
    "deep tokens": "deep_tokens",
    "shallow ratio": "shallow_ratio",
    "layers run": "layer_cost",
    "layers saved": "layer_savings",
    "true cost": "true_cost",
    "full depth, ms per token": "full_ms_per_token",
    "early exit, ms per token": "exit_ms_per_token",
    "speedup (quartiles)": "speedup",
    "realised savings": "realised_savings",
    "time efficiency": "time_efficiency",
}


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv("LEGO_CACHE", str(finished_run()[2]))


def report(*args, out):
    assert run_command(["report", *map(str, args), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGO_CACHE", str(finished_run()[2]))
        return report(finished_run()[0], out=tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def results():
    return RunFolder(finished_run()[0]).results()


@pytest.fixture
def run(tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(finished_run()[0], tmp_path / "run"))


def fake_run(folder, config, results):
    """A run folder without a checkpoint."""
    RunFolder(folder).claim(config, "0" * 64)
    RunFolder(folder).write_results(results)
    return folder


def test_training_figures(page, results):
    first = results["experiment_001"]
    names = {
        "PPL": "val_ppl",
        "accuracy": "val_acc",
        "PPL of hard tokens": "hard_ppl",
        "PPL of easy tokens": "easy_ppl",
        "PPL per word": "word_ppl",
        "bits per byte": "bits_per_byte",
    }
    for heading, key in (("phase 1", "phase1"), ("phase 2", "phase2")):
        wanted = {name: first[key][field] for name, field in names.items()}
        assert page.numbers(PHASE_TABLE, heading) == wanted
    change = page.numbers(PHASE_TABLE, "change")
    old, new = (first[name]["hard_ppl"] for name in ("phase1", "phase2"))
    assert change["PPL of hard tokens"] == pytest.approx(new / old - 1)
    for heading, key in (
        ("threshold", "threshold"),
        ("shallow", "shallow_ratio"),
        ("layers run", "layer_cost"),
        ("true cost", "true_cost"),
        ("PPL", "routed_ppl"),
        ("bits per byte", "bits_per_byte"),
    ):
        wanted = {name: found[key] for name, found in results["criteria"].items()}
        assert page.numbers(ROUTING_TABLE, heading) == wanted
    assert "source, phase 1" not in page.text


def test_generation_figures(page, results):
    native = results["native_engine"]
    columns = [
        (REFERENCE_TABLE, "max_prob", results["experiment_002"]),
        (REFERENCE_TABLE, "gate", results["experiment_002_gate"]),
    ]
    if "why_not" not in native:
        columns += [
            (NATIVE_TABLE, "max_prob", native["exit"]),
            (NATIVE_TABLE, "gate", native["gate"]),
            (NATIVE_TABLE, "speculative", native["speculative"]),
        ]
    for caption, heading, found in columns:
        wanted = {name: found[key] for name, key in EXIT_FIGURES.items()}
        assert page.numbers(caption, heading) == wanted
        low, high = found["speedup_quartiles"]
        shown, _ = page.column(caption, heading)["speedup (quartiles)"]
        assert shown == f"{found['speedup']:.2f}\N{MULTIPLICATION SIGN} ({low:.2f} to {high:.2f})"
    cache = results["experiment_001"]["kv_cache"]
    assert page.numbers("KV cache", "ms per token") == {
        "without cache": cache["uncached_ms_per_token"],
        "without cache, head on the last position": cache["uncached_last_ms_per_token"],
        "with cache": cache["cached_ms_per_token"],
    }
    speedup = page.numbers("KV cache", "speedup by the cache (quartiles)")
    assert list(speedup.values()) == [cache["speedup"], cache["speedup_over_last"], None]


def test_dense_models(page, results):
    baselines, criteria = results["baselines"], results["criteria"]
    bits = page.numbers(DENSE_TABLE, "bits per byte")
    assert bits == {
        "dense-shallow, 2 layers": baselines["dense_shallow"]["bits_per_byte"],
        "dense-deep, 4 layers": baselines["dense_deep"]["bits_per_byte"],
        **{f"LEGO by {name}": found["bits_per_byte"] for name, found in criteria.items()},
    }
    difference = page.column(DENSE_TABLE, f"LEGO by {results['compared_by']} is worse by, nats")
    assert (
        difference["dense-shallow, 2 layers"][1]
        == baselines["dense_shallow"]["lego_minus_dense_nats"]
    )
    assert difference["LEGO by gate"] == ("\N{EM DASH}", None)


def test_the_sentence_at_the_top(page, results):
    """It and the four figures below it are of the criterion that is compared."""
    by = results["compared_by"]
    assert by == "gate"
    native, routed = results["native_engine"], results["criteria"][by]
    found = native["gate"] if "why_not" not in native else results["experiment_002_gate"]
    full = results["experiment_001"]["phase2"]["val_ppl"]
    assert page.figures == pytest.approx(
        [
            found["layer_savings"],
            1 - found["true_cost"],
            1 - 1 / found["speedup"],
            routed["routed_ppl"] / full - 1,
        ]
    )
    assert f"{routed['routed_ppl']:,.2f} against {full:,.2f} at full depth" in page.text
    assert "that generation lacks" not in page.text
    assert any(verdict in page.text for verdict in ("Worth it here", "Not worth it", "A trade"))


def test_environment(page, results):
    shown = {
        name: text for name, (text, _) in page.column("What it was measured on", "value").items()
    }
    for name in ("commit", "torch", "cpu", "command"):
        wanted = results["environment"][name]
        assert shown[name] == ("\N{EM DASH}" if wanted is None else str(wanted))
    assert shown["text: sha256"] == results["data"]["sha256"]


def test_one_mark_for_every_generated_token(page):
    """The exit map is the run's own sample, which brackets the tokens that went deep."""
    folder = RunFolder(finished_run()[0])
    checkpoint, corpus = load_checkpoint(folder.checkpoint), folder.corpus()
    config, results = folder.config(), folder.results()
    prompt, tokens = sample_run(checkpoint, corpus, config, results)
    assert len(page.tokens) == len(tokens) == 48 - config.timing.prompt_tokens
    sample = printable(checkpoint.tokenizer.decode(prompt))
    for new, (text, attributes) in zip(tokens, page.tokens, strict=True):
        deep = new.exit_layer == checkpoint.model.config.num_layers
        sample += f"[{text}]" if deep and text else text
        kind = "deep, ran to layer 4" if deep else "shallow, left after layer 2"
        assert attributes["title"] == f"{kind}, confidence {new.confidence:.3f}"
        assert ("deep" if deep else "shallow") in attributes["class"].split()
    plain = (folder.path / "sample.txt").read_bytes().decode().removesuffix("\n")
    assert sample == printable(plain)
    listed = page.tables["Generated tokens in order"][0][1:]
    assert [row[0][0] for row in listed] == [str(i + 1) for i in range(len(tokens))]
    assert [row[4][0] for row in listed] == [f"{new.confidence:.3f}" for new in tokens]


def test_one_tab_stop_for_all_tokens(page):
    stops = [attributes["tabindex"] for _, attributes in page.tokens]
    assert stops == ["0"] + ["-1"] * (len(stops) - 1)


def test_every_validation_token_is_in_the_histogram(page, results):
    for name in ("max_prob", "gate"):
        caption = f"Validation tokens by {name}"
        right, wrong = (page.numbers(caption, f"shallow {kind}") for kind in ("right", "wrong"))
        exits = right["exits"] + wrong["exits"]
        total = exits + right["stays"] + wrong["stays"]
        assert exits / total == pytest.approx(results["criteria"][name]["shallow_ratio"])
        accuracy = (right["exits"] + right["stays"]) / total
        assert accuracy == pytest.approx(results["experiment_001"]["phase1"]["val_acc"])
        counts = f"{right['exits']:.0f} are right and {wrong['exits']:.0f} wrong."
        assert f"Of the tokens that exit, {counts}" in page.text


def test_nothing_is_loaded(text, page):
    assert "://" not in text and "@import" not in text
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "video", "audio", "base"}
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert all(place.startswith("url(#") for place in re.findall(r"url\([^)]", text))
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none';")


def test_structure(page):
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    targets = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert targets <= set(page.ids)
    tags = [tag for tag, _ in page.tags]
    for landmark in ("header", "main", "footer", "h1", "title"):
        assert tags.count(landmark) - (landmark == "title") >= 0 and landmark in tags
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert tags.count("caption") == tags.count("table")
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
    pictures = sum(a.get("role") == "img" for _, a in page.tags)
    assert tags.count("desc") == pictures >= 4


def test_same_run_same_bytes(text, tmp_path):
    assert report(finished_run()[0], out=tmp_path / "again.html") == text


def test_json(tmp_path, capsys):
    out, folder = tmp_path / "report.html", str(finished_run()[0])
    capsys.readouterr()
    assert run_command(["report", folder, "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"report": str(out), "runs": [folder], "absent": {folder: {}}}


def test_several_runs(tmp_path, run, results):
    changed = results | {"experiment_002_gate": results["experiment_002_gate"] | {"true_cost": 0.5}}
    (run / "results.json").write_text(to_json(changed | {"native_engine": {"why_not": "a <test>"}}))
    page = Page(report(finished_run()[0], run, out=tmp_path / "report.html"))
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    saved = page.numbers("The runs side by side", "bytes saved")
    assert saved[str(run)] == 0.5 and saved[str(finished_run()[0])] != 0.5
    costs = [page.numbers(REFERENCE_TABLE, "gate", table=i)["true cost"] for i in (0, 1)]
    assert costs == [results["experiment_002_gate"]["true_cost"], 0.5]
    assert "Native engine: a <test>" in page.text
    assert len(page.tokens) == 2 * 44


def test_source_and_comparison(tmp_path):
    """An older run, of the source's shape, that knows no native engine and has no model left."""
    results = json.loads((RESULTS / "seed.json").read_text())
    folder = fake_run(tmp_path / "seed", PRESETS["seed"], results)
    page = Page(report(folder, out=tmp_path / "report.html"))
    for i, found in enumerate((results, results["comparison"])):
        ppl = page.numbers(PHASE_TABLE, "phase 2", table=i)["PPL"]
        assert ppl == found["experiment_001"]["phase2"]["val_ppl"]
    assert page.numbers(PHASE_TABLE, "source, phase 1")["PPL of hard tokens"] == 2763.69
    assert page.column(PHASE_TABLE, "source, phase 2")["accuracy"] == ("not measured", None)
    source = page.numbers(REFERENCE_TABLE, "source")
    assert (source["shallow tokens"], source["layers saved"], source["speedup (quartiles)"]) == (
        21,
        0.328,
        1.08,
    )
    assert "Native engine: not measured in this run" in page.text
    assert "at full depth (scored with keys and values that generation lacks)" in page.text
    assert "Not made: load_checkpoint" in page.text and not page.tokens
    assert page.text.count("policy hole") > 1 and page.text.count("policy exact") > 1


def test_what_is_absent_is_said(page, run, tmp_path):
    folder = finished_run()[0]
    assert f"lego evaluate {folder} --frontier" in page.text
    assert f"lego calibrate {folder}" in page.text
    (run / "frontier.json").write_text("[1, ")
    (run / "checkpoint" / "certificate.json").write_text("[]")
    (run / "checkpoint" / "model.safetensors").unlink()
    found = Page(report(run, out=tmp_path / "report.html")).text
    assert f"Not shown: report: {run / 'frontier.json'} must be as `lego evaluate" in found
    assert "certificate.json must be as `lego calibrate` wrote it" in found
    assert found.count("model.safetensors must be whole and fit") == 2


def test_missing_figures_are_not_made_up(tmp_path, results):
    needed = {"experiment_001": {}, "criteria": {}, "criterion": "gate", "kv_policy": "exact"}
    config = RunFolder(finished_run()[0]).config()
    folder = fake_run(tmp_path / "run", config, needed | {"threshold": 0.5})
    page = Page(report(folder, out=tmp_path / "report.html"))
    assert page.figures == [] and "Nobody knows whether it is worth it" in page.text
    for caption in (PHASE_TABLE, REFERENCE_TABLE, "KV cache"):
        cells = [cell for row in page.tables[caption][0][1:] for cell in row[1:]]
        assert {text for text, _ in cells} <= {"not measured", "\N{EM DASH}", ""}
        assert {value for _, value in cells} == {None}


def test_text_that_changed(run, tmp_path, monkeypatch):
    data = finished_run()[1]
    before = data.read_text()
    try:
        data.write_text(sentences(120, seed=1))
        page = Page(report(run, out=tmp_path / "report.html"))
    finally:
        data.write_text(before)
    assert "must have SHA-256" in page.text and not page.tokens
    assert PHASE_TABLE in page.tables


def fails(capsys, args, message):
    capsys.readouterr()
    assert run_command(["report", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lego: ") and err.count("\n") == 1, err
    assert message in err, err


def test_bad_runs(tmp_path, capsys, run):
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        fails(capsys, [folder, "--out", out], f"run folder: must hold config.toml, got {folder}")
    for damaged in ("{", "[]"):
        (run / "results.json").write_text(damaged)
        fails(capsys, [run, "--out", out], f"{run / 'results.json'} must be as `lego` wrote it")
    (run / "results.json").write_text('{"experiment_001": {}}')
    fails(capsys, [run, "--out", out], "got no criteria; repeat the run in another folder")
    (run / "results.json").unlink()
    remedy = "must hold results.json, got none; finish it with the `lego run` command that began it"
    fails(capsys, [finished_run()[0], run, "--out", out], remedy)
    fails(capsys, ["--out", out], "at least one run folder must be given, got none")
    missing = tmp_path / "bench.json"
    remedy = f"benchmarks file must exist, got {missing}; make it with pytest --benchmark-json=FILE"
    fails(capsys, [finished_run()[0], "--benchmarks", missing, "--out", out], remedy)
    for wrong in (tmp_path / "no" / "report.html", tmp_path):
        message = f"--out must be a file in a folder that exists, got {wrong}"
        fails(capsys, [finished_run()[0], "--out", wrong], message)
    assert not out.exists()


def test_templates_are_installed(tmp_path):
    """From a copy: setuptools also installs what an older list of sources names."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "lego", tmp_path / "lego")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib=built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    installed = {path.name for path in (tmp_path / "built/lego/report/templates").iterdir()}
    assert installed == {path.name for path in (ROOT / "lego/report/templates").iterdir()}


def test_another_criterion_of_the_run(tmp_path, results):
    """A run by gate has one column, and one mark, of it for each engine."""
    folder = RunFolder(finished_run()[0])
    config = folder.config()
    config = replace(config, exit=replace(config.exit, criterion="gate"))
    fake_run(tmp_path / "run", config, results | {"criterion": "gate"})
    page = Page(report(tmp_path / "run", out=tmp_path / "report.html"))
    described = next(t for t in page.texts if t.startswith("A dot for the median"))
    assert described.count("reference, gate: ") == 1
    assert [text for text, _ in page.tables[REFERENCE_TABLE][0][0]] == ["generated tokens", "gate"]
