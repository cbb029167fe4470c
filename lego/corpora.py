"""Corpora: where text comes from and how it is cut into train, calibration and validation.

A corpus is a list of documents (topics, modules, articles, paragraphs, lines). Documents that
repeat another one exactly are dropped, and each of the rest goes into one split as a whole.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

HELD_OUT_SHARE = 0.05  # of the bytes, for calibration and again for validation

# folders of the standard library that are not its own sources (packages installed beside it) or
# would not be honest text: tests, near-identical character tables, and the topics as a Python
# literal, which are the other corpus
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ARTICLE = re.compile(r"^ = [^=\n].*[^=\n] = $", re.MULTILINE)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")

Documents = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus as text. No document is empty or blank, and none is in two splits.

    train, calibration, validation: the documents of each split, at least one each.
    sha256: hex digest of the documents and of their split; equal texts have equal digests.
    description: one line on what the text is and where it came from.
    """

    name: str
    train: Documents
    calibration: Documents
    validation: Documents
    sha256: str
    description: str


def load_text(name: str, data_dir: Path | None = None) -> Text:
    """Return the corpus called `name`; the same files give the same text, split the same way.

    name: `pydocs`, `stdlib`, `wikitext2`, `wikitext2-mini`, or a path to a file: JSON lines with a
        string `text` if it ends in .jsonl, else plain text whose documents are its paragraphs.
    data_dir: for the WikiText corpora, the folder that holds their files.
    Raises: ValueError if the name is unknown, or a file is missing, empty, not UTF-8, not JSON
        lines, or holds fewer than three different documents.
    """
    if name in CORPORA:
        return CORPORA[name](name, data_dir)
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.suffix or path.name != name:
        raise ValueError(f"load_text: file must exist, got {name}")
    known = ", ".join(CORPORA)
    raise ValueError(f"load_text: name must be {known} or a path to a file, got {name!r}")


def _load_pydocs(name: str, data_dir: Path | None) -> Text:
    from pydoc_data.topics import topics  # 0.7 MB, wanted by this corpus only

    docs = [topics[topic] for topic in sorted(topics)]
    with _collector_off():
        docs += _module_docstrings()
    what = f"pydoc topics and standard-library docstrings of {_python()}"
    return _text(name, _split(name, docs), what)


def _load_stdlib(name: str, data_dir: Path | None) -> Text:
    docs = []
    for path in _stdlib_files():
        with tokenize.open(path) as file:  # honours the coding cookie
            docs.append(file.read())
    return _text(
        name, _split(name, docs), f"standard-library sources of {_python()}, without tests"
    )


def _load_wikitext2(name: str, data_dir: Path | None) -> Text:
    if data_dir is None:
        whole = _download_wikitext2()
        where = "from the Hugging Face hub"
    else:
        folder = Path(data_dir).expanduser()
        whole = [_read_utf8(_wikitext_file(folder, split)) for split in ("train", "valid", "test")]
        where = "from files"
    splits = [_articles(part) for part in whole]
    return _text(name, _distinct(name, splits), f"WikiText-2, its three splits, {where}")


def _load_wikitext2_mini(name: str, data_dir: Path | None) -> Text:
    if data_dir is None:
        raise ValueError(f"{name}: data_dir must hold valid.txt and test.txt, got None")
    folder = Path(data_dir).expanduser()
    held_out = _articles(_read_utf8(_wikitext_file(folder, "valid")))
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for article in held_out:  # to the smaller half, so that both run through the whole file
        half = sizes.index(min(sizes))
        halves[half].append(article)
        sizes[half] += len(article)
    splits = [_articles(_read_utf8(_wikitext_file(folder, "test"))), *halves]
    what = "WikiText-2 without its train split: trained on test, the rest halves of valid"
    return _text(name, _distinct(name, splits), what)


CORPORA: dict[str, Callable[[str, Path | None], Text]] = {
    "pydocs": _load_pydocs,
    "stdlib": _load_stdlib,
    "wikitext2": _load_wikitext2,
    "wikitext2-mini": _load_wikitext2_mini,
}


def _load_file(path: Path) -> Text:
    content = _read_utf8(path)
    if path.suffix == ".jsonl":
        splits = _split(path.name, _json_documents(path, content))
        return _text(path.name, splits, f"JSON lines of {path.name}")
    # paragraphs keep their order within a split: the next one reads on
    splits = _split(path.name, _PARAGRAPH_BREAK.split(content), keep_order=True)
    return _text(path.name, splits, f"paragraphs of {path.name}")


