"""Kernels for layer-wise early exit, as torch ops and layers; usable without the `lego` package."""

from lego_kernels.ops.compact import compact
from lego_kernels.ops.decode_attention import decode_attention, decode_attention_workspace
from lego_kernels.ops.exit_decision import ExitDecision, exit_decision, exit_decision_workspace
from lego_kernels.ops.exit_gate import exit_gate
from lego_kernels.ops.kv_append import kv_append
from lego_kernels.ops.linear_small import linear_small
from lego_kernels.ops.rms_norm import rms_norm
from lego_kernels.ops.rope_kv_append import rope_kv_append
from lego_kernels.ops.swiglu import swiglu

__all__ = [
    "ExitDecision",
    "compact",
    "decode_attention",
    "decode_attention_workspace",
    "exit_decision",
    "exit_decision_workspace",
    "exit_gate",
    "kv_append",
    "linear_small",
    "rms_norm",
    "rope_kv_append",
    "swiglu",
]
