"""Tokenizers: lossless BPE, words by frequency, honest sizes, plain text stays plain."""

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lego.tokenizer import END_OF_TEXT, UNKNOWN, Tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat\n\n\tand the cat sat on", "the dog; the log, the fog " * 3]
BPE = train_tokenizer("bpe", TEXTS, 300)
# what a fresh process, with hash seeds of its own, must train again
RETRAIN = f"""
import hashlib
from lego.tokenizer import train_tokenizer
kinds = [train_tokenizer(kind, {TEXTS!r}, 300).backend.to_str() for kind in ("bpe", "word")]
print(hashlib.sha256("".join(kinds).encode()).hexdigest())
"""


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text())
@example(f"a{END_OF_TEXT}b")
@example(" \r\n\x00\u2028 \U0001f9f1 e\u0301")
def test_bpe_round_trip(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.end_of_text_id not in ids
    assert all(0 < i < BPE.vocab_size for i in ids)


def test_bpe_sizes():
    assert BPE.end_of_text_id == 0
    assert len(BPE.encode("the cat sat")) < len("the cat sat") / 2  # it did learn
    assert train_tokenizer("bpe", "ab" * 500 + " cd ef gh " * 500, 258).vocab_size == 258
    # a text with nothing to merge: 256 bytes and the end-of-text token, whatever was asked for
    assert train_tokenizer("bpe", "xyz", 2048).vocab_size == 257


def test_words_by_frequency():
    tokenizer = train_tokenizer("word", ["b a a <unk> <unk> <unk>", "c b a d"], 258)
    assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (0, 6)
    # <unk> written in the text (as in WikiText-2) is the unknown word itself
    assert tokenizer.encode("a b\n\n c  zebra <unk>") == [2, 3, 4, 1, 1]
    assert tokenizer.decode([0, 2, 1]) == f"{END_OF_TEXT} a {UNKNOWN}"


def test_words_keep_the_most_frequent():
    many = " ".join(f"w{i} " * (400 - i) for i in range(400))
    tokenizer = train_tokenizer("word", many, 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode("w0 w297 w298") == [2, 299, 1]


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_save_load(kind, tmp_path):
    tokenizer = train_tokenizer(kind, TEXTS, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = f"the cat {END_OF_TEXT} sat{END_OF_TEXT} on the log"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert 0 not in loaded.encode(text)  # a setting that tokenizer.json does not keep
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (loaded.vocab_size, loaded.end_of_text_id) == (tokenizer.vocab_size, 0)
    assert loaded.encode_batch([text, "cat"]) == [loaded.encode(text), loaded.encode("cat")]


def test_training_is_deterministic():
    kinds = [train_tokenizer(kind, TEXTS, 300).backend.to_str() for kind in ("bpe", "word")]
    digest = hashlib.sha256("".join(kinds).encode()).hexdigest()
    command = [sys.executable, "-c", RETRAIN]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout[:-1] == digest


def test_training_errors():
    with pytest.raises(ValueError, match="vocab_size must be >= 258, got 257"):
        train_tokenizer("bpe", "abc", 257)
    with pytest.raises(ValueError, match="kind must be one of .'bpe', 'word'., got 'char'"):
        train_tokenizer("char", "abc", 300)


def test_decode_range():
    with pytest.raises(ValueError, match=rf"ids must be in \[0, {BPE.vocab_size}\), got -1"):
        BPE.decode([5, -1])
    with pytest.raises(ValueError, match=f"got {BPE.vocab_size}"):
        BPE.decode([BPE.vocab_size])


def test_load_errors(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="file must exist, got .*tokenizer.json"):
        Tokenizer.load(path)
    whole = BPE.backend.to_str()
    for damaged in (b"", whole.encode()[:500], b"\xff\xfe", b'{"model": 3}'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"must be a whole tokenizer.json, got .*\("):
            Tokenizer.load(path)
    path.write_text(whole.replace(END_OF_TEXT, "<s>"))
    with pytest.raises(ValueError, match="must have the token <|endoftext|>"):
        Tokenizer.load(path)
    layout = json.loads(train_tokenizer("word", "a b", 300).backend.to_str())
    layout["model"]["vocab"]["b"] = 9
    path.write_text(json.dumps(layout))
    with pytest.raises(ValueError, match="4 ids must run from 0, got a largest id of 9"):
        Tokenizer.load(path)
