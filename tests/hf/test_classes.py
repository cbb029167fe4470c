"""Models whose own generate() runs on the decoder: settings that save and load, pipelines."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

import transformers

import lego_kernels.hf
from lego_kernels import library
from lego_kernels.hf import accelerate
from tests.hf.tiny_models import ragged, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
PROMPTS = ragged(9, 3, 8)
EARLY = {"mode": "early_exit", "exit_layer": 2, "threshold": 0.0}


def loaded(tmp_path, kind="llama", **options):
    """(the stock model, the same in our class, with these options), both from a folder."""
    stock = tiny_model(kind)
    stock.save_pretrained(tmp_path / "stock")
    ours = getattr(lego_kernels.hf, f"EarlyExit{type(stock).__name__}")
    model = ours.from_pretrained(tmp_path / "stock")
    if options:
        model.set_early_exit(**options)
    return stock, model


def generated(model, **options):
    return model.generate(**PROMPTS, max_new_tokens=12, **options)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_settings_are_saved_with_the_model(tmp_path, kind):
    stock, model = loaded(tmp_path, kind, **EARLY)
    output = generated(model, return_dict_in_generate=True)
    assert output.exit_layers.unique().tolist() == [2]
    assert torch.equal(output.sequences, generated(accelerate(stock, **EARLY)))
    # scoring runs the model as it is
    with torch.no_grad():
        assert torch.equal(model(**PROMPTS).logits, stock(**PROMPTS).logits)
    model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours")
    assert again.generation_config.early_exit == EARLY
    assert torch.equal(generated(again), output.sequences)
    # the stock class takes the same folder and does not exit
    unaware = type(stock).from_pretrained(tmp_path / "ours")
    assert torch.equal(generated(unaware), generated(stock))


def test_without_settings_it_is_the_stock_model(tmp_path):
    stock, model = loaded(tmp_path)
    assert torch.equal(generated(model), generated(stock))
    assert model._fast is None
    # beams are none of ours
    assert torch.equal(generated(model, num_beams=2), generated(stock, num_beams=2))


def test_a_call_has_settings_of_its_own(tmp_path):
    stock, model = loaded(tmp_path, **EARLY)
    full = transformers.GenerationConfig(early_exit={"mode": "full"}, max_new_tokens=12)
    assert torch.equal(model.generate(**PROMPTS, generation_config=full), generated(stock))
    assert not torch.equal(generated(model), generated(stock))
    # no options are those of full depth
    empty = transformers.GenerationConfig(early_exit={}, max_new_tokens=12)
    assert torch.equal(model.generate(**PROMPTS, generation_config=empty), generated(stock))


def test_new_parameters_are_packed_again(tmp_path):
    _, model = loaded(tmp_path, **EARLY)
    generated(model)
    other = tiny_model("llama", seed=1)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(generated(model), generated(accelerate(other, **EARLY)))


def test_a_copy_is_on_its_own(tmp_path):
    _, model = loaded(tmp_path, **EARLY)
    before = generated(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.neg_()
    assert torch.equal(generated(model), before)
    assert not torch.equal(generated(twin), before)


def test_pipeline(tmp_path):
    """The pipeline's own way of calling generate: its settings, its padding."""
    tokenizers = pytest.importorskip("tokenizers")
    stock, model = loaded(tmp_path, mode="full")
    words = {f"w{i}": i for i in range(97)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", padding_side="left"
    )
    texts = ["w5 w6 w7", "w9"]

    def written(which):
        run = transformers.pipeline("text-generation", model=which, tokenizer=tokenizer)
        found = run(texts, max_new_tokens=8, do_sample=False, batch_size=2)
        return [each[0]["generated_text"] for each in found]

    assert written(model) == written(stock)
    assert model._fast is not None


def test_bad_settings(tmp_path):
    _, model = loaded(tmp_path, **EARLY)
    with pytest.raises(ValueError, match="exit_layer must be in"):
        model.set_early_exit(mode="early_exit", exit_layer=9, threshold=0.5)
    assert model.generation_config.early_exit == EARLY
    with pytest.raises(ValueError, match="num_beams must be 1"):
        generated(model, num_beams=2)
    # changed in place, they count from the next call on
    model.generation_config.early_exit["exit_layer"] = 9
    with pytest.raises(ValueError, match="exit_layer must be in"):
        generated(model)
    model.generation_config.early_exit = "full"
    with pytest.raises(ValueError, match="early_exit must be a dict of the options"):
        generated(model)
