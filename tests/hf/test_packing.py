"""accelerate() holds the weights once, sees what becomes of them, and gives the model back."""

import gc

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

from lego_kernels import library
from lego_kernels.hf import accelerate
from tests.hf.tiny_models import KINDS, ragged, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
PROMPTS = ragged(9, 3, 8)
NORM = "model.norm.weight"
MODES = (
    {"mode": "full"},
    {"mode": "speculative", "exit_layer": 2},
    {"mode": "early_exit", "exit_layer": 2, "threshold": 0.2},
)


def tokens(model, num_new):
    return model.generate(**PROMPTS, max_new_tokens=num_new)


def places(model):
    return {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


def storages(model):
    found = [p.untyped_storage() for p in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_held_once(kind):
    model = tiny_model(kind)
    before, held = places(model), storages(model)
    fast = accelerate(model, mode="speculative", exit_layer=1)
    weights = fast._shared.weights
    assert sum(storages(model).values()) == sum(held.values()) == fast.memory.shared
    assert fast.memory.added == weights.cos.nbytes + weights.sin.nbytes
    assert weights.embedding.data_ptr() == before["model.embed_tokens.weight"][1]
    assert weights.exit_norm.data_ptr() == weights.last_norm.data_ptr() == before[NORM][1]
    for layer, mine in zip(model.model.layers, (*weights.lower, *weights.upper), strict=True):
        at = layer.self_attn
        assert at.q_proj.weight.data_ptr() == mine.in_proj.data_ptr()
        assert at.v_proj.weight.untyped_storage().data_ptr() == mine.in_proj.data_ptr()
        assert layer.mlp.gate_proj.weight.data_ptr() == mine.gate_up.data_ptr()
        assert layer.mlp.down_proj.weight.data_ptr() == mine.down.data_ptr()
        assert torch.equal(mine.in_proj[-len(at.v_proj.weight) :], at.v_proj.weight)
        assert (mine.in_bias is None) == (at.q_proj.bias is None)
    assert {name: place[0] for name, place in places(model).items()} == {
        name: place[0] for name, place in before.items()
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_undo_gives_the_model_back(kind):
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [{*vars(module)} for module in model.modules()]
    ids, expected, held = places(model), tokens(model, 8), sorted(storages(model).values())
    fast = accelerate(model)
    assert torch.equal(tokens(model, 8), expected)  # the model works as before meanwhile
    fast.undo()
    fast.undo()
    after = model.state_dict()
    assert [*after] == [*before] and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: place[0] for name, place in places(model).items()} == {
        name: place[0] for name, place in ids.items()
    }
    assert sorted(storages(model).values()) == held  # each parameter has memory of its own
    assert [{*vars(module)} for module in model.modules()] == attributes
    assert torch.equal(tokens(model, 8), expected)
    with pytest.raises(RuntimeError, match="^generate: the acceleration must not be undone"):
        tokens(fast, 8)


def test_undo_lets_the_packed_weights_go():
    model = tiny_model()
    fast = accelerate(model)
    # torch's own count of who holds the packed tensor's storage
    packed = torch.multiprocessing.reductions.StorageWeakRef(
        fast._shared.weights.lower[0].in_proj.untyped_storage()
    )
    assert not packed.expired()
    fast.undo()
    gc.collect()
    assert packed.expired()


def test_what_training_writes_shows():
    model = tiny_model()
    fast, before = accelerate(model), tokens(model, 16)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.add_(0.5)
        model.model.layers[2].mlp.up_proj.weight.mul_(-1)
    expected = tokens(model, 16)
    assert not torch.equal(expected, before) and torch.equal(tokens(fast, 16), expected)


@pytest.mark.parametrize("change", ["to", "load", "module"])
def test_parameters_put_in_place_of_others_are_noticed(change):
    model = tiny_model()
    fast = accelerate(model)
    if change == "to":
        model.to(torch.bfloat16)
    elif change == "load":
        model.load_state_dict(tiny_model(seed=1).state_dict(), assign=True)
    else:
        model.model.layers[3].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    with pytest.raises(RuntimeError, match="must hold the parameters it was accelerated with"):
        tokens(fast, 8)


def test_several_accelerations_share_one_set():
    model = tiny_model()
    some = [accelerate(model, **way) for way in MODES]
    assert len({fast._shared.weights.lower[0].in_proj.data_ptr() for fast in some}) == 1
    assert sum(storages(model).values()) == some[0].memory.shared
    expected = tokens(model, 16)
    assert torch.equal(tokens(some[0], 16), expected)
    assert torch.equal(tokens(some[1], 16), expected)
    some[2].undo()
    with pytest.raises(RuntimeError, match="so accelerate it again"):
        tokens(some[0], 8)


def test_an_accelerated_model_can_be_saved(tmp_path):
    model = tiny_model("qwen2")
    fast, expected = accelerate(model), tokens(model, 16)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(tokens(again, 16), expected)
    assert torch.equal(tokens(accelerate(again.eval()), 16), tokens(fast, 16))


def test_a_failure_while_packing_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model()
    held = sorted(storages(model).values())
    monkeypatch.setattr(model.config, "num_key_value_heads", 3)  # what DecoderWeights refuses
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads"):
        accelerate(model)
    assert sorted(storages(model).values()) == held
