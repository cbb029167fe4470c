"""Our ops inside a stock transformers model: use_kernels(model), undo().

Norms and MLPs get a forward of their own, instance by instance. The modules stay, and with them
parameters, names, hooks and checkpoints; classes and other models are untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from lego_kernels.library import refuse_grad
from lego_kernels.ops.linear_small import MAX_ROWS, linear_small
from lego_kernels.ops.rms_norm import rms_norm
from lego_kernels.ops.swiglu import swiglu
from lego_kernels.validation import DTYPES

_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)
_OTHER = "it is no norm or MLP of Llama, Mistral, Qwen2 or Qwen3"


@dataclass(frozen=True, kw_only=True)
class StockLayer:
    """What became of one norm or MLP, or of another layer that holds parameters."""

    name: str  # in the model, as named_modules gives it
    kind: str  # its class
    replaced: bool
    why_not: str  # empty if it was replaced


class KernelUse:
    """What use_kernels() did. `layers` lists every layer; undo() puts the stock forwards back."""

    def __init__(self, layers: tuple[StockLayer, ...], modules: list[nn.Module]) -> None:
        self.layers = layers
        self._modules = modules

    def undo(self) -> None:
        """Remove our forwards; a second call does nothing.

        Raises: RuntimeError, with nothing changed, if another has replaced one of them since.
        """
        for module in self._modules:
            forward = module.__dict__.get("forward")
            if getattr(forward, "__func__", None) not in (_norm_forward, _mlp_forward):
                raise RuntimeError(
                    "undo: forwards must be as use_kernels left them, got another in "
                    f"{type(module).__name__}"
                )
        while self._modules:
            # the class has had its own all along
            del self._modules.pop().__dict__["forward"]


def use_kernels(model: nn.Module) -> KernelUse:
    """Run the norms and MLPs of a Llama, Mistral, Qwen2 or Qwen3 model on our ops, in place.

    Inference only: a forward in grad mode, with an input or a weight that requires grad, is a
    RuntimeError. Hooks on a replaced layer are called as before; those on the projections inside a
    replaced MLP, registered later, are not. A layer keeps its forward, and `layers` says why, if it
    is of another class, has a forward that is not its class's, or holds weights or projections that
    the ops do not take.
    undo() before the whole model is pickled; its state_dict and save_pretrained() are as ever.
    Raises: ValueError, with nothing changed, if no layer can be replaced.
    """
    layers, modules = [], []
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inner:
            continue
        why_not = _why_not(module)
        if not why_not:
            modules.append(module)
            inner |= set(module.modules())
        if why_not != _OTHER or any(True for _ in module.parameters(recurse=False)):
            kind = type(module).__name__
            layers.append(StockLayer(name=name, kind=kind, replaced=not why_not, why_not=why_not))
    if not modules:
        reasons = sorted({f"{layer.kind}: {layer.why_not}" for layer in layers})
        raise ValueError(
            "use_kernels: model must hold norms or MLPs of Llama, Mistral, Qwen2 or Qwen3, got "
            f"{type(model).__name__} ({'; '.join(reasons)})"
        )
    for module in modules:
        # a bound method, which copy.deepcopy binds to the copy
        module.__dict__["forward"] = MethodType(_forward_of(module), module)
    return KernelUse(tuple(layers), modules)


def _forward_of(module: nn.Module) -> Callable[..., Tensor]:
    return _norm_forward if type(module) in _NORMS else _mlp_forward


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """[..., D] to [..., D], of 1 to 4 dimensions, in the dtype of the weight."""
    return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    """[..., D] to [..., D]; gate and up land side by side, where swiglu reads them."""
    gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
    refuse_grad("use_kernels", x, gate, up, down)
    rows = x.reshape(-1, x.size(-1))
    gate_up = rows.new_empty(rows.size(0), 2 * gate.size(0))
    _project(rows, gate, gate_up[:, : gate.size(0)])
    _project(rows, up, gate_up[:, gate.size(0) :])
    y = rows.new_empty(rows.size(0), down.size(0))
    _project(swiglu(gate_up), down, y)
    return y.view(*x.shape[:-1], down.size(0))


def _project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.is_cpu and x.size(0) <= MAX_ROWS:
        linear_small(x, weight, out=out)
    else:
        torch.mm(x, weight.t(), out=out)


def _why_not(module: nn.Module) -> str:
    if type(module) not in (*_NORMS, *_MLPS):
        return _OTHER
    if "forward" in module.__dict__:
        return "its forward is not its class's"
    if wrong := {str(p.dtype) for p in module.parameters() if p.dtype not in DTYPES}:
        return f"its weights are {', '.join(wrong)}, not float32, bfloat16 or float16"
    if any(p.is_meta for p in module.parameters()):
        return "its weights are on no device"
    return _why_not_mlp(module) if type(module) in _MLPS else ""


def _why_not_mlp(mlp: Any) -> str:
    if mlp.config.hidden_act != "silu":
        return f"its activation is {mlp.config.hidden_act}, not silu"
    for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        if type(projection) is not nn.Linear or "forward" in projection.__dict__:
            # an adapter, say, or a quantised one: the op would take its weight alone
            return f"it holds {type(projection).__name__}, which is no plain Linear"
        if projection.bias is not None:
            return "its projections have a bias"
        if projection._forward_hooks or projection._forward_pre_hooks:
            return "its projections have hooks, which would not be called"
    return ""
