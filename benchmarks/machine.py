"""The GPU that a result was measured on."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu"


def gpu_machine() -> dict[str, Any]:
    """Name, driver, clocks, CUDA and Triton, to go beside lego.environment; {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "gpu": {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "nvidia_smi": _nvidia_smi(),
        },
    }


def _nvidia_smi() -> dict[str, str] | str:
    """Driver and clocks as they are now, of the first GPU; or why they are not known."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return dict(zip(_QUERY.split(","), done.stdout.strip().split(", "), strict=False))
