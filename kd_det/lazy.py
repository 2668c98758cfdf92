"""What LazyConfig files need besides the Distiller and the losses, whose constructors take real objects already."""

from typing import Optional

from torch import nn

from kd_det.checkpoint import load_strictly

__all__ = ["load_teacher"]


def load_teacher(*, model: nn.Module, weights: str, input_format: Optional[str] = None) -> nn.Module:
    """
    A detector with its trained weights, as ``Distiller(teacher=...)`` wants it.

    Args:
        model: the teacher, with ``backbone`` and ``preprocess_image``.
        weights: a file or URL in any format that Detectron2 reads; must be exactly the model's.
        input_format: channel order that it was trained with; default: its own ``input_format``.

    Raises:
        FileNotFoundError, ValueError: weights that do not exist or do not fit.
    """
    load_strictly(model, weights, who=f"teacher {type(model).__name__}")
    if input_format is not None:
        model.input_format = input_format
    return model.eval().requires_grad_(False)
