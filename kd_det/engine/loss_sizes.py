"""How large the distillation losses and their gradients are beside the student's own; weights to balance them."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from tabulate import tabulate

from kd_det.distiller import Distiller
from kd_det.losses.auto_weight import AutoWeight, gradient_sizes

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
        proposed: the weight at which that norm is ``share`` of the task's, outside warm-up; None for "task".
        cosine: of the angle between that gradient and the task's; negative where they work against each other.
    """

    name: str
    weight: float
    value: float
    gradient: float
    proposed: float | None
    cosine: float = 1.0


def measure_losses(model: Distiller, batches: Iterable[list[dict]], *, share: float = 0.5) -> list[LossSize]:
    """
    Measure every loss of a Distiller and its gradient over some batches. Nothing is trained.

    Gradients are those of :func:`kd_det.losses.auto_weight.gradient_sizes`, and weights that set themselves are held
    meanwhile. Schedules are measured as they stand at the current iteration.

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
    automatic = {loss: loss.auto for loss in model.losses.values()}
    for loss in automatic:
        loss.auto = None
    proposals = {name: AutoWeight(share, 1) for name in model.losses}
    found: dict[str, list[list[float]]] = {}
    try:
        for batched_inputs in batches:
            losses, factors = model(batched_inputs), model.factors()
            terms = {name: losses.pop(loss.key) for name, loss in model.losses.items()}
            terms = {"task": sum(losses.values()), **terms}
            rows = gradient_sizes(terms["task"], list(terms.values())[1:], parameters).tolist()
            for (name, term), (norm, cosine, _) in zip(terms.items(), rows, strict=True):
                found.setdefault(name, []).append([term.item(), norm, cosine])
                if factors.get(name):
                    proposals[name].add(rows[0][0], norm / factors[name])
    finally:
        for loss, auto in automatic.items():
            loss.auto = auto
    if not found:
        raise ValueError("There is no batch to measure losses on.")
    weights = {"task": 1.0, **{name: loss.weight for name, loss in model.losses.items()}}
    ret = []
    for name, rows in found.items():
        value, gradient, cosine = map(statistics.fmean, zip(*rows))
        proposed = proposals[name].weight if name in proposals else None
        ret.append(LossSize(name, weights[name], value, gradient, proposed, cosine))
    return ret


def format_sizes(sizes: list[LossSize]) -> str:
    """A table of what :func:`measure_losses` found."""
    reference = sizes[0].gradient
    rows = [
        (s.name, s.weight, s.value, s.gradient, s.gradient / reference if reference else None, s.cosine, s.proposed)
        for s in sizes
    ]
    headers = ("loss", "weight", "value", "gradient", "of the task's", "cosine", "proposed weight")
    return tabulate(rows, headers=headers, floatfmt=".3g", tablefmt="simple")
