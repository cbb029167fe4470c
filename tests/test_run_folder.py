"""A run's folder belongs to one configuration."""

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tomli_w

from lego.config import PRESETS, DataConfig, ExitConfig, ExperimentConfig
from lego.run_folder import RunFolder, to_toml

QUICK = PRESETS["quick"]
SHA = "0" * 64  # of the text that the run was made with
OTHER = {
    "data": {"name": "stdlib", "data_dir": Path("here"), "tokenizer": "word", "vocab_size": 999},
    "model": {
        "dim": 64,
        "upper_kv": "own",
        "qk_norm": True,
        "rope_theta": 5e5,
        "rope_type": "llama3",
    },
    "train": {"recipe": "joint", "learning_rate": 1e-3, "seed": 7, "max_tokens": 0},
    "exit": {"criterion": "gate", "kv_policy": "exact", "compare_upper_kv": True},
    "timing": {"rounds": 3},
}


def changed(section, name, value):
    part = getattr(QUICK, section)
    return replace(QUICK, **{section: replace(part, **{name: value})})


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_round_trip(tmp_path, preset):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.claim(PRESETS[preset], SHA)
    assert folder.config() == PRESETS[preset]
    before = (folder.path / "config.toml").read_bytes()
    folder.claim(PRESETS[preset], SHA)
    assert (folder.path / "config.toml").read_bytes() == before
    assert [path.name for path in folder.path.iterdir()] == ["config.toml"]


def test_paths_round_trip(tmp_path):
    data = DataConfig(name='odd "name"\\.txt', data_dir=Path("some/where"))
    config = ExperimentConfig(data=data, exit=ExitConfig(kv_policy="exact"))
    folder = RunFolder(tmp_path)
    folder.claim(config, SHA)
    folder.claim(config, SHA)
    assert folder.config() == config
    assert isinstance(folder.config().data.data_dir, Path)


def test_folder_from_before_a_field_was_there(tmp_path):
    RunFolder(tmp_path).claim(QUICK, SHA)
    file = tmp_path / "config.toml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("rope_")))
    assert "rope_" not in file.read_text()
    assert RunFolder(tmp_path).config() == QUICK
    RunFolder(tmp_path).claim(QUICK, SHA)
    with pytest.raises(ValueError, match="made with model.rope_type = linear, got default;"):
        RunFolder(tmp_path).claim(changed("model", "rope_type", "linear"), SHA)


def test_every_field_is_kept():
    values = tomllib.loads(tomli_w.dumps(to_toml(QUICK)))
    for field in fields(QUICK):
        part = getattr(QUICK, field.name)
        wanted = {f.name: getattr(part, f.name) for f in fields(part)}
        assert values[field.name] == {k: v for k, v in wanted.items() if v is not None}


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [(section, *item) for section, values in OTHER.items() for item in values.items()],
)
def test_another_configuration_is_refused(tmp_path, section, name, value):
    RunFolder(tmp_path).claim(QUICK, SHA)
    before = (tmp_path / "config.toml").read_bytes()
    for ours, theirs in ((changed(section, name, value), QUICK),):
        with pytest.raises(ValueError) as error:
            RunFolder(tmp_path).claim(ours, SHA)
        old = getattr(getattr(theirs, section), name)
        assert f"made with {section}.{name} = {value}, got {old}" in str(error.value)
        assert str(tmp_path) in str(error.value) and "--out" in str(error.value)
    assert (tmp_path / "config.toml").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data = [",
        b"\xff\xfe",
        'data = 3\nmodel = "x"',
        "[data]\ncolour = 3",
        "[data]\n[model]\n[train]\n[exit]\n[timing]\n",
        "[data]\nsha256 = ''\n[model]\n[train]\n[exit]\n",
        "[data]\nsha256 = ''\n[model]\ndim = 'x'\n[train]\n[exit]\n[timing]\n",
        "[data]\nsha256 = ''\n[model]\ndim = 0\n[train]\n[exit]\n[timing]\n",
    ],
    ids=str,
)
def test_damaged_configuration(tmp_path, text):
    file = tmp_path / "config.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = file.read_bytes()
    for call in (RunFolder(tmp_path).config, lambda: RunFolder(tmp_path).claim(QUICK, SHA)):
        with pytest.raises(
            ValueError, match="config.toml must be as `lego` wrote it, got"
        ) as error:
            call()
        assert str(file) in str(error.value)
    assert file.read_bytes() == before


def test_another_text_is_refused(tmp_path):
    RunFolder(tmp_path).claim(QUICK, SHA)
    with pytest.raises(ValueError, match=f"made with data.sha256 = {'1' * 64}, got {SHA}"):
        RunFolder(tmp_path).claim(QUICK, "1" * 64)


def test_truncated_configuration(tmp_path):
    RunFolder(tmp_path).claim(QUICK, SHA)
    file = tmp_path / "config.toml"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="config.toml|timing"):
        RunFolder(tmp_path).claim(QUICK, SHA)


def test_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="run folder: must hold config.toml, got .*none"):
        RunFolder(tmp_path / "none").config()
    assert not (tmp_path / "none").exists()


def test_results(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.results() is None
    results = {"a": {"b": [0.1 + 0.2, None, "\u00e9"]}, "n": 3}
    folder.write_results(results)
    assert folder.results() == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[]", b"3"], ids=str)
def test_damaged_results(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match="run folder: .*results.json must be"):
        RunFolder(tmp_path).results()