def _read_utf8(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"load_text: file must exist, got {path}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"load_text: must be UTF-8, got byte {error.start} of {path}") from error
    if not content.strip():
        raise ValueError(f"load_text: file must not be empty, got {path}")
    return content


def _json_documents(path: Path, content: str) -> Iterator[str]:
    # not splitlines: a JSON string may hold U+2028 as it is
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        rule = f"load_text: line {number} of {path} must be"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{rule} JSON, got {line[:40]!r} ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{rule} an object with a string "text", got {line[:40]!r}')
        if any("\ud800" <= char <= "\udfff" for char in record["text"]):
            raise ValueError(f"{rule} text that UTF-8 can hold, got a lone surrogate")
        yield record["text"]


def _stdlib_files() -> list[Path]:
    """The standard library's own .py files, in the order of their paths."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        # _sysconfigdata_* is written when Python is built and names that machine's folders
        found += [
            Path(folder, name)
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not found:
        raise ValueError(f"stdlib: the library's .py sources must be installed, got none in {root}")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


@contextmanager
def _collector_off() -> Iterator[None]:
    # syntax trees free themselves, but while they are built the cycle collector keeps walking all
    # of torch's objects: 4.8 s for the docstrings with it, 2.1 s without
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _module_docstrings() -> list[str]:
    """One document per module, and no docstring twice: posixpath and ntpath share theirs."""
    docs = []
    seen: set[str] = set()
    for path in _stdlib_files():
        new = [text for text in dict.fromkeys(_docstrings(_parse(path))) if text not in seen]
        seen.update(new)
        docs.append("\n\n".join(new))
    return docs


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a syntax tree, in the order of its source."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        # expressions hold no docstring, and skipping them halves the time
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old escape in somebody's string is not our user's news
        return ast.parse(path.read_bytes())


def _wikitext_file(folder: Path, split: str) -> Path:
    names = [f"wiki.{split}.tokens", f"wiki.{split}.raw", f"{split}.txt"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"load_text: data_dir must hold {' or '.join(names)}, got {folder}")


def _download_wikitext2() -> list[str]:
    remedy = "pip install datasets, or --data-dir with its files"
    try:
        # an extra, so mypy may or may not find it
        from datasets import load_dataset  # type: ignore[import, unused-ignore]
        from datasets.exceptions import (  # type: ignore[import, unused-ignore]
            DatasetsError,
        )
    except ImportError as error:
        rule = f"wikitext2: the datasets library must be installed ({remedy})"
        raise ValueError(f"{rule}, got {error}") from error
    try:
        loaded = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"wikitext2: download must succeed ({remedy}), got {error}") from error
    # the data set holds the file's lines, its blank ones (" \n" in the file) as ""
    return [
        "".join(row or " \n" for row in loaded[split]["text"])
        for split in ("train", "validation", "test")
    ]


def _articles(text: str) -> list[str]:
    starts = [match.start() for match in _ARTICLE.finditer(text)]
    bounds = [0, *starts, len(text)]
    return [text[a:b] for a, b in pairwise(bounds) if text[a:b].strip()]


def _split(name: str, documents: Iterable[str], *, keep_order: bool = False) -> list[list[str]]:
    """Cut documents 90/5/5 by bytes, in the order of their hashes.

    So every split is an even sample of the whole, and so is the beginning of the train split. A
    document larger than a held-out share is left to train.
    """
    rank = {text: i for i, text in enumerate(dict.fromkeys(documents)) if text.strip()}
    _require_three(name, len(rank))
    mixed = sorted(rank, key=lambda text: hashlib.sha256(text.encode()).digest())
    size = {text: len(text.encode()) for text in mixed}
    share = HELD_OUT_SHARE * sum(size.values())
    held_out: list[list[str]] = [[], []]
    held = [0, 0]
    for text in mixed:
        smaller = held.index(min(held))
        if size[text] <= share and held[smaller] < share:
            held_out[smaller].append(text)
            held[smaller] += size[text]
    taken = {*held_out[0], *held_out[1]}
    train = [text for text in mixed if text not in taken]
    for part in held_out:
        if not part:  # few documents, all of them large
            part.append(min(train, key=size.__getitem__))
            train.remove(part[0])
    splits = [train, *held_out]
    return [sorted(split, key=rank.__getitem__) for split in splits] if keep_order else splits


def _distinct(name: str, splits: list[list[str]]) -> list[list[str]]:
    """Drop blank and repeated documents; one in two splits stays in the later split."""
    seen: set[str] = set()
    kept = []
    for split in reversed(splits):
        new = [text for text in dict.fromkeys(split) if text.strip() and text not in seen]
        seen.update(new)
        kept.append(new)
    if not all(kept):
        _require_three(name, sum(bool(split) for split in kept))
    return kept[::-1]


def _require_three(name: str, count: int) -> None:
    if count < 3:
        raise ValueError(
            f"load_text: {name} is too small to split, must hold at least 3 different documents "
            f"(of a text file: paragraphs between blank lines), got {count}"
        )


def _text(name: str, splits: list[list[str]], description: str) -> Text:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(len(split).to_bytes(8, "little"))
        for document in split:
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    train, calibration, validation = map(tuple, splits)
    return Text(
        name=name,
        train=train,
        calibration=calibration,
        validation=validation,
        sha256=digest.hexdigest(),
        description=description,
    )


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"
