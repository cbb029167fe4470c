"""DecoderWeights: what it refuses, what it copies, and what it uses where it lies."""

from dataclasses import fields, replace

import pytest
import torch

from lego.engine import decoder_weights
from lego_kernels import library
from lego_kernels.decoder.decoder import Decoder
from tests.models import VARIANTS, tiny_model, token_ids

ALL = {"qk_norm": True, "qkv_bias": True, "tie_embeddings": False}
KINDS = ("exit_state", "own")


def weights(upper_kv="exit_state", **changes):
    return decoder_weights(tiny_model(upper_kv, dtype=torch.float32, **ALL, **changes))


def tensors(given):
    """Every tensor by its path."""
    parts = {"": given, "upper_kv.": given.upper_kv, "gate.": given.gate}
    for name in ("lower", "upper"):
        parts |= {f"{name}.{i}.": layer for i, layer in enumerate(getattr(given, name))}
    return {
        prefix + field.name: getattr(part, field.name)
        for prefix, part in parts.items()
        if part is not None
        for field in fields(part)
        if isinstance(getattr(part, field.name), torch.Tensor)
    }


def changed(given, path, value):
    """The same weights with another value at a path."""
    first, _, rest = path.partition(".")
    if not rest:
        return replace(given, **{first: value})
    part = getattr(given, first)
    if isinstance(part, tuple):
        index, _, name = rest.partition(".")
        layers = list(part)
        layers[int(index)] = replace(layers[int(index)], **{name: value})
        return replace(given, **{first: tuple(layers)})
    return replace(given, **{first: replace(part, **{rest: value})})


def named(path):
    """The path as messages name it: layers are counted through both blocks."""
    first, _, rest = path.partition(".")
    if first in ("lower", "upper"):
        index, _, name = rest.partition(".")
        return f"layer {int(index) + 2 * (first == 'upper')} {name}"
    return path


CASES = [(kind, path) for kind in KINDS for path in tensors(weights(kind))]
EACH = pytest.mark.parametrize(("upper_kv", "path"), CASES, ids=str)


def test_every_part_is_tried():
    assert len(CASES) == 2 * (6 + 2 + 4 * 9) + 3


@EACH
def test_a_wrong_shape_is_refused(upper_kv, path):
    given = weights(upper_kv)
    x = tensors(given)[path]
    bad = [x.new_zeros(*x.shape[:-1], x.size(-1) + 1), x.new_zeros(1, *x.shape), x[0]]
    if path not in ("embedding", "head"):  # which may have more rows than the vocabulary
        bad.append(x.new_zeros(x.size(0) + 1, *x.shape[1:]))
    for one in bad:
        with pytest.raises(ValueError, match="^DecoderWeights: .* must .*, got "):
            changed(given, path, one)


@EACH
def test_a_wrong_dtype_is_refused(upper_kv, path):
    given = weights(upper_kv)
    bad = tensors(given)[path].bfloat16()
    like = "torch.float32" if path != "embedding" else "torch.bfloat16"
    # where the embedding is another, the first of the others is named
    name = named(path) if path != "embedding" else "head"
    other = "torch.bfloat16" if path != "embedding" else "torch.float32"
    with pytest.raises(ValueError, match=f"^DecoderWeights: {name} must be {like}, got {other}$"):
        changed(given, path, bad)


@EACH
def test_another_device_is_refused(upper_kv, path):
    given = weights(upper_kv)
    name, like, other = named(path), "cpu", "meta"
    if path == "embedding":
        name, like, other = "head", "meta", "cpu"
    with pytest.raises(
        ValueError, match=f"^DecoderWeights: {name} must be on {like}, got {other}$"
    ):
        changed(given, path, tensors(given)[path].to("meta"))


@EACH
def test_what_is_not_contiguous_is_copied(upper_kv, path):
    """Rows of a wider tensor, or a transposed one: a copy, which holds the same values."""
    given = weights(upper_kv)
    x = tensors(given)[path]
    wide = torch.full((2 * x.size(0), *x.shape[1:]), torch.nan)
    for view in (wide[::2], x.t().contiguous().t()):
        view.copy_(x)
        got = tensors(changed(given, path, view))[path]
        assert got.is_contiguous() and torch.equal(got, x)
        assert (got.data_ptr() == view.data_ptr()) == view.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_other_dtypes_are_refused(dtype):
    given = weights()
    sentence = f"embedding must be float32, bfloat16 or float16, got {dtype}"
    with pytest.raises(ValueError, match=f"^DecoderWeights: {sentence}$"):
        replace(given, embedding=given.embedding.to(dtype))


