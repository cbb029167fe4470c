"""Token ids for training: a corpus tokenised once, kept in memory-mapped files, cut in windows.

A cache folder holds tokenizer.json, one .bin of little-endian ids per split, and corpus.json, which
is written last and has the SHA-256 of each of the others: files that do not match it are rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lego.config import DataConfig
from lego.corpora import Documents, Text, load_text
from lego.files import replacing_file
from lego.tokenizer import Tokenizer, train_tokenizer

FORMAT_VERSION = 1  # raise it when the same text would give other ids or another file layout
SPLITS = ("train", "calibration", "validation")
_SIDECAR = "corpus.json"
_TOKENIZER = "tokenizer.json"
_FILES = (_TOKENIZER, *(f"{split}.bin" for split in SPLITS))  # all but the sidecar
_BATCH_BYTES = 1 << 20  # text tokenised at a time; the ids of one batch are Python ints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSplit:
    """The ids of one split and the size of the text they came from.

    ids: uint16 or uint32 [num_ids], memory-mapped and read-only, each in [0, vocab_size). Every
        document is preceded by the end-of-text id, so `ids[0]` is one and `ids[1:]` are all to be
        predicted.
    num_bytes, num_words: UTF-8 bytes and whitespace-separated words of the documents. The
        end-of-text ids stand for none of them, so with L the mean loss in nats over `ids[1:]`,
        bits per byte are `L * (len(ids) - 1) / num_bytes / ln 2`.
    """

    ids: np.ndarray
    num_bytes: int
    num_words: int


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenised corpus. `sha256` and `description` are those of its text, all of it."""

    name: str
    sha256: str
    description: str
    tokenizer: Tokenizer
    train: TokenSplit
    calibration: TokenSplit
    validation: TokenSplit


def prepare_corpus(config: DataConfig, cache_dir: Path | None = None) -> Corpus:
    """Return the corpus of `config`, tokenised at the first call and read from disk afterwards.

    The tokenizer learns from the train split alone.
    cache_dir: folder for the token files, by default $LEGO_CACHE or ~/.cache/lego. Processes may
        share it and may be killed at any time.
    Raises: ValueError for what `load_text` refuses, or if cache_dir cannot be a folder;
        RuntimeError if the files just written cannot be read back.
    """
    text = load_text(config.name, config.data_dir)
    folder = _cache_folder(config, text, cache_dir)
    corpus = _read_cache(folder, text)
    if corpus is None:
        _write_cache(folder, text, config)
        corpus = _read_cache(folder, text)
    if corpus is None:
        raise RuntimeError(f"prepare_corpus: cache must keep what is written to it, got {folder}")
    return corpus


def num_windows(ids: np.ndarray, seq_len: int) -> int:
    """Return how many windows of `window_batch` the ids [num_ids] hold, at least one.

    Window i is `ids[i * seq_len : (i + 1) * seq_len + 1]`: neighbours share one id, the last target
    of one and the first input of the next. So every id but the first is a target exactly once, save
    the last `(num_ids - 1) % seq_len`, which fill no window.
    Raises: ValueError if seq_len < 1 or num_ids < seq_len + 1.
    """
    if seq_len < 1:
        raise ValueError(f"num_windows: seq_len must be >= 1, got {seq_len}")
    if len(ids) < seq_len + 1:
        raise ValueError(
            f"num_windows: a split must hold >= {seq_len + 1} ids for seq_len={seq_len}, "
            f"got {len(ids)}"
        )
    return (len(ids) - 1) // seq_len


def window_batch(ids: np.ndarray, seq_len: int, index: Tensor) -> Tensor:
    """Return windows int64 [B, seq_len + 1]: inputs are `[:, :-1]`, targets `[:, 1:]`.

    ids: integers [num_ids]. index: int64 [B], each in [0, num_windows(ids, seq_len)).
    Raises: ValueError if an index is out of range, or for what `num_windows` refuses.
    """
    count = num_windows(ids, seq_len)
    if index.dim() != 1 or index.dtype != torch.int64:
        got = f"{index.dtype} {tuple(index.shape)}"
        raise ValueError(f"window_batch: index must be int64 [B], got {got}")
    which = index.cpu().numpy()
    if which.size and not 0 <= which.min() <= which.max() < count:
        wrong = f"{which.min()} to {which.max()}"
        raise ValueError(f"window_batch: index must be in [0, {count}), got {wrong}")
    rows = which[:, None] * seq_len + np.arange(seq_len + 1)  # [B, seq_len + 1]
    return torch.from_numpy(ids[rows].astype(np.int64))


def _cache_folder(config: DataConfig, text: Text, cache_dir: Path | None) -> Path:
    root = cache_dir or os.environ.get("LEGO_CACHE") or Path.home() / ".cache" / "lego"
    key = f"{text.sha256[:32]}-{config.tokenizer}-{config.vocab_size}-v{FORMAT_VERSION}"
    folder = Path(root).expanduser() / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache_dir: must be a writable folder, got {root} ({error})") from error
    return folder


def _write_cache(folder: Path, text: Text, config: DataConfig) -> None:
    tokenizer = train_tokenizer(config.tokenizer, text.train, config.vocab_size)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with replacing_file(folder / _TOKENIZER) as file:
        file.write(tokenizer.backend.to_str().encode())
    splits: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        documents: Documents = getattr(text, split)
        with replacing_file(folder / f"{split}.bin") as file:
            for batch in _batches(documents):
                file.write(_token_bytes(tokenizer, batch, dtype))
        splits[split] = {
            "num_bytes": sum(len(document.encode()) for document in documents),
            "num_words": sum(len(document.split()) for document in documents),
        }
    sidecar = {
        "dtype": dtype.str,
        "splits": splits,
        "sha256": {name: _digest(folder / name) for name in _FILES},
    }
    with replacing_file(folder / _SIDECAR) as file:
        file.write(json.dumps(sidecar, indent=1).encode())


def _batches(documents: Documents) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _token_bytes(tokenizer: Tokenizer, documents: list[str], dtype: np.dtype[Any]) -> bytes:
    """The ids of the documents, each after an end-of-text id; an id too large is an error."""
    first = [tokenizer.end_of_text_id]
    parts = [np.array(first + ids, dtype=dtype) for ids in tokenizer.encode_batch(documents)]
    return np.concatenate(parts).tobytes()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_cache(folder: Path, text: Text) -> Corpus | None:
    """The corpus kept in `folder`; None if there is none yet or if it is damaged."""
    if not (folder / _SIDECAR).is_file():
        return None
    try:
        return _read_checked(folder, text)
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        logger.warning("prepare_corpus: rebuilding the damaged cache %s (%r)", folder, error)
        return None


def _read_checked(folder: Path, text: Text) -> Corpus:
    sidecar = json.loads((folder / _SIDECAR).read_text(encoding="utf-8"))
    for name in _FILES:
        if _digest(folder / name) != sidecar["sha256"][name]:
            raise ValueError(f"{name} must match its SHA-256 in {_SIDECAR}")
    tokenizer = Tokenizer.load(folder / _TOKENIZER)
    splits = {}
    for split in SPLITS:
        sizes = sidecar["splits"][split]
        ids = np.memmap(folder / f"{split}.bin", dtype=np.dtype(sidecar["dtype"]), mode="r")
        if int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(f"{split}.bin: ids must be < {tokenizer.vocab_size}, got {ids.max()}")
        splits[split] = TokenSplit(ids, int(sizes["num_bytes"]), int(sizes["num_words"]))
    return Corpus(
        name=text.name,
        sha256=text.sha256,
        description=text.description,
        tokenizer=tokenizer,
        **splits,
    )
