"""For transformers models as they are: accelerate(model, ...).generate(...), a cache, layers."""

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"lego_kernels.hf: transformers must be >= 5, got {transformers.__version__}")

from lego_kernels.hf.accelerated import Accelerated, accelerate  # noqa: E402
from lego_kernels.hf.cache import PreallocatedCache  # noqa: E402
from lego_kernels.hf.classes import (  # noqa: E402
    EarlyExitLlamaForCausalLM,
    EarlyExitMistralForCausalLM,
    EarlyExitQwen2ForCausalLM,
    EarlyExitQwen3ForCausalLM,
)
from lego_kernels.hf.generation import EarlyExitOutput  # noqa: E402
from lego_kernels.hf.layers import KernelUse, use_kernels  # noqa: E402

__all__ = [
    "Accelerated",
    "EarlyExitLlamaForCausalLM",
    "EarlyExitMistralForCausalLM",
    "EarlyExitOutput",
    "EarlyExitQwen2ForCausalLM",
    "EarlyExitQwen3ForCausalLM",
    "KernelUse",
    "PreallocatedCache",
    "accelerate",
    "use_kernels",
]
