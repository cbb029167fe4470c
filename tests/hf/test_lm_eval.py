"""lm-evaluation-harness over a model that exits: what it generates, and that it scores in full."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")
pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (pip install 'lm-eval[hf]')")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers.generation import StopStringCriteria

from lego_kernels import library
from lego_kernels.hf import EarlyExitLlamaForCausalLM
from tests.hf.tiny_models import byte_tokenizer, kept_decoders, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
# the harness takes the longest first
CONTEXTS = ["Once upon a time", "Return"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The stock model, and the same with early exit."""
    folder = tmp_path_factory.mktemp("stock")
    stock = tiny_model(vocab_size=256)
    stock.save_pretrained(folder)
    model = EarlyExitLlamaForCausalLM.from_pretrained(folder)
    options = {"exit_layer": 2, "threshold": 0.1, "kv_policy": "propagate"}
    model.set_early_exit(mode="early_exit", **options)
    return stock, model


def ask(model, tokenizer, kind, *arguments, batch_size=2):
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]
    return getattr(harness, kind)(requests, disable_tqdm=True)


def own(model, tokenizer, context, stops):
    """(text up to a stop string, output) of the model's generate."""
    batch = tokenizer(context, return_tensors="pt")
    output = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        stopping_criteria=[StopStringCriteria(tokenizer, stops)],
        return_dict_in_generate=True,
    )
    text = tokenizer.decode(output.sequences[0, batch["input_ids"].size(1) :])
    return min((text.split(stop)[0] for stop in stops), key=len), output


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generate_until(models, tokenizer, monkeypatch, batch_size):
    stock, model = models
    text, _ = own(model, tokenizer, CONTEXTS[0], [tokenizer.eos_token])
    stop = next(character for character in text[3:] if character.isalpha())
    stops = [stop, tokenizer.eos_token]  # the harness adds the latter
    expected, outputs = zip(*(own(model, tokenizer, c, stops) for c in CONTEXTS), strict=True)
    assert outputs[0].exit_layers.size(1) < NEW_TOKENS

    kept = kept_decoders(monkeypatch)
    asked = [(context, {"until": [stop], "max_gen_toks": NEW_TOKENS}) for context in CONTEXTS]
    found = ask(model, tokenizer, "generate_until", *asked, batch_size=batch_size)
    assert found == list(expected)
    for counts in (decoder.counts for decoder in kept):
        assert counts.upper_layer_calls < counts.lower_layer_calls
    if batch_size == 1:  # a batch goes on until its last row has ended
        assert [d.counts for d in kept] == [output.counts for output in outputs]
    assert ask(stock, tokenizer, "generate_until", *asked, batch_size=batch_size) != found


def test_sampling(models, tokenizer):
    """Its settings reach the decoder; a temperature of 0 is greedy."""
    how = {"until": ["~"], "max_gen_toks": NEW_TOKENS}
    greedy, cold, drawn = (
        ask(models[1], tokenizer, "generate_until", *[(c, how | more) for c in CONTEXTS])
        for more in (
            {},
            {"do_sample": False, "temperature": 0.0},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        )
    )
    assert greedy == cold != drawn


def test_scoring_runs_every_layer(models, tokenizer):
    pairs = [("Once", " upon a time"), ("Return", " x")]
    with torch.no_grad():
        stock, found = (ask(m, tokenizer, "loglikelihood", *pairs) for m in models)
    assert found == stock
