"""Files and folders that appear under their name only when they are whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it takes the place of `path` when the block ends without an error.

    After an error, or a kill, whatever was at `path` is still there.
    """
    # a name of our own: another process may be writing the same file
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(values: Any) -> str:
    """Indented JSON; numbers that are not finite, which JSON lacks, become null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; OSError if it cannot be read.

    Raises: ValueError, which `what` begins, if it holds none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{what}: {path} must hold a JSON object, got {values!r}")
    return values


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through `replacing_file`."""
    with replacing_file(path) as file:
        file.write(text.encode())


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` when the block ends without an error.

    A kill between the two renames that replace a folder leaves the old one as `.NAME.*.old`.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            # a folder cannot be renamed over a full one: the old one steps aside first
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
            path.rename(old)
            try:
                partial.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
