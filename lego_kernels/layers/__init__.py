"""Drop-in modules for inference: the parameter names of the stock layers, the kernels inside."""

from lego_kernels.layers.attention import Attention
from lego_kernels.layers.exit_head import ExitHead
from lego_kernels.layers.kv_cache import KVCache
from lego_kernels.layers.linear import Linear
from lego_kernels.layers.mlp import MLP
from lego_kernels.layers.rms_norm import RMSNorm

__all__ = ["MLP", "Attention", "ExitHead", "KVCache", "Linear", "RMSNorm"]
