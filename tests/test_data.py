"""The token cache and the windows cut from it."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import lego.data
from lego.config import DataConfig
from lego.corpora import load_text
from lego.data import SPLITS, num_windows, prepare_corpus, window_batch
from lego.files import replacing_file


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"part {i}\nsays {'word ' * (5 + i % 7)}{i}" for i in range(60)))
    return DataConfig(name=str(path), vocab_size=300)


def flat(corpus):
    return [
        (split.ids.tolist(), split.num_bytes, split.num_words, corpus.tokenizer.backend.to_str())
        for split in (corpus.train, corpus.calibration, corpus.validation)
    ]


def refuse(*args):
    raise AssertionError("must not tokenise again")


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_ids_are_the_documents(config, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lego.data, "_BATCH_BYTES", 200)  # several batches, the last one short
    config = DataConfig(name=config.name, tokenizer=kind, vocab_size=300)
    corpus = prepare_corpus(config, tmp_path)
    text = load_text(config.name)
    assert (corpus.name, corpus.sha256) == ("book.txt", text.sha256)
    assert corpus.description == text.description
    for split in SPLITS:
        tokens, wanted = getattr(corpus, split), getattr(text, split)
        assert isinstance(tokens.ids, np.memmap) and not tokens.ids.flags.writeable
        assert (tokens.ids.dtype, tokens.ids.ndim, tokens.ids[0]) == (np.uint16, 1, 0)
        starts = np.flatnonzero(tokens.ids == 0)
        ends = [*starts[1:], len(tokens.ids)]
        pieces = [tokens.ids[a + 1 : b].tolist() for a, b in zip(starts, ends, strict=True)]
        assert pieces == [corpus.tokenizer.encode(doc) for doc in wanted]
        assert tokens.num_bytes == sum(len(doc.encode()) for doc in wanted)
        assert tokens.num_words == sum(len(doc.split()) for doc in wanted)
        if kind == "bpe":
            assert tuple(map(corpus.tokenizer.decode, pieces)) == wanted


def test_tokenizer_learns_from_train_only(config, tmp_path):
    words = DataConfig(name=config.name, tokenizer="word", vocab_size=300)
    known = prepare_corpus(words, tmp_path).tokenizer.backend.get_vocab()
    text = load_text(config.name)
    seen = {word for doc in text.train for word in doc.split()}
    assert set(known) - {"<|endoftext|>", "<unk>"} == seen
    assert not {doc.split()[1] for doc in text.validation} & set(known)


def test_second_call_reads(config, tmp_path, monkeypatch):
    first = flat(prepare_corpus(config, tmp_path))
    monkeypatch.setattr(lego.data, "train_tokenizer", refuse)
    assert flat(prepare_corpus(config, tmp_path)) == first
    for other in ({"vocab_size": 301}, {"vocab_size": 300, "tokenizer": "word"}):
        with pytest.raises(AssertionError, match="again"):  # other settings, other files
            prepare_corpus(DataConfig(name=config.name, **other), tmp_path)


def test_cache_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("LEGO_CACHE", str(tmp_path / "variable"))
    prepare_corpus(config)
    (folder,) = (tmp_path / "variable").iterdir()
    names = {"tokenizer.json", "corpus.json", *(f"{split}.bin" for split in SPLITS)}
    assert {path.name for path in folder.iterdir()} == names  # no temporary file is left
    monkeypatch.delenv("LEGO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_corpus(config)
    assert (tmp_path / ".cache" / "lego" / folder.name / "corpus.json").is_file()
    with pytest.raises(ValueError, match="cache_dir: must be a writable folder, got .*book.txt"):
        prepare_corpus(config, tmp_path / "book.txt")


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "corpus.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "flipped"])
def test_damaged_cache_is_rebuilt(config, tmp_path, caplog, name, damage):
    cache = tmp_path / "cache"
    first = flat(prepare_corpus(config, cache))
    (path,) = cache.glob(f"*/{name}")
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    damaged = {"truncated": content[: len(content) // 2], "emptied": b"", "flipped": flipped}
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    assert flat(prepare_corpus(config, cache)) == first
    assert path.read_bytes() == content
    quiet = (name, damage) == ("corpus.json", "removed")  # as before the first call
    assert ("rebuilding the damaged cache" in caplog.text) != quiet


@pytest.mark.parametrize("sidecar", ["[]", "3", "{}", '{"sha256": {}}', '{"sha256": []}'])
def test_foreign_sidecar_is_rebuilt(config, tmp_path, sidecar):
    first = flat(prepare_corpus(config, tmp_path))
    (path,) = tmp_path.glob("*/corpus.json")
    path.write_text(sidecar)
    assert flat(prepare_corpus(config, tmp_path)) == first


def test_ids_beyond_the_vocabulary_are_rebuilt(config, tmp_path, caplog):
    corpus = prepare_corpus(config, tmp_path)
    first = flat(corpus)
    (path,) = tmp_path.glob("*/train.bin")
    ids = np.array(corpus.train.ids)
    ids[3] = corpus.tokenizer.vocab_size
    path.write_bytes(ids.tobytes())
    sidecar = json.loads(path.with_name("corpus.json").read_text())
    sidecar["sha256"]["train.bin"] = hashlib.sha256(ids.tobytes()).hexdigest()
    path.with_name("corpus.json").write_text(json.dumps(sidecar))
    assert flat(prepare_corpus(config, tmp_path)) == first
    assert "train.bin: ids must be < 300, got 300" in caplog.text


@pytest.mark.parametrize("survived", range(5))
def test_killed_while_writing(config, tmp_path, monkeypatch, survived):
    """A kill after 0 .. 4 of the five files leaves nothing that a later call trusts."""
    first = flat(prepare_corpus(config, tmp_path / "whole"))
    real, left = os.replace, [survived]

    def killed(source, target):
        if left[0] == 0:
            real(source, source.with_name(".torn.tmp"))  # a killed process does not clean up
            raise KeyboardInterrupt
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, tmp_path / "cache")
    monkeypatch.setattr(os, "replace", real)
    assert not list((tmp_path / "cache").glob("*/corpus.json"))
    assert flat(prepare_corpus(config, tmp_path / "cache")) == first


def test_half_written_file_has_no_name(tmp_path):
    path = tmp_path / "ids.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing_file(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["ids.bin"]
    assert path.read_bytes() == b"old"


def test_race(config, tmp_path):
    """Eight writers of one folder at once: each sees the whole corpus."""
    first = flat(prepare_corpus(config, tmp_path / "alone"))
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(prepare_corpus, config, tmp_path / "together") for _ in range(8)]
    assert all(flat(call.result()) == first for call in calls)
    assert not list((tmp_path / "together").glob("*/.*"))


def test_cache_that_forgets(config, tmp_path, monkeypatch):
    monkeypatch.setattr(lego.data, "_write_cache", lambda *args: None)
    with pytest.raises(RuntimeError, match="cache must keep what is written to it"):
        prepare_corpus(config, tmp_path)


def test_wide_ids(tmp_path):
    words = " ".join(f"w{i}" for i in range(70_000))
    (tmp_path / "wide.txt").write_text(f"{words}\n\none two\n\nthree")
    wide = DataConfig(name=str(tmp_path / "wide.txt"), tokenizer="word", vocab_size=70_000)
    corpus = prepare_corpus(wide, tmp_path)
    assert corpus.train.ids.dtype == np.uint32
    assert len(np.unique(corpus.train.ids[1:-3])) > 1 << 16
    assert corpus.tokenizer.vocab_size == int(corpus.train.ids.max()) + 1 == 70_000
    narrow = DataConfig(name=wide.name, tokenizer="word", vocab_size=1 << 16)
    assert prepare_corpus(narrow, tmp_path).train.ids.dtype == np.uint16


@pytest.mark.parametrize(("num_ids", "seq_len"), [(2, 1), (9, 8), (16, 8), (17, 8), (100, 7)])
def test_windows_predict_every_id_once(num_ids, seq_len):
    ids = np.arange(60_000, 60_000 + num_ids, dtype=np.uint16)
    count = num_windows(ids, seq_len)
    batch = window_batch(ids, seq_len, torch.arange(count))
    assert (batch.dtype, batch.shape) == (torch.int64, (count, seq_len + 1))
    targets = batch[:, 1:].flatten().tolist()
    assert targets == ids[1 : 1 + count * seq_len].tolist()
    assert len(ids) - 1 - len(targets) == (num_ids - 1) % seq_len
    assert torch.equal(batch[:, :-1], batch[:, 1:] - 1)
    order = torch.tensor([count - 1, 0, 0])
    assert torch.equal(window_batch(ids, seq_len, order), batch[order])
    assert window_batch(ids, seq_len, order[:0]).shape == (0, seq_len + 1)


def test_window_errors():
    ids = np.zeros(17, dtype=np.uint16)
    with pytest.raises(ValueError, match="must hold >= 18 ids for seq_len=17, got 17"):
        num_windows(ids, 17)
    with pytest.raises(ValueError, match="seq_len must be >= 1, got 0"):
        num_windows(ids, 0)
    for index, got in ([0, 2], "0 to 2"), ([-1], "-1 to -1"):
        with pytest.raises(ValueError, match=rf"index must be in \[0, 2\), got {got}"):
            window_batch(ids, 8, torch.tensor(index))
    for wrong in (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"index must be int64 \[B\], got torch.int"):
            window_batch(ids, 8, wrong)
