"""Native libraries: what to compile, against what, and a record of how it went.

A library that does not compile never fails the install. `lego_kernels/build_record.json` keeps the
reason and the compiler's last lines, `lego doctor` prints them, and the ops run as plain PyTorch.
Everything but the native libraries is in pyproject.toml.

Environment: LEGO_FORCE_CUDA=1 compiles the CUDA library for a torch without CUDA too; CUDA_HOME,
CXX, MAX_JOBS and TORCH_CUDA_ARCH_LIST mean what they mean to torch.utils.cpp_extension.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import SubprocessError
from typing import IO

import torch
from setuptools import Extension, setup
from setuptools.errors import BaseError, CCompilerError
from torch.utils import cpp_extension

# what setuptools, torch and this file raise for a compiler, linker, toolkit or list of
# architectures that is missing or wrong
BUILD_ERRORS = (BaseError, CCompilerError, OSError, RuntimeError, ValueError, SubprocessError)
NAMES = ("_C_cpu", "_C_cuda")
CUDA_WANTED = torch.version.cuda is not None or os.environ.get("LEGO_FORCE_CUDA") == "1"
LOG_LINES = 40  # of a failed compiler, kept in the record
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]
STABLE_ABI_VERSION = "0x020a000000000000"  # one binary for torch 2.10 and newer


def find_cuda_home() -> Path:
    """Return the folder of a CUDA toolkit with a compiler, headers and the runtime library.

    The folder above a found nvcc need not be one, since nvcc may be a wrapper script.
    Raises: FileNotFoundError if $CUDA_HOME, or else every usual place, holds no such toolkit.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    guesses = [Path(nvcc).resolve().parents[1]] if nvcc else []
    guesses += sorted(Path("/usr/local").glob("cuda*"), reverse=True) + [Path("/opt/cuda")]
    for home in [Path(named)] if named else guesses:
        runtime = [home / folder / "libcudart.so" for folder in ("lib64", "lib")]
        needed = [home / "bin" / "nvcc", home / "include" / "cuda_runtime.h"]
        if all(path.exists() for path in needed) and any(path.exists() for path in runtime):
            return home
    places = named or ", ".join(map(str, guesses))
    raise FileNotFoundError(f"CUDA toolkit: must hold nvcc, headers and libcudart, got {places}")


def headers_digest() -> str:
    """Name the contents of all headers: as a macro, it makes ninja recompile when one changes.

    torch tracks them itself for C++ alone, and not where two libraries share a build folder.
    """
    headers = sorted(path for path in Path("csrc").rglob("*") if path.suffix in {".h", ".cuh"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()[:16]


def native_extension(name: str, pattern: str, libraries: list[str]) -> Extension:
    return cpp_extension.CppExtension(
        f"lego_kernels.{name}",
        sorted(map(str, Path("csrc").glob(pattern))),
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI_VERSION),
            ("LEGO_HEADERS", headers_digest()),
        ],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        libraries=libraries,
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    wanted = [native_extension("_C_cpu", "cpu/*.cpp", [])]
    if CUDA_WANTED:
        # not torch's CUDAExtension, which links libraries that a torch without CUDA lacks
        libraries = ["cudart", "torch_cuda"] if torch.version.cuda else ["cudart"]
        wanted.append(native_extension("_C_cuda", "cuda/*.cu", libraries))
    return wanted


def use_cuda_toolkit(extension: Extension) -> None:
    cuda_home = find_cuda_home()
    # torch leaves this unset where it was built without CUDA, and may guess it from a wrapper
    cpp_extension.CUDA_HOME = str(cuda_home)
    if not torch.cuda.is_available():
        # torch asks the visible GPUs what to compile for, and fails where there is none
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0+PTX")
    extension.include_dirs.append(str(cuda_home / "include"))
    extension.library_dirs += [str(cuda_home / "lib64"), str(cuda_home / "lib")]


@contextlib.contextmanager
def copied_output() -> Iterator[IO[bytes]]:
    """Collect in a file what this process and its compilers print, and print it at the end."""
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        kept = [(fd, os.dup(fd)) for fd in (1, 2)]
        for fd, _ in kept:
            os.dup2(log.fileno(), fd)
        try:
            yield log
        finally:
            sys.stdout.flush()
            for fd, copy in kept:
                os.dup2(copy, fd)
                os.close(copy)
            log.seek(0)
            sys.stdout.write(log.read().decode(errors="replace"))


def first_line(*command: str) -> str:
    """Return the first line a command prints, or why it could not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, SubprocessError) as error:
        return str(error)
    return done.stdout.partition("\n")[0]


class BuildNative(cpp_extension.BuildExtension):
    """Builds each library on its own and records what became of it."""

    def run(self) -> None:
        self.outcomes: dict[str, dict[str, object]] = {}
        self._remove_stale()
        super().run()
        if not CUDA_WANTED:
            reason = "torch is built without CUDA; LEGO_FORCE_CUDA=1 compiles it all the same"
            self.outcomes["_C_cuda"] = {"status": "skipped", "reason": reason}
        record = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": first_line(*os.environ.get("CXX", "g++").split(), "--version"),
            "cuda_home": cpp_extension.CUDA_HOME,
            "libraries": self.outcomes,
        }
        path = self._library("build_record.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        for name, outcome in self.outcomes.items():
            if outcome["status"] == "failed":
                reason = f"WARNING: {name} was not built ({outcome['reason']})"
                print(f"{reason}: its ops will run as plain PyTorch", file=sys.stderr)

    def build_extensions(self) -> None:
        self._remove_stale()
        wanted, built = self.extensions, []
        for extension in wanted:
            self.extensions = [extension]
            with copied_output() as log:
                try:
                    if extension.name == "lego_kernels._C_cuda":
                        use_cuda_toolkit(extension)
                    super().build_extensions()
                    built.append(extension)
                    outcome: dict[str, object] = {"status": "built"}
                except BUILD_ERRORS as error:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").splitlines()
                    reason = f"{type(error).__name__}: {error}"
                    outcome = {"status": "failed", "reason": reason, "output": lines[-LOG_LINES:]}
            self.outcomes[extension.name.rpartition(".")[2]] = outcome
        self.extensions = built

    def _library(self, file_name: str) -> Path:
        # the source tree for an editable install, the build folder otherwise and while building
        return Path(self.get_ext_fullpath("lego_kernels._C_cpu")).with_name(file_name)

    def _remove_stale(self) -> None:
        # an older library must not pass for one that fails to compile now
        for name in NAMES:
            self._library(f"{name}.abi3.so").unlink(missing_ok=True)


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative},
        # the libraries hold no Python code: one wheel serves every Python
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
