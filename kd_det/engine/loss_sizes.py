"""How large the distillation losses and their gradients are beside the student's own; weights to balance them."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.utils import get_total_norm

from kd_det.distiller import Distiller

__all__ = ["LossSize", "format_sizes", "measure_losses"]


@dataclass(frozen=True)
class LossSize:
    """
    Means over batches, at the weights that the model has.

    Attributes:
        name: "task" for the sum of the student's own losses, or a distillation loss' name.
        weight: its weight; 1 for "task".
        value: the weighted loss.
        gradient: L2 norm of the weighted loss' gradient at the student's parameters.
        proposed: the weight at which that norm is ``share`` of the task's; None for "task".
    """

    name: str
    weight: float
    value: float
    gradient: float
    proposed: float | None


def measure_losses(model: Distiller, batches: Iterable[list[dict]], *, share: float = 0.5) -> list[LossSize]:
    """
    Measure every loss of a Distiller and its gradient over some batches. Nothing is trained.

    Gradients are compared at the student's own parameters that the task losses reach: elsewhere a loss does not compete
    with the task. Schedules are measured as they stand at the current iteration.

    Args:
        model: in training mode, inside an ``EventStorage``.
        batches: training batches; 5 to 20 steady the means.
        share: the proposed weight makes a loss' gradient so large a part of the task's gradient.

    Raises:
        ValueError: no batch, a share that is not positive, or a model without losses.
    """
    if not share > 0:
        raise ValueError(f"share must be positive, found {share}.")
    if not model.losses:
        raise ValueError("The model has no distillation losses to measure: KD.LOSSES is empty, or all weights are 0.")
    parameters = [p for p in model.student.parameters() if p.requires_grad]
    found: dict[str, list[list[float]]] = {}
    for batched_inputs in batches:
        losses = model(batched_inputs)
        terms = {name: losses.pop(loss.key) for name, loss in model.losses.items()}
        terms["task"] = sum(losses.values())
        reached = _gradients(terms["task"], parameters).keys()
        for name, term in terms.items():
            gradients = _gradients(term, reached)
            found.setdefault(name, []).append([term.item(), get_total_norm(gradients.values()).item()])
    if not found:
        raise ValueError("There is no batch to measure losses on.")
    means = {name: list(map(statistics.fmean, zip(*values))) for name, values in found.items()}
    task = LossSize("task", 1.0, *means["task"], None)
    ret = [task]
    for name, loss in model.losses.items():
        value, gradient = means[name]
        proposed = loss.weight * share * task.gradient / gradient if gradient else None
        ret.append(LossSize(name, loss.weight, value, gradient, proposed))
    return ret


def _gradients(loss: Tensor, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients of the parameters that a loss reaches."""
    parameters = list(parameters)
    if not loss.requires_grad or not parameters:
        return {}
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {parameter: g for parameter, g in zip(parameters, gradients, strict=True) if g is not None}


def format_sizes(sizes: list[LossSize]) -> str:
    """A table of what :func:`measure_losses` found."""
    reference = sizes[0].gradient
    rows = [
        (s.name, s.weight, s.value, s.gradient, s.gradient / reference if reference else None, s.proposed)
        for s in sizes
    ]
    headers = ("loss", "weight", "value", "gradient", "of the task's", "proposed weight")
    return tabulate(rows, headers=headers, floatfmt=".3g", tablefmt="simple")
