"""Triton kernels compiled ahead of time for GPUs that are not here: what their cubin says.

Tests run Triton's interpreter, whose kernels cannot be compiled, so a process of its own does it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

ARCHITECTURES = [80, 90]  # A100, H100


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One kernel with its types, as the launcher would specialise it."""

    kernel: str  # module:function
    signature: dict[str, str]  # "*bf16", "i32", "fp32"; constexprs are left out
    constexprs: dict[str, object] = field(default_factory=dict)  # None for an absent pointer
    divisible: tuple[str, ...] = ()  # arguments that are multiples of 16; pointers always are
    num_warps: int = 4
    num_stages: int = 3
    arch: int = 90


@dataclass(frozen=True, kw_only=True)
class Compiled:
    registers: int
    stack_bytes: int  # where spilled registers go: 0 if none is spilled
    vector_loads: int  # of several values each, or asynchronous copies
    ptx: str


def compile_specs(specs: list[Spec]) -> list[Compiled]:
    """Compile in one process without the interpreter; a failure is an AssertionError."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_compile"],
        input=json.dumps([asdict(spec) for spec in specs]),
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [Compiled(**fields) for fields in json.loads(done.stdout)]


def _compile(spec: Spec) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = spec.kernel.partition(":")
    kernel = getattr(import_module(module), name)
    names = kernel.arg_names
    multiples = {n for n, kind in spec.signature.items() if kind.startswith("*")}
    multiples |= set(spec.divisible)
    source = ASTSource(
        fn=kernel,
        signature=spec.signature | dict.fromkeys(spec.constexprs, "constexpr"),
        constexprs={(names.index(n),): value for n, value in spec.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in multiples},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", spec.arch, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    ptx = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        vector_loads=len(re.findall(r"(?:ld\.global\S*\.v[248]\.|cp\.async\.c)", ptx)),
        ptx=ptx,
    )


def _resource_usage(cubin: bytes) -> dict[str, str]:
    """What cuobjdump, which Triton ships, reads from a cubin: REG, STACK, SHARED and others."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"(\w+):(\d+)", done.stdout.rpartition("Function ")[2]))


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(Spec(**given))) for given in json.load(sys.stdin)]))
