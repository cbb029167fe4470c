"""Kernels for layer-wise early exit, as torch ops; usable without the `lego` package."""

from lego_kernels.ops.kv_append import kv_append

__all__ = ["kv_append"]
