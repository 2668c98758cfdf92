"""Weights that set themselves: how large the gradient of a loss is beside that of the student's own losses."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from kd_det.errors import UserError

__all__ = ["AutoWeight", "gradient_sizes", "measure_auto_weights"]

logger = logging.getLogger(__name__)


@dataclass
class AutoWeight:
    """
    The weight at which the gradient of a loss is so large a part of the task's, from the sums of both norms.

    Attributes:
        share: wanted norm of the weighted loss' gradient, as a part of the norm of the task's.
        batches: training batches to measure on, after which the weight stays.
        measured: batches measured so far.
        task, loss: sums over them of the gradients' norms; the loss' without weight and schedule.
    """

    share: float
    batches: int
    measured: int = 0
    task: float = 0.0
    loss: float = 0.0

    def __post_init__(self):
        numbers = isinstance(self.share, (int, float)) and isinstance(self.batches, int)
        if not numbers or not 0 < self.share < math.inf or self.batches < 1:
            raise ValueError(
                f"AUTO_WEIGHT must be a positive number and AUTO_WEIGHT_BATCHES at least 1, found {self.share} and "
                f"{self.batches}."
            )

    @property
    def is_measuring(self) -> bool:
        return self.measured < self.batches

    @property
    def weight(self) -> float | None:
        """None while one of the gradients was 0 in every batch."""
        return self.share * self.task / self.loss if self.task and self.loss else None

    def add(self, task: float, loss: float) -> None:
        """Take in a batch; norms that are not finite are left out of the sums."""
        self.measured += 1
        if math.isfinite(task) and math.isfinite(loss):
            self.task += task
            self.loss += loss


def gradient_sizes(task: Tensor, losses: Sequence[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """
    How large the gradients of losses are at the parameters that the task reaches: elsewhere, a loss does not compete
    with the task. Each loss is differentiated once and keeps its graph; no ``.grad`` is touched, and DDP sees nothing.

    Args:
        task: the sum of the student's own losses, a scalar.
        losses: L scalars.
        parameters: of the student, that train.

    Returns:
        (1 + L, 3), first the task's row: the gradient's L2 norm, its cosine with the task's gradient, and 1 where it
        reaches any of the parameters, else 0.

    Raises:
        UserError: a compiled network whose backward reuses its buffers, as torch.compile builds it for several sizes.
    """
    device = task.device.type
    in_float16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16

    def scale(loss: Tensor) -> Tensor | float:
        # Without one, float16's gradients vanish; a GradScaler's is of this order. A large loss' would overflow.
        return 4096.0 / loss.detach().abs().clamp(min=1.0) if in_float16 else 1.0

    with torch.autocast(device, enabled=False):
        shared = _gradients(task * scale(task), parameters)
        norm = get_total_norm(shared.values()).to(task.device)
        rows = [torch.stack([norm / scale(task), torch.ones_like(norm), torch.full_like(norm, bool(shared))])]
        for loss in losses:
            gradients = _gradients(loss * scale(loss), shared)
            own = get_total_norm(gradients.values()).to(norm)
            product = sum((torch.dot(g.flatten(), shared[p].flatten()) for p, g in gradients.items()), 0 * norm)
            cosine = product / (own * norm).clamp(min=torch.finfo(norm.dtype).tiny)
            rows.append(torch.stack([own / scale(loss), cosine, torch.full_like(norm, bool(gradients))]))
    return torch.stack(rows)


def measure_auto_weights(task: Tensor, values: Mapping[nn.Module, Tensor], student: nn.Module) -> None:
    """
    Measure the losses that still set their weights, in a training step, and set them. All ranks get the same weights,
    from the means of their norms. The host waits for the device once.

    Args:
        task: the sum of the student's own losses.
        values: the losses (:class:`~kd_det.losses.DistillationLoss`) that act, with what they gave: without weight and
            schedule.

    Raises:
        UserError: a loss has no gradient, or none that is finite, at what the student's own losses train; names it.
    """
    measuring = [loss for loss in values if loss.auto is not None and loss.auto.is_measuring]
    if not measuring:
        return
    parameters = [p for p in student.parameters() if p.requires_grad]
    # With their weights, so that float16 holds the gradients of all.
    sizes = gradient_sizes(task, [loss.weight * values[loss] for loss in measuring], parameters)
    if comm.get_world_size() > 1:
        dist.all_reduce(sizes)
        sizes /= comm.get_world_size()
    (task_norm, *_), *rows = sizes.tolist()
    for loss, (norm, cosine, reaches) in zip(measuring, rows):
        loss.auto.add(task_norm, norm / loss.weight)
        weight = loss.auto.weight
        if not reaches or weight is None and not loss.auto.is_measuring:
            raise UserError(
                f"{loss.key} has no gradient at the parameters that the student's own losses train (taps in a frozen "
                f"stage, MODEL.BACKBONE.FREEZE_AT? a loss that is not finite?), so its weight cannot set itself: set "
                f"{loss.config_key('AUTO_WEIGHT')} to 0.0, or other STUDENT_TAPS."
            )
        if weight is not None:
            loss.weight = weight
        if not loss.auto.is_measuring:
            logger.info(
                f"{loss.key}: weight {weight:.4g}, set by its gradient over {loss.auto.measured} batches to "
                f"{loss.auto.share:g} of the task's (in the last one, their cosine was {cosine:.2f})."
            )


def _gradients(loss: Tensor, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients of the parameters that a loss reaches."""
    parameters = list(parameters)
    if not loss.requires_grad or not parameters:
        return {}
    try:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as e:
        if "donated buffer" not in str(e):
            raise
        raise UserError(
            "Each loss is differentiated by itself (KD.AUTO_WEIGHT), and torch.compile has built a backward that runs "
            "once a step: set torch._functorch.config.donated_buffer = False before the first step, or AUTO_WEIGHT 0.0 "
            "and a WEIGHT, which kd-det weights proposes."
        ) from e
    return {parameter: g for parameter, g in zip(parameters, gradients, strict=True) if g is not None}
