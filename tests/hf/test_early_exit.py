"""accelerate(mode="early_exit") against early exit on the stock modules: tokens, layers, K/V."""

import itertools

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

from transformers import DynamicCache
from transformers.generation import BaseStreamer

from lego_kernels import library
from lego_kernels.hf import accelerate
from tests.hf.early_exit_oracle import EarlyExitOracle
from tests.hf.tiny_models import NUM_LAYERS, kept_decoders, ragged, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
# at which some tokens leave and some stay
THRESHOLDS = {"max_prob": 0.2, "margin": 0.1, "entropy": 0.29}
EXIT_LAYER, NEW_TOKENS = 2, 14
PROMPTS = ragged(9, 3, 8)
NUM_CONTEXT = 8 + 2 + 7  # a prompt's last token is the first to be decided on
POLICIES = pytest.mark.parametrize("kv_policy", ["recompute", "propagate", "hole"])


def prompts():
    rows = zip(PROMPTS["input_ids"], PROMPTS["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def early_exit(model, streamer=None, **options):
    """What the accelerated model gives for PROMPTS."""
    fast = accelerate(model, mode="early_exit", exit_layer=EXIT_LAYER, **options)
    return fast.generate(
        **PROMPTS, max_new_tokens=NEW_TOKENS, streamer=streamer, return_dict_in_generate=True
    )


def implied(exit_layers, kv_policy):
    """(tokens through the upper layers, tokens with K/V from the exit state), of rows [B, N]."""
    stays = exit_layers == NUM_LAYERS
    # what left before a later token stayed
    owed = ~stays & (stays.flip(1).cumsum(1).flip(1) > 0)
    through = NUM_CONTEXT + stays.sum() + (owed.sum() if kv_policy == "recompute" else 0)
    return int(through), int(owed.sum()) if kv_policy == "propagate" else 0


@POLICIES
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_oracles_tokens_and_layers(kind, seed, kv_policy):
    for criterion, threshold in THRESHOLDS.items():
        options = {"criterion": criterion, "threshold": threshold, "kv_policy": kv_policy}
        oracle = EarlyExitOracle(tiny_model(kind, seed), exit_layer=EXIT_LAYER, **options)
        made = [oracle.generate(prompt, NEW_TOKENS) for prompt in prompts()]
        flat = list(itertools.chain(*made))
        # rounding, some 2e-6, decides nothing
        assert min(min(m.gap, abs(m.confidence - threshold)) for m in flat) > 1e-4
        got = early_exit(tiny_model(kind, seed), **options)
        assert got.sequences[:, 9:].tolist() == [[m.token for m in row] for row in made]
        assert got.exit_layers.tolist() == [[m.exit_layer for m in row] for row in made]
        confidences = torch.tensor([[m.confidence for m in row] for row in made])
        torch.testing.assert_close(got.confidences, confidences, atol=2e-5, rtol=0)
        assert 4 <= sum(m.exit_layer == EXIT_LAYER for m in flat) <= len(flat) - 4

        through, projected = implied(got.exit_layers, kv_policy)
        lower = NUM_CONTEXT + len(flat)
        assert oracle.layer_tokens == [lower, lower, through, through]
        assert got.counts.lower_layer_calls == 2 * lower
        assert got.counts.upper_layer_calls == 2 * through
        assert got.counts.upper_kv_calls == projected


@pytest.mark.parametrize("kind", FAMILIES)
def test_recompute_leaves_the_keys_and_values_of_full_depth(kind, monkeypatch):
    kept = kept_decoders(monkeypatch)
    model = tiny_model(kind)
    got = early_exit(model, threshold=THRESHOLDS["max_prob"])
    state = kept[0].state
    entries = dict(zip(state.names, state.entries, strict=True))
    for row, (prompt, layers) in enumerate(zip(prompts(), got.exit_layers, strict=True)):
        filled = state.upper_len[row]
        last_stay = (layers == NUM_LAYERS).nonzero().max().item()
        assert filled == len(prompt) + last_stay > len(prompt) + (layers == NUM_LAYERS).sum() - 1
        ids = torch.tensor([prompt + got.sequences[row, 9:].tolist()])
        with torch.no_grad():
            full = model(ids, past_key_values=DynamicCache()).past_key_values
        for name, kind_of in (("upper_k", "keys"), ("upper_v", "values")):
            for layer in range(EXIT_LAYER, NUM_LAYERS):
                found = entries[name][layer - EXIT_LAYER, row, :filled].transpose(0, 1)
                wanted = getattr(full.layers[layer], kind_of)[0, :, :filled]
                torch.testing.assert_close(found, wanted, atol=3e-5, rtol=3e-5)


class Poison(BaseStreamer):
    """Makes all parameters of these layers NaN when the first new token comes."""

    def __init__(self, layers):
        self.layers, self.puts = layers, 0

    def put(self, value):
        self.puts += 1
        if self.puts == 2:  # the prompts are the first
            for parameter in self.layers.parameters():
                parameter.data.fill_(torch.nan)

    def end(self):
        pass


@POLICIES
def test_where_every_token_leaves_the_upper_layers_are_not_run(kv_policy):
    model, options = tiny_model(), {"threshold": 0.0, "kv_policy": kv_policy}
    expected = early_exit(model, **options)
    poison = Poison(model.model.layers[EXIT_LAYER:])
    got = early_exit(model, poison, **options)
    assert torch.equal(got.sequences, expected.sequences) and poison.puts == 1 + NEW_TOKENS
    assert got.counts.upper_layer_calls == 2 * NUM_CONTEXT
    assert got.counts.upper_kv_calls == 0


@POLICIES
def test_a_token_that_stays_runs_the_upper_layers(kv_policy):
    """Which says that the poison of the test before works."""
    model = tiny_model()
    poison = Poison(model.model.layers[EXIT_LAYER:])
    with pytest.raises(FloatingPointError, match="got NaN"):
        early_exit(model, poison, threshold=THRESHOLDS["max_prob"], kv_policy=kv_policy)
    assert 1 < poison.puts < 1 + NEW_TOKENS


def test_counts_of_the_other_modes():
    """Full depth runs every token; a draft that does not stand is a lower layer's run in vain."""
    arguments = {**PROMPTS, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    tokens = NUM_CONTEXT + 3 * NEW_TOKENS
    full = accelerate(tiny_model()).generate(**arguments).counts
    assert full.lower_layer_calls + full.upper_layer_calls == NUM_LAYERS * tokens
    drafted = accelerate(tiny_model(), mode="speculative", exit_layer=2, threshold=0.1)
    assert drafted.generate(**arguments).counts.lower_layer_calls > 2 * tokens
