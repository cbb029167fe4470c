"""The examples with tiny models: with a tokenizer of bytes, and with a run of ours."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import StopStringCriteria

from lego.hf_checkpoint import Export, export_checkpoint
from lego_kernels import library
from lego_kernels.hf import accelerate
from tests.hf.tiny_models import byte_tokenizer, tiny_model
from tests.runs import own_run

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["complete"]


def test_own_model(tmp_path):
    """Some tokens leave and some stay; where none may, the text is transformers' own."""
    export_checkpoint(Export(run=own_run(), out=tmp_path / "hf"), Console(quiet=True))
    complete = example("own_model")
    _, exit_layers = complete(tmp_path / "hf", "ann sees", threshold=0.017)
    assert set(exit_layers) - {0} == {2, 4}
    text, exit_layers = complete(tmp_path / "hf", "ann sees", threshold=2.0)
    assert set(exit_layers) - {0} == {4}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    own_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = own_tokenizer("ann sees", return_tensors="pt")
    assert text == own_tokenizer.decode(model.generate(**batch, max_new_tokens=32)[0])


def test_layerskip(tokenizer, tmp_path):
    complete = example("layerskip")
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
