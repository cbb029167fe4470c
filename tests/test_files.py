"""Files and folders that are whole or not there."""

import errno
import os
import resource
import signal

import pytest

from lego.files import replacing_file, replacing_folder, write_text
from tests.runs import in_process


def tree(path):
    """Every file below path, hidden ones too, with its content."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def test_file_appears_whole(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"one", b"two, longer", b""):
        before = tree(tmp_path)
        with replacing_file(path) as file:
            file.write(content)
            file.flush()
            assert {k: v for k, v in tree(tmp_path).items() if k[0] != "."} == before
        assert tree(tmp_path) == {"a.bin": content}


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "a", "\u00e9\n\r\n")
    assert tree(tmp_path) == {"a": b"\xc3\xa9\n\r\n"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("before", [None, b"old"])
def test_file_after_an_error(tmp_path, before, error):
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), replacing_file(path) as file:
        file.write(b"half")
        raise error
    assert tree(tmp_path) == ({} if before is None else {"a": before})


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_file_that_cannot_be_finished(tmp_path, monkeypatch, name):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left"), replacing_file(path) as file:
        file.write(b"new")
    assert tree(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True])
def test_folder_after_an_error(tmp_path, before, error):
    path = tmp_path / "deep" / "folder"
    if before:
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "a").write_bytes(b"old")
    with pytest.raises(error), replacing_folder(path) as folder:
        (folder / "b").write_bytes(b"half")
        assert path.exists() == before
        raise error
    assert tree(tmp_path) == ({"deep/folder/sub/a": b"old"} if before else {})
    assert path.exists() == before


def test_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "deep" / "folder"
    for name in ("a", "b"):
        with replacing_folder(path) as folder:
            (folder / name).write_bytes(b"new")
        assert tree(tmp_path) == {f"deep/folder/{name}": b"new"}
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_cannot_be_renamed(tmp_path, monkeypatch):
    """The old folder is back under its name."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_bytes(b"old")
    rename = type(path).rename

    def full(self, target):
        if target == path and self.suffix == ".tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", full)
    with pytest.raises(OSError, match="No space left"), replacing_folder(path) as folder:
        (folder / "a").write_bytes(b"new")
    assert tree(tmp_path) == {"folder/a": b"old"}


def write_too_much(path, kind):
    """Exit code 0 if a disk that holds 100,000 bytes of a file is an OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        if kind == "file":
            with replacing_file(path) as file:
                file.write(b"x" * 200_000)
        else:
            with replacing_folder(path) as folder:
                (folder / "small").write_bytes(b"new")
                (folder / "large").write_bytes(b"x" * 200_000)
    except OSError as error:
        raise SystemExit(0 if error.errno == errno.EFBIG else 1) from error
    raise SystemExit(2)


def write_and_die(path, kind):
    if kind == "file":
        with replacing_file(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    with replacing_folder(path) as folder:
        (folder / "a").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def old(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    (path / "a" if kind == "folder" else path).write_bytes(b"old")
    return path, tree(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_disk_full(tmp_path, kind):
    path, before = old(tmp_path, kind)
    assert in_process(write_too_much, path, kind) == 0
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_while_writing(tmp_path, kind):
    path, before = old(tmp_path, kind)
    assert in_process(write_and_die, path, kind) == -signal.SIGKILL
    left = tree(tmp_path)
    assert {name: left[name] for name in before} == before
    assert all(name.startswith(".it.") for name in left.keys() - before.keys())
