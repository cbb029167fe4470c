"""Rotary scaling in the config.json of transformers: every place and name that it may have."""

from dataclasses import replace

import pytest
import torch

from lego.hf_format import from_hf_config, to_hf_config
from tests.models import tiny_config

PLAIN = tiny_config("own")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
OURS = {
    "llama3": replace(
        PLAIN,
        rope_theta=30.0,
        rope_type="llama3",
        rope_factor=8.0,
        rope_low_freq_factor=0.5,
        rope_high_freq_factor=2.0,
        rope_original_seq_len=16,
    ),
    "linear": replace(PLAIN, rope_theta=30.0, rope_type="linear", rope_factor=4.0),
    "default": replace(PLAIN, rope_theta=30.0),
}
THEIRS = {"llama3": LLAMA3, "linear": {"factor": 4.0}, "default": {}}
YARN = {"rope_type": "yarn", "factor": 4.0}


def read(**rope):
    """Our model of an unscaled file whose rotary entries are these instead."""
    values = to_hf_config(PLAIN, torch.float32, 0)
    del values["rope_parameters"], values["rope_theta"]
    return from_hf_config(values | rope, PLAIN.exit_layer)


@pytest.mark.parametrize("kind", OURS)
def test_written_in_both_places_and_read_back(kind):
    values = to_hf_config(OURS[kind], torch.float32, 0)
    scaling = {"rope_type": kind, **THEIRS[kind]}
    assert values["rope_parameters"] == {"rope_theta": 30.0, **scaling}
    assert values["rope_theta"] == 30.0
    assert values.get("rope_scaling") == (None if kind == "default" else scaling)
    assert from_hf_config(values, PLAIN.exit_layer) == OURS[kind]
    del values["rope_parameters"]
    assert from_hf_config(values, PLAIN.exit_layer) == OURS[kind]


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_every_place(kind, name):
    scaling = {name: kind, **THEIRS[kind]}
    assert read(rope_parameters=scaling | {"rope_theta": 30.0}) == OURS[kind]
    assert read(rope_parameters=scaling, rope_theta=30.0) == OURS[kind]
    assert read(rope_scaling=scaling, rope_theta=30) == OURS[kind]
    assert read(rope_scaling=scaling) == replace(OURS[kind], rope_theta=10000.0)
    inner = scaling | {"rope_theta": 30.0}
    assert read(rope_parameters=inner, rope_theta=5e5) == OURS[kind]
    assert read(rope_parameters=scaling | {"rope_theta": None}, rope_theta=30.0) == OURS[kind]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": ["linear"]}, "rope_scaling must be an object, got"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type must be one of"),
        ({"rope_theta": True}, "rope_theta must be a number, got True"),
        ({"rope_theta": "x"}, "rope_theta must be a number, got 'x'"),
        ({"rope_theta": float("nan")}, "rope_theta: must be positive, got nan"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
    ],
)
def test_nonsense_is_refused_by_name(rope, message):
    with pytest.raises(ValueError, match=message):
        read(**rope)


def test_the_older_entry_comes_first():
    """As in transformers 5, whatever the newer one says."""
    scaling, newer = {"type": "linear", "factor": 4}, {"rope_type": "llama3", **LLAMA3}
    both = {"rope_scaling": scaling, "rope_parameters": newer, "rope_theta": 30.0}
    assert read(**both) == OURS["linear"]
    with pytest.raises(ValueError, match="rope_type must be one of"):
        read(rope_scaling=YARN, rope_parameters={"rope_type": "default"})


def test_original_length_in_two_places():
    """Versions of transformers differ in which of them they take."""
    rope, name = {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings"
    assert read(rope_scaling=rope, rope_theta=30.0, **{name: 16}) == OURS["llama3"]
    with pytest.raises(ValueError, match=f"import: {name} must be 32, as beside .*, got 16"):
        read(rope_scaling=rope, **{name: 32})


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", "mrope"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_other_types_are_refused(kind, name, place):
    with pytest.raises(ValueError) as error:
        read(**{place: {name: kind} | LLAMA3})
    sentence = f"rope_type must be one of default, linear, llama3, got {kind}"
    assert str(error.value) == f"import: {sentence}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": None}, "import: factor must be a number, got None"),
        ({"factor": "8"}, "import: factor must be a number, got '8'"),
        ({"high_freq_factor": True}, "import: high_freq_factor must be a number, got True"),
        (
            {"original_max_position_embeddings": None},
            "import: original_max_position_embeddings must be a whole number, got None",
        ),
        (
            {"original_max_position_embeddings": 16.0},
            "import: original_max_position_embeddings must be a whole number, got 16.0",
        ),
        (
            {"original_max_position_embeddings": 0},
            "ModelConfig.rope_original_seq_len: must be an int >= 1, got 0",
        ),
        ({"factor": 0.5}, "ModelConfig.rope_factor: must be finite and >= 1, got 0.5"),
        (
            {"low_freq_factor": 2},
            "ModelConfig.rope_low_freq_factor: must be in (0, rope_high_freq_factor=2.0), got 2.0",
        ),
    ],
)
def test_numbers_that_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        read(rope_parameters={"rope_type": "llama3"} | LLAMA3 | changes)
    assert str(error.value) == message
