"""Tokenizers: byte-level BPE and whitespace words, a thin layer over the `tokenizers` library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lego.config import TokenizerKind

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
# the end-of-text token and the 256 byte symbols, plus one so that there is something to learn
MIN_VOCAB_SIZE = 258


class Tokenizer:
    """Text to token ids and back. The ids are 0 .. vocab_size - 1.

    Text is always plain text: `<|endoftext|>` spelled out in a document never becomes the
    end-of-text id, which only `end_of_text_id` gives. That setting of the library is not kept in
    tokenizer.json, which is one reason for this class; the other is `decode`, which shows every id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_of_text: str = END_OF_TEXT) -> None:
        """Wrap a tokenizer of the library; only imported ones end texts with another token.

        Raises: ValueError if it has no `end_of_text` or its ids are not 0 .. vocab_size - 1.
        """
        ids = backend.get_vocab(with_added_tokens=True)
        if end_of_text not in ids:
            raise ValueError(f"Tokenizer: must have the token {end_of_text}, got {len(ids)} others")
        if sorted(ids.values()) != list(range(len(ids))):
            top = max(ids.values())
            raise ValueError(
                f"Tokenizer: {len(ids)} ids must run from 0, got a largest id of {top}"
            )
        backend.encode_special_tokens = True
        self.backend = backend
        self.vocab_size = len(ids)
        self.end_of_text = end_of_text
        self.end_of_text_id = ids[end_of_text]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with no end-of-text id added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, computed on several threads."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids in [0, vocab_size); exact for BPE, words joined by " " else.

        Raises: ValueError if an id is out of range.
        """
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"decode: ids must be in [0, {self.vocab_size}), got {wrong[0]}")
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, readable by `load` and by the `tokenizers` library."""
        Path(path).write_text(self.backend.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, end_of_text: str = END_OF_TEXT) -> Tokenizer:
        """Read a tokenizer.json.

        Raises: ValueError if the file is missing, damaged, or has no `end_of_text`.
        """
        if not Path(path).is_file():
            raise ValueError(f"tokenizer: file must exist, got {path}")
        try:
            # from_buffer raises ValueError where from_file raises a bare Exception
            backend = tokenizers.Tokenizer.from_buffer(Path(path).read_bytes())
            return cls(backend, end_of_text)
        except ValueError as error:
            raise ValueError(
                f"tokenizer: must be a whole tokenizer.json, got {path} ({error})"
            ) from error


def train_tokenizer(kind: TokenizerKind, texts: str | Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer from one text or many; the same texts give the same tokenizer.

    kind: `bpe` (byte-level BPE, lossless) or `word` (whitespace words, rare ones are `<unk>`).
    vocab_size: most ids to use, special tokens included, >= 258. Texts too small to fill it give
        fewer: read `vocab_size` of the result. `<|endoftext|>` has id 0, `<unk>` of `word` id 1.
    Raises: ValueError for an unknown kind or too small a vocabulary.
    """
    kinds = get_args(TokenizerKind)
    if kind not in kinds:
        raise ValueError(f"train_tokenizer: kind must be one of {kinds}, got {kind!r}")
    if vocab_size < MIN_VOCAB_SIZE:
        rule = f"train_tokenizer: vocab_size must be >= {MIN_VOCAB_SIZE}"
        raise ValueError(f"{rule}, got {vocab_size}")
    texts = [texts] if isinstance(texts, str) else texts
    backend = _train_bpe(texts, vocab_size) if kind == "bpe" else _train_words(texts, vocab_size)
    return Tokenizer(backend)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # all 256 bytes, so that no text is out of reach
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_words(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    # counted here because the library's trainer leaves a hole in the ids when the text itself
    # holds the word <unk>, as WikiText-2 does
    counts = Counter(word for text in texts for word in _plain(text).split())
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    words = islice((word for word in by_count if word != UNKNOWN), vocab_size - 2)
    vocab = {word: i for i, word in enumerate([END_OF_TEXT, UNKNOWN, *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Replace(END_OF_TEXT, UNKNOWN)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _plain(text: str) -> str:
    return text.replace(END_OF_TEXT, UNKNOWN)
