"""What all drop-in layers share: they are for inference."""

from torch import nn


def require_inference(layer: nn.Module) -> None:
    """Raise RuntimeError in training mode: the kernels have no backward.

    That no parameter requires grad in grad mode is checked by the ops themselves.
    """
    if layer.training:
        name = type(layer).__name__
        raise RuntimeError(f"{name}: is inference only, so call eval() first, got training mode")