RANGE = r"\[1, rows of embedding and head\], got {} for \(50, 32\) and \(50, 32\)"
SENTENCES = {
    f"vocab_size must be in {RANGE.format(0)}": {"vocab_size": 0},
    f"vocab_size must be in {RANGE.format(51)}": {"vocab_size": 51},
    "lower must hold at least one layer, got none": {"lower": ()},
    "num_heads must be a multiple of num_kv_heads, got 3 and 2": {"num_heads": 3},
    "num_heads must be a multiple of num_kv_heads, got 4 and 0": {"num_kv_heads": 0},
    "num_heads must be a multiple of num_kv_heads, got 0 and 2": {"num_heads": 0},
    "eps must be >= 0, got -1.0": {"eps": -1.0},
    "eps must be >= 0, got nan": {"eps": float("nan")},
    "final_norm must come with upper layers, got 2 of them": {"final_norm": None},
    "final_norm must come with upper layers, got 0 of them": {"upper": ()},
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_values_that_do_not_go_together(sentence):
    with pytest.raises(ValueError, match=f"^DecoderWeights: {sentence}$"):
        replace(weights(), **SENTENCES[sentence])


def test_sizes_are_positive():
    given = weights()
    layers = tuple(
        replace(layer, gate_up=layer.gate_up[:0], down=layer.down[:, :0]) for layer in given.lower
    )
    with pytest.raises(ValueError, match="^DecoderWeights: hidden_dim must be >= 1, got 0$"):
        replace(given, lower=layers)
    empty = given.cos[:, :0]
    with pytest.raises(ValueError, match="^DecoderWeights: head_dim must be >= 1, got 0$"):
        replace(given, cos=empty, sin=empty)


def test_upper_layers_must_make_what_upper_kv_does_not():
    """Projections without K and V need upper_kv, and the others refuse it."""
    with pytest.raises(ValueError, match="^DecoderWeights: layer 2 in_proj must be"):
        replace(weights("exit_state"), upper_kv=None)
    with pytest.raises(ValueError, match="^DecoderWeights: layer 2 in_proj must be"):
        replace(weights("own"), upper_kv=weights("exit_state").upper_kv)


def test_padded_vocabulary():
    """A head and an embedding of more rows than the vocabulary has ids."""
    given, prompt = weights(), token_ids(4)
    pad = torch.full((14, 32), torch.inf)
    padded = replace(
        given, head=torch.cat((given.head, pad)), embedding=torch.cat((given.embedding, pad))
    )
    texts = []
    for one in (given, padded):
        decoder = Decoder(one, 1, 20)
        decoder.prefill([prompt])
        texts.append([decoder.step()[0].token for _ in range(8)])
    assert texts[0] == texts[1]


def test_properties():
    given = weights(exit_layer=3)
    assert (given.dim, given.head_dim, given.hidden_dim, given.num_layers) == (32, 8, 24, 4)
    assert given.last_norm is given.final_norm
    dense = weights(exit_layer=4)
    assert dense.last_norm is dense.exit_norm and dense.upper == () and dense.gate is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("upper_kv", KINDS)
def test_k_and_v_rows_of_every_upper_layer(upper_kv, variant):
    """From exit states by the rows that the model's own modules use; views, nothing copied."""
    model = tiny_model(upper_kv, dtype=torch.float32, **VARIANTS[variant])
    given, state = decoder_weights(model), torch.randn(1, 1, 32)
    position = torch.zeros(1, 1, dtype=torch.int64)
    if upper_kv == "exit_state":
        expected = model.upper_kv(state, position)
    else:
        expected = [
            block.attention.project_kv(block.attention_norm(state), model.rotary(position))
            for block in model.upper
        ]
    rows = list(given.upper_kv_layers())
    assert len(rows) == len(expected) == len(model.upper)
    held = {x.untyped_storage().data_ptr() for x in tensors(given).values()}
    for (norm, proj, bias, k_norm), (k, v) in zip(rows, expected, strict=True):
        normed = torch.nn.functional.rms_norm(state, norm.shape, norm, given.eps)
        packed = torch.nn.functional.linear(normed, proj, bias).unflatten(-1, (2, -1, 8))
        if k_norm is not None:  # at position 0 nothing is rotated
            packed[:, :, 0] = torch.nn.functional.rms_norm(packed[:, :, 0], (8,), k_norm, given.eps)
        torch.testing.assert_close(packed[:, :, 0], k)
        torch.testing.assert_close(packed[:, :, 1], v)
        assert proj.is_contiguous() and proj.untyped_storage().data_ptr() in held


@pytest.mark.skipif(bool(library.NOT_LOADED["CPU"]), reason="CPU kernels are not loaded")
def test_weights_hold_their_tensors():
    """The table of addresses outlives the model it was made from, and its copies too."""
    given, prompt = weights(), token_ids(4)
    model_free = Decoder(
        changed(given, "lower.0.down", given.lower[0].down.repeat(1, 2)[:, :24]), 1, 20
    )
    expected = Decoder(weights(), 1, 20)
    del given
    torch.empty(1 << 20).fill_(7)
    for decoder in (model_free, expected):
        decoder.prefill([prompt])
    assert str([model_free.step() for _ in range(8)]) == str([expected.step() for _ in range(8)])
