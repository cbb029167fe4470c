"""accelerate(): transformers' tokens where nothing may leave early, and tokens that do."""

import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

from lego_kernels import library
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.hf import accelerate
from tests.hf.tiny_models import KINDS, NUM_LAYERS, cut, ragged, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
PROMPTS = ragged(9, 3, 8)


def tokens(model, num_new=64, prompts=PROMPTS, **options):
    return model.generate(**prompts, max_new_tokens=num_new, **options)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_transformers(kind, seed):
    model, prompts = tiny_model(kind, seed), ragged(9, 3, 8, seed=seed)
    expected = tokens(model, prompts=prompts)
    assert expected.shape == (3, 9 + 64)
    ways = [{"mode": "full"}]
    for exit_layer in (1, NUM_LAYERS // 2, NUM_LAYERS - 1, NUM_LAYERS):
        at = {"exit_layer": exit_layer}
        ways += [{"mode": "speculative", **at}, {"mode": "early_exit", "threshold": 1.1, **at}]
    for way in ways:
        got = accelerate(model, **way).generate(**prompts, max_new_tokens=64)
        assert torch.equal(got, expected), way


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_zero_is_the_model_cut_to_its_lower_block(kind, seed):
    model = tiny_model(kind, seed)
    for exit_layer in (1, 3):
        fast = accelerate(model, mode="early_exit", exit_layer=exit_layer, threshold=0.0)
        out = tokens(fast, return_dict_in_generate=True)
        assert torch.equal(out.sequences, tokens(cut(model, exit_layer)))
        assert (out.exit_layers == exit_layer).all() and (out.confidences > 0).all()


def confidence_of(logits, criterion):
    prob = logits.double().softmax(-1)
    top = prob.topk(2).values
    entropy = -(prob * prob.log()).sum() / math.log(len(prob))
    return {"max_prob": top[0], "margin": top[0] - top[1], "entropy": 1 - entropy}[criterion]


@torch.no_grad()
def early_exit_by_transformers(model, ids, num_new, exit_layer, threshold, criterion):
    """Every token by plain forward passes over the whole sequence: a deep one sees full depth."""
    ids, layers = ids[None], []
    for _ in range(num_new):
        out = model(ids, output_hidden_states=True, use_cache=False)
        shallow = model.lm_head(model.model.norm(out.hidden_states[exit_layer][0, -1]))
        leaves = confidence_of(shallow, criterion) >= threshold
        layers.append(exit_layer if leaves else NUM_LAYERS)
        token = (shallow if leaves else out.logits[0, -1]).argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return ids[0].tolist(), layers


@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("kind", ["llama-tied-llama3", "qwen2", "qwen3"])
def test_recompute_leaves_what_a_full_forward_leaves(kind, criterion):
    model, how = tiny_model(kind), {"mode": "early_exit", "exit_layer": 2, "criterion": criterion}
    never = tokens(accelerate(model, threshold=1.1, **how), 32, return_dict_in_generate=True)
    # between two confidences, so that no rounding decides
    threshold = never.confidences.flatten().sort().values[47:49].mean().item()
    out = tokens(accelerate(model, threshold=threshold, **how), 32, return_dict_in_generate=True)
    assert 0.2 < (out.exit_layers == 2).float().mean() < 0.8
    for row, length in enumerate((9, 3, 8)):
        ids = PROMPTS["input_ids"][row, 9 - length :]
        want, layers = early_exit_by_transformers(model, ids, 32, 2, threshold, criterion)
        assert out.sequences[row, 9 - length :].tolist() == want
        assert out.exit_layers[row].tolist() == layers


def test_inexact_policies_say_so_and_differ():
    model, got = tiny_model(), {}
    for policy in ("recompute", "propagate", "hole"):
        how = {"mode": "early_exit", "exit_layer": 1, "threshold": 0.3, "kv_policy": policy}
        fast = accelerate(model, **how)
        out = tokens(fast, return_dict_in_generate=True)
        assert fast.kv_exact is out.kv_exact is (policy == "recompute")
        got[policy] = out.sequences.tolist()
    assert got["propagate"] != got["recompute"] != got["hole"] != got["propagate"]


def test_options_reach_the_speculative_decoder():
    how = {"mode": "speculative", "exit_layer": 1, "criterion": "margin"}
    fast = accelerate(tiny_model(), threshold=0.25, draft_tokens=3, **how)
    decoder = fast._strategy.decoder(fast._shared.weights, 2, 32, Sampling())
    assert decoder.state.threshold.tolist() == [0.25, 0.25]
    assert len(decoder.state.new_tokens) == 2 * 3
    assert decoder.state.entries[decoder.state.names.index("criterion")] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    """Of float32's logits under the same tokens, the tokens are the best but for rounding."""
    model = tiny_model("llama-tied-llama3", dtype=dtype)
    ids = accelerate(model).generate(PROMPTS["input_ids"][:1], max_new_tokens=64)
    with torch.no_grad():
        logits = tiny_model("llama-tied-llama3").float()(ids).logits[0, 8:-1]
    behind = logits.amax(-1) - logits.gather(1, ids[0, 9:, None])[:, 0]
    assert behind.max() < (0.5 if dtype == torch.bfloat16 else 0.1)
    assert (behind == 0).float().mean() > 0.8
