"""setup.py on machines that can compile everything, something and nothing."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def toolkit_problem() -> str:
    try:
        SETUP["find_cuda_home"]()
    except FileNotFoundError as error:
        return str(error)
    return ""


class Built(NamedTuple):
    folder: Path
    libraries: dict  # the libraries' part of the build record
    output: str


def build(folder: Path, objects: Path, **environment: str) -> Built:
    """Build both packages into `folder`, with what is compiled in `objects`."""
    stages = [f"--build-lib={folder}", f"--build-temp={objects}"]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", *stages],
        cwd=ROOT,
        env=os.environ | {"LEGO_FORCE_CUDA": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    record = json.loads((folder / "lego_kernels" / "build_record.json").read_text())
    return Built(folder, record["libraries"], done.stdout)


def write_compiler(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ninja finds what another build of this module has compiled, by a g++ that does not
    optimise: in less than half the time."""
    folder = tmp_path_factory.mktemp("objects")
    write_compiler(folder / "g++", f'exec {os.environ.get("CXX", "g++")} "$@" -O0')
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, objects: Path) -> Built:
    """Both libraries, the CUDA one for A100 and H100, with what ptxas says of its kernels."""
    folder = tmp_path_factory.mktemp("built")
    arches = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    wanted = {"LEGO_FORCE_CUDA": "1", "CXX": str(objects / "g++")}
    return build(folder, objects, **wanted, **arches)


NEEDS_TOOLKIT = pytest.mark.skipif(bool(toolkit_problem()), reason=toolkit_problem())


def python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder)} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def undefined_symbols(library: Path) -> list[str]:
    command = ["nm", "--dynamic", "--demangle", "--undefined-only", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]


def test_failing_compiler_leaves_a_working_install(tmp_path):
    compiler = write_compiler(tmp_path / "g++", "echo broken on purpose >&2; exit 1")
    folder = tmp_path / "built"
    outcome = build(folder, tmp_path / "objects", CXX=str(compiler)).libraries["_C_cpu"]
    assert outcome["status"] == "failed"
    assert "broken on purpose" in "\n".join(outcome["output"])
    assert not list(folder.rglob("*.so"))

    report = "import json, sys; from lego.doctor import *; sys.exit(print_diagnosis(diagnose()))"
    done = python(folder, report, COLUMNS="200")
    assert done.returncode == 1, done.stderr
    assert "broken on purpose" in done.stdout and "Fix: " in done.stdout
    assert done.stderr.count("the native CPU kernels are not loaded") == 1
    refused = python(folder, "import lego_kernels", LEGO_BACKEND="native")
    assert "ImportError: LEGO_BACKEND=native: the native CPU kernels" in refused.stderr


def test_missing_toolkit_costs_the_cuda_library_alone(tmp_path, objects):
    wanted = {"LEGO_FORCE_CUDA": "1", "CUDA_HOME": str(tmp_path), "CXX": str(objects / "g++")}
    record = build(tmp_path / "built", objects, **wanted).libraries
    assert record["_C_cpu"] == {"status": "built"}
    assert record["_C_cuda"]["status"] == "failed"
    assert f"must hold nvcc, headers and libcudart, got {tmp_path}" in record["_C_cuda"]["reason"]


@NEEDS_TOOLKIT
def test_both_libraries_compile_and_link(built):
    assert built.libraries == {"_C_cpu": {"status": "built"}, "_C_cuda": {"status": "built"}}
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in built.output


@NEEDS_TOOLKIT
@pytest.mark.parametrize("name", SETUP["NAMES"])
def test_library_uses_the_stable_abi_alone(name, built):
    symbols = undefined_symbols(built.folder / "lego_kernels" / f"{name}.abi3.so")
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if re.search(r"\b(at|c10|torch|caffe2)::", symbol)]


@NEEDS_TOOLKIT
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_kernel_spills(arch, built):
    entry = rf"Compiling entry function '(\w+)' for '{arch}'\n.*\n\s*(.*)"
    properties = dict(re.findall(entry, built.output))
    kernels = [
        name
        for path in (ROOT / "csrc" / "cuda").iterdir()
        for name in re.findall(r"__global__[^;{]*?(\w+)\(\w+ args\)", path.read_text())
    ]
    assert kernels and all(any(name in entry for entry in properties) for name in kernels)
    nothing = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert {name: text for name, text in properties.items() if text != nothing} == {}


@NEEDS_TOOLKIT
def test_wide_kernels_access_16_bytes_at_a_time(built):
    triton = pytest.importorskip("triton")  # which ships cuobjdump, as a toolkit need not
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = built.folder / "lego_kernels" / "_C_cuda.abi3.so"
    command = [cuobjdump, "--dump-sass", "-arch", "sm_90", library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    functions = re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", done.stdout, re.DOTALL)
    # instantiated for uint4 words, or for 4 float32 or 8 16-bit values
    wide = {name: code for name, code in functions if re.search(r"I5uint4|fLi4E|Li8E", name)}
    assert len(wide) == 4, list(wide)
    for name, code in wide.items():
        assert "LDG.E.128" in code and "STG.E.128" in code, name
        assert not re.search(r"\b(LD|ST)\.E", code), f"{name}: a generic access, which is slower"


def test_changed_header_recompiles(tmp_path, monkeypatch):
    header = tmp_path / "csrc" / "cuda" / "kernel.cuh"
    header.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    digests = []
    for text in ("one", "other", "one"):
        header.write_text(text)
        digests.append(SETUP["headers_digest"]())
    assert digests[0] == digests[2] != digests[1]


def test_toolkit_is_not_guessed_from_a_wrapper(tmp_path, monkeypatch):
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert shutil.which("nvcc") == str(wrapper)
    if not (problem := toolkit_problem()):
        assert SETUP["find_cuda_home"]() != tmp_path
    else:
        assert str(tmp_path) in problem


def test_backend_asks_for_torch_only_where_there_is_none():
    code = "import sys; sys.path.insert(0, 'build_backend'); import lego_build as b; print({})"
    hook = "b.get_requires_for_build_wheel()"
    command = [sys.executable, "-c", code.format(hook)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    hidden = f"(setattr(b.importlib.util, 'find_spec', lambda name: None), {hook})[1]"
    command = [sys.executable, "-c", code.format(hidden)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch>=2.10']"
