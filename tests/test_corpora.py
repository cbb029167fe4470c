"""Corpora: what is in them, how they are split, and what is refused."""

import gc
import json
import sys
from types import SimpleNamespace

import pytest

from lego import corpora
from lego.corpora import load_text

SPLITS = ("train", "calibration", "validation")
ARTICLES = [
    f" \n = Title {i} = \n \n Body {i} , it is <unk> . \n \n = = Part = = \n \n {'x ' * (9 + i)}\n"
    for i in range(12)
]


def documents(text):
    return [getattr(text, split) for split in SPLITS]


def write_paragraphs(path, count=60):
    path.write_text(
        "\n\n".join(f"paragraph {i}\nsays {'word ' * (5 + i % 7)}{i}" for i in range(count))
    )
    return path


@pytest.mark.parametrize("name", ["pydocs", "stdlib"])
def test_embedded_corpora(name):
    text = load_text(name)
    splits = [set(docs) for docs in documents(text)]
    assert (
        sum(map(len, splits)) == len(set().union(*splits)) == sum(map(len, documents(text))) > 500
    )
    sizes = [sum(len(doc.encode()) for doc in docs) for docs in documents(text)]
    assert sum(sizes) > {"pydocs": 1.5e6, "stdlib": 8e6}[name]
    for held_out in sizes[1:]:
        assert 0.05 <= held_out / sum(sizes) < 0.10
    assert "Python 3." in text.description


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    """A standard library of 30 modules that must not be imported, and folders to be skipped."""
    root = tmp_path / "lib"
    body = 'class C:\n    """Shared docstring."""\n    def f(self):\n        r"""Of f{i} \\d."""\n'
    for i in range(30):
        folder = root / f"package{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        source = f'"""Module {i}."""\nraise SystemExit\n' + body.replace("{i}", str(i))
        (folder / f"module{i:02}.py").write_text(source)
    for skipped in ("test", "package0/tests", "site-packages/torch", "encodings", "pydoc_data"):
        (root / skipped).mkdir(parents=True)
        (root / skipped / "module.py").write_text('"""Skipped."""')
    (root / "_sysconfigdata__linux.py").write_text('"""Skipped."""')
    (root / "latin.py").write_bytes(b'# coding: latin-1\n"""Docstring \xe9."""\n')
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_pydocs_parses_and_never_imports(small_stdlib, recwarn):
    (small_stdlib / "escape.py").write_text('"""Of escapes."""\nx = "\\d"\n')
    text = load_text("pydocs")
    joined = sum(documents(text), ())
    assert any(doc.startswith("Module 7.\n\n") and doc.endswith("Of f7 \\d.") for doc in joined)
    assert "Docstring \xe9." in joined
    assert sum("Shared docstring." in doc for doc in joined) == 1  # repeated docstrings are dropped
    assert not any("Skipped." in doc or "SystemExit\n" == doc for doc in joined)
    assert len(joined) > 31 + 70  # the modules and the topics
    assert gc.isenabled()
    assert not recwarn.list  # of the invalid escape


def test_stdlib_is_the_sources(small_stdlib):
    text = load_text("stdlib")
    sources = {path.read_bytes() for path in small_stdlib.glob("package*/*.py")}
    sources.add('# coding: latin-1\n"""Docstring \xe9."""\n'.encode())
    assert {doc.encode() for doc in sum(documents(text), ())} == sources
    assert documents(load_text("stdlib")) == documents(text)


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="sources must be installed, got none in"):
        load_text("stdlib")


def test_text_file_splits_by_paragraph(tmp_path):
    path = write_paragraphs(tmp_path / "book.text", count=400)
    wanted = path.read_text().split("\n\n")
    path.write_bytes(
        b"\xef\xbb\xbf" + ("\r\n \r\n\r\n".join(wanted + wanted[:50]) + "\n\n").encode()
    )
    text = load_text(str(path))
    found = sum(documents(text), ())
    assert sorted(found) == sorted(set(wanted))  # each once, no blank one, no byte-order mark
    for split in documents(text):
        assert list(split) == sorted(split, key=wanted.index)  # in the order of the file
    for split in documents(text)[1:]:  # not a tail of the file but an even sample
        assert 12 <= len(split) <= 35
        assert wanted.index(split[0]) < 100 and wanted.index(split[-1]) > 300
    assert (text.name, text.description) == ("book.text", "paragraphs of book.text")


def test_large_document_stays_in_train(tmp_path):
    path = write_paragraphs(tmp_path / "book.txt")
    path.write_text("huge " * 300 + "\n\n" + path.read_text())
    assert "huge " * 299 + "huge " in load_text(str(path)).train
    path.write_text("three three three\n\ntwo two\n\none")
    assert documents(load_text(str(path))) == [("three three three",), ("one",), ("two two",)]


def test_digest_is_of_text_and_split(tmp_path):
    digests = {load_text(str(write_paragraphs(tmp_path / "a.txt"))).sha256}
    digests.add(load_text(str(write_paragraphs(tmp_path / "b.txt"))).sha256)
    assert len(digests) == 1
    digests.add(load_text(str(write_paragraphs(tmp_path / "b.txt", count=61))).sha256)
    digests.add(corpora._text("x", [["a", "b"], ["c"], ["d"]], "").sha256)
    digests.add(corpora._text("x", [["ab"], ["c"], ["d"]], "").sha256)
    digests.add(corpora._text("x", [["a"], ["b", "c"], ["d"]], "").sha256)
    digests.add(corpora._text("x", [["a", "bc"], [""], ["d"]], "").sha256)
    digests.add(corpora._text("x", [["ab", "c"], [""], ["d"]], "").sha256)
    assert len(digests) == 7


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {i}\n\nsecond \u2028 paragraph", "id": i} for i in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, {"text": " "}, rows[0]]]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    found = sum(documents(load_text(str(path))), ())
    assert sorted(found) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "c"', r"line 3 of .* must be JSON, got '\{\"text\": \"c\"'"),
        ('["c"]', 'line 3 of .* must be an object with a string "text", got'),
        ('{"body": "c"}', 'line 3 of .* must be an object with a string "text"'),
        ('{"text": 3}', 'line 3 of .* must be an object with a string "text"'),
        ('{"text": "\\ud800"}', "line 3 of .* got a lone surrogate"),
    ],
)
def test_json_lines_errors(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + '\n{"text": "d"}\n')
    with pytest.raises(ValueError, match=message):
        load_text(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file must not be empty, got .*book.txt"),
        (b" \n\n\t\n", "file must not be empty"),
        (b"one\n\ntwo\n\none", "book.txt is too small to split, .* at least 3 .*, got 2"),
        (b"one\n\ntw\xff", "must be UTF-8, got byte 7 of .*book.txt"),
    ],
)
def test_file_errors(tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path / "book.txt"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pydoc",
            "name must be pydocs, stdlib, wikitext2, wikitext2-mini or a path .*, got 'pydoc'",
        ),
        ("absent.txt", "file must exist, got absent.txt"),
        ("absent/book", "file must exist, got absent/book"),
        (".", "file must exist, got ."),
        ("wikitext2-mini", "wikitext2-mini: data_dir must hold valid.txt and test.txt, got None"),
    ],
)
def test_name_errors(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_text(name)


def test_wikitext_from_files(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text("".join(ARTICLES[:6] + ARTICLES[8:9]))
    (tmp_path / "wiki.valid.raw").write_text("".join(ARTICLES[6:9]))
    with pytest.raises(ValueError, match="must hold wiki.test.tokens or wiki.test.raw or test.txt"):
        load_text("wikitext2", tmp_path)
    (tmp_path / "test.txt").write_text("".join(ARTICLES[9:]))
    text = load_text("wikitext2", tmp_path)
    # the train split gives up the article that the calibration split has too
    assert [len(split) for split in documents(text)] == [6, 3, 3]
    assert "".join(text.validation).strip() == "".join(ARTICLES[9:]).strip()
    assert all(doc.startswith(" = Title") and "Part" in doc for doc in text.train)


def test_wikitext_mini(tmp_path):
    (tmp_path / "test.txt").write_text("".join(ARTICLES[:4]))
    (tmp_path / "valid.txt").write_text("".join(ARTICLES[4:]))
    text = load_text("wikitext2-mini", tmp_path)
    assert [len(split) for split in documents(text)] == [4, 4, 4]
    sizes = [len("".join(split)) for split in documents(text)[1:]]
    assert abs(sizes[0] - sizes[1]) < 0.1 * sum(sizes)
    assert " = Title 4 =" in text.calibration[0] and " = Title 5 =" in text.validation[0]


def test_wikitext_download(tmp_path, monkeypatch):
    files = {"train": ARTICLES[:6], "valid": ARTICLES[6:9], "test": ARTICLES[9:]}
    rows = {}
    for split, articles in files.items():
        (tmp_path / f"{split}.txt").write_text("".join(articles))
        lines = "".join(articles).splitlines(keepends=True)
        rows[split] = {"text": [line if line.strip() else "" for line in lines]}
    rows["validation"] = rows.pop("valid")
    asked = []
    errors = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    fake = SimpleNamespace(load_dataset=lambda *names: asked.append(names) or rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", errors)
    assert load_text("wikitext2").sha256 == load_text("wikitext2", tmp_path).sha256
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]

    remedy = "pip install datasets.* --data-dir"
    for error in (ConnectionError("no route"), errors.DatasetsError("no route")):
        fake.load_dataset = lambda *names, error=error: (_ for _ in ()).throw(error)
        with pytest.raises(ValueError, match=f"download must succeed .*{remedy}.* got no route"):
            load_text("wikitext2")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=f"library must be installed .*{remedy}.* got .*datasets"):
        load_text("wikitext2")
