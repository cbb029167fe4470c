"""examples/layerskip.py with a tiny model and a tokenizer of bytes in place of the hub's."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

from transformers import AutoModelForCausalLM
from transformers.generation import StopStringCriteria

from lego_kernels import library
from lego_kernels.hf import accelerate
from tests.hf.tiny_models import byte_tokenizer, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "layerskip.py"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_example(tokenizer, tmp_path):
    complete = runpy.run_path(str(EXAMPLE))["complete"]
    tiny_model("llama-tied-llama3", vocab_size=256).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert complete(model, tokenizer, "Once upon", exit_layer=1).startswith("Once upon")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=64)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert complete(model, tokenizer, "Once upon", exit_layer=1) == expected


def test_stop_strings_as_a_criterion(tokenizer):
    """The setting is refused, for it needs the tokenizer; the criterion is served."""
    model = tiny_model(vocab_size=256)
    batch = tokenizer("Once", return_tensors="pt")
    arguments = {**batch, "max_new_tokens": 20}
    new = model.generate(**arguments)[0, 4:].tolist()
    stop = tokenizer.decode(next(token for token in new if token < 94))
    expected = model.generate(**arguments, stop_strings=stop, tokenizer=tokenizer)
    criteria = [StopStringCriteria(tokenizer, stop)]
    got = accelerate(model).generate(**arguments, stopping_criteria=criteria)
    assert got.tolist() == expected.tolist() and got.size(1) < 4 + 20
