"""Swap the layers of a model for kernel-backed drop-ins, and back: accelerate(model), undo().

Instances are swapped, never classes, and the drop-ins share the parameters: other models, the
state_dict and the optimizer state are untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

import lego.layers
from lego.model import LegoModel
from lego_kernels import layers as kernels
from lego_kernels.validation import DTYPES

_DROP_INS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    lego.layers.Attention: kernels.Attention.from_stock,
    lego.layers.MLP: kernels.MLP.from_stock,
    lego.layers.RMSNorm: kernels.RMSNorm.from_stock,
    nn.RMSNorm: kernels.RMSNorm.from_stock,
    nn.Linear: kernels.Linear.from_stock,
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What became of one layer that holds parameters."""

    name: str  # in the model, as named_modules gives it
    kind: str  # its class
    swapped: bool
    why_not: str  # empty if it was swapped


class Acceleration:
    """What accelerate() did. `layers` lists every layer; undo() puts the originals back."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self._undo: list[Callable[[], None]] = []

    def swap(self, owner: nn.Module, attribute: str, new: object) -> None:
        """Set an attribute of a module, and remember how to restore it."""
        own = owner._modules if isinstance(new, nn.Module) else owner.__dict__
        if attribute in own:
            self._undo.append(partial(setattr, owner, attribute, own[attribute]))
        else:
            self._undo.append(partial(delattr, owner, attribute))
        setattr(owner, attribute, new)

    def undo(self) -> None:
        """Restore the original instances; a second call does nothing."""
        while self._undo:
            self._undo.pop()()


def accelerate(model: nn.Module) -> Acceleration:
    """Swap each layer of the model that has a drop-in, in place; the model is then for inference.

    A layer stays if its exact class, or that of a layer in it, has no drop-in, if its parameters
    are not float32, bfloat16 or float16, if it has hooks, which a swap would lose, or if it is the
    model itself. A LegoModel also gets caches that append and attend by kernels.
    Raises: RuntimeError, before anything is swapped, if a layer is in training mode.
    """
    for name, layer in model.named_modules():
        if layer.training:
            raise RuntimeError(
                f"accelerate: model must be in eval mode, got {name or 'it'} in train"
            )
    plan = _Plan()
    plan.add_children(model, "")
    if isinstance(model, LegoModel):
        plan.swaps.append((model, "kv_cache_type", kernels.KVCache))
    # only now: whatever can fail has been done
    done = Acceleration(plan.layers)
    for owner, attribute, new in plan.swaps:
        done.swap(owner, attribute, new)
    return done


class _Plan:
    """What to swap, and a report on every layer; nothing is changed yet."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.swaps: list[tuple[nn.Module, str, object]] = []
        self._drop_ins: dict[nn.Module, nn.Module] = {}  # a layer used twice has one drop-in

    def add_children(self, parent: nn.Module, prefix: str) -> None:
        for attribute, layer in parent._modules.items():  # named_children skips repetitions
            if layer is None:
                continue
            name, why_not = prefix + attribute, _why_not(layer)
            if why_not:
                self.add_children(layer, f"{name}.")
            else:
                if layer not in self._drop_ins:
                    self._drop_ins[layer] = _DROP_INS[type(layer)](layer)
                self.swaps.append((parent, attribute, self._drop_ins[layer]))
            if not why_not or any(True for _ in layer.parameters(recurse=False)):
                kind = type(layer).__name__
                self.layers.append(
                    Layer(name=name, kind=kind, swapped=not why_not, why_not=why_not)
                )


def _why_not(layer: nn.Module) -> str:
    if type(layer).__module__.startswith("lego_kernels."):
        return "it runs on kernels already"
    if type(layer) not in _DROP_INS:
        return f"{type(layer).__name__} has no drop-in"
    inner = list(layer.modules())
    strange = [type(m).__name__ for m in inner if type(m) not in _DROP_INS]
    if strange:
        # an adapter in a projection's place, say: the drop-in would take its weight alone
        return f"it holds {strange[0]}, which has no drop-in"
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in inner):
        return "it has hooks, which a swap would lose"
    if isinstance(layer, (nn.RMSNorm, lego.layers.RMSNorm)) and (
        layer.weight is None or layer.weight.dim() != 1
    ):
        return "its weight is not [dim]"
    dtypes = {p.dtype for p in layer.parameters()}
    if not dtypes <= set(DTYPES):
        wrong = ", ".join(str(dtype) for dtype in dtypes - set(DTYPES))
        return f"its parameters are {wrong}; the kernels take float32, bfloat16 and float16"
    return ""
