"""House rules that a reader of one file cannot see: who imports whom, file length, ASCII."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lego", "lego_kernels", "csrc", "tests", "benchmarks", "build_backend")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
) + [ROOT / "setup.py"]
MAX_LINES = 400

# a module may import from its own layer and from earlier ones; the rest is free, but acyclic
LAYERS = {
    "lego": (
        ("ops",),
        ("layers",),
        ("model",),
        ("generation", "training"),
        ("experiment",),
        ("commands",),
        ("cli",),
    ),
    "lego_kernels": (
        ("library", "validation", "gumbel", "exit_tiles"),
        ("triton",),
        ("ops",),
        ("layers",),
        ("decoder",),
        ("hf",),
    ),
}
MAY_IMPORT_KERNELS = {"lego.doctor", "lego.accelerate", "lego.engine"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES if path.parts[len(ROOT.parts)] in LAYERS}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports; `from a import b` gives a.b where that is a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports must be absolute"
            found = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in found}
    return names


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def layer_of(name: str) -> int | None:
    package, _, inner = name.partition(".")
    for rank, layer in enumerate(LAYERS.get(package, ())):
        if inner.partition(".")[0] in layer:
            return rank
    return None


@pytest.mark.parametrize("name", MODULES)
def test_packages_and_layers(name):
    package = name.partition(".")[0]
    for imported in IMPORTS[name]:
        other = imported.partition(".")[0]
        if package == "lego_kernels":
            assert other != "lego", f"{name} imports {imported}"
        elif name not in MAY_IMPORT_KERNELS:
            assert other != "lego_kernels", f"{name} imports {imported}"
        mine, theirs = layer_of(name), layer_of(imported)
        if other == package and mine is not None and theirs is not None:
            assert theirs <= mine, f"{name} imports {imported}, which is in a later layer"


def test_no_cycles():
    graph = {name: found & MODULES.keys() - {name} for name, found in IMPORTS.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_short_and_ascii(path):
    text = path.read_bytes()
    assert text.isascii()
    assert text.count(b"\n") <= MAX_LINES
