"""What RetinaNet, FCOS and RPNs predict where the teacher is confident: classes, boxes and centerness."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.errors import unknown_name
from kd_det.features.dense_heads import check_same_anchors, dense_head, per_anchor, rpn_head, valid_anchors
from kd_det.losses._gradients import with_gradient
from kd_det.losses._ranks import share_of_samples
from kd_det.losses._spatial import full_precision, to_float, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.class_loss import ClassLoss

__all__ = [
    "DenseHeadLoss",
    "DenseSoftTargetLoss",
    "RPNSoftTargetLoss",
    "confidence_weights",
    "dense_box_loss",
    "dense_class_loss",
]

_BOX_LOSSES = ("giou", "l1")


@torch.no_grad()
@full_precision
def confidence_weights(
    logits: Tensor, *, power: float = 2.0, centerness: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """
    How much each anchor counts: the score that Detectron2 gives it, to a power. The score is the highest probability of
    a class; in FCOS, the geometric mean of that and the centerness.

    With power 1 and without centerness this is the feature richness score (arXiv 2111.00674), by which that paper
    weights features and classes, its sum divided by that of the scores. At 2, the default here, a hundred thousand
    anchors of background at 0.01 together weigh less than a few dozen on objects; 0 counts every anchor alike.

    Args:
        logits: the teacher's, (M, K, P).
        centerness: the teacher's logits of it, (M, 1, P); None: it has none.
        valid: bool (M, 1, P), the anchors that hold image; None: all.

    Returns:
        (M, 1, P), in [0, 1], without a graph; 0 where not valid.
    """
    score = logits.float().amax(dim=1, keepdim=True).sigmoid()
    if centerness is not None:
        score = (score * centerness.float().sigmoid()).sqrt()
    weights = score.pow(power)
    return weights if valid is None else weights.masked_fill(~valid, 0)


@full_precision
def dense_class_loss(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """
    :func:`kd_det.losses.binary_soft_target_loss` with a weight for each anchor, in a third of its memory: the head of a
    RetinaNet has 16 million logits an image.

    Args:
        student_logits: (M, K, P).
        teacher_logits: of the same shape; is detached.
        weights: (M, 1, P), how much each anchor counts, not negative.
        temperature: T > 0.

    Returns:
        A scalar: the weighted sum, divided by the sum of the weights, or by 1 if that is larger. 0 for an empty batch.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    name = "dense_class_loss"
    student, teacher = to_float(name, student_logits, teacher_logits)
    _check_shapes(name, student, teacher, weights)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name}: the temperature must be a positive number, found {temperature}.")
    if student.numel() == 0:
        return zero_loss(student)
    return with_gradient(student, lambda s: _divergence(s, teacher, weights, temperature))


def _divergence(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, ``T w (sigmoid(s / T) - sigmoid(t / T)) / sum w``."""
    s, t = (x.masked_fill(weights == 0, 0).div_(temperature) for x in (student, teacher))
    scale = temperature / weights.sum().clamp(min=1)
    gradient = s.sigmoid().sub_(t.sigmoid()).mul_(weights * scale)
    # The divergence of (-s, -t) is that of (s, t), and for t <= 0 this sum keeps the digits of a confident teacher:
    # p (t - s) + log(1 - p) - log(1 - q).
    s, t = torch.where(t > 0, -s, s), t.abs_().neg_()
    divergence = (t - s).mul_(t.sigmoid()).add_(F.softplus(s)).sub_(F.softplus(t))
    return temperature * scale * divergence.mul_(weights).sum(), gradient


def _check_shapes(name: str, student: Tensor, teacher: Tensor, weights: Tensor) -> None:
    if student.dim() != 3 or student.shape != teacher.shape or weights.shape != student[:, :1].shape:
        raise ValueError(
            f"{name}: student and teacher must both be (M, D, P) and weights (M, 1, P), found shapes "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(weights.shape)}."
        )


@full_precision
def dense_box_loss(
    student_deltas: Tensor, teacher_deltas: Tensor, weights: Tensor, *, kind: str = "l1", transform=None
) -> Tensor:
    """
    The weighted mean over anchors of the distance of two predicted boxes: ``|s - t|_1`` of the head's own deltas, or
    ``1 - GIoU`` (arXiv 1902.09630) of the boxes. Boxes of one anchor are compared, and GIoU does not change when both
    axes are moved and scaled, so the boxes are decoded from an anchor of size 1: any anchor gives the same value.

    Args:
        student_deltas: (M, 4, P).
        teacher_deltas: of the same shape, in the same units; is detached.
        weights: (M, 1, P), how much each anchor counts, not negative.
        kind: "l1" or "giou".
        transform: Detectron2's, from deltas and anchors to boxes; for "giou".

    Returns:
        A scalar: the weighted sum, divided by the sum of the weights, or by 1 if that is larger. 0 for an empty batch.

    Raises:
        ValueError: shapes that do not fit, or an unknown kind.
    """
    name = "dense_box_loss"
    student, teacher = to_float(name, student_deltas, teacher_deltas)
    _check_shapes(name, student, teacher, weights)
    if kind not in _BOX_LOSSES:
        raise ValueError(unknown_name(f"kind of {name}", kind, _BOX_LOSSES))
    if student.numel() == 0:
        return zero_loss(student)
    student, teacher = (x.masked_fill(weights == 0, 0) for x in (student, teacher))
    if kind == "l1":
        distance = (student - teacher).abs().sum(1, keepdim=True)
    else:
        deltas = [x.transpose(1, 2).reshape(-1, 4) for x in (student, teacher)]
        anchors = F.pad(torch.ones_like(deltas[1][:, :2]), (2, 0))  # (0, 0, 1, 1)
        distance = 1 - _giou(*(transform.apply_deltas(x, anchors) for x in deltas)).view_as(weights)
    return (weights * distance).sum() / weights.sum().clamp(min=1)


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of pairs of boxes (R, 4). fvcore's and torchvision's look at values or index by masks: the host waits."""
    (ax, ay, ax2, ay2), (bx, by, bx2, by2) = a.unbind(1), b.unbind(1)
    width, height = torch.minimum(ax2, bx2) - torch.maximum(ax, bx), torch.minimum(ay2, by2) - torch.maximum(ay, by)
    inner = width.clamp(min=0) * height.clamp(min=0)
    outer = (torch.maximum(ax2, bx2) - torch.minimum(ax, bx)) * (torch.maximum(ay2, by2) - torch.minimum(ay, by))
    union = (ax2 - ax) * (ay2 - ay) + (bx2 - bx) * (by2 - by) - inner
    # Two equal boxes have a GIoU of 1 even where they have no area.
    return (inner + 1e-6) / (union + 1e-6) - (outer - union) / (outer + 1e-6)


class DenseHeadLoss(ClassLoss):
    """
    Base of losses on the predictions of two dense heads for the same anchors, weighted by the teacher's confidence. It
    chooses its taps itself.
    """

    needs_taps = False
    find_head = staticmethod(dense_head)

    def __init__(self, *, confidence_power: float = 2.0, box_weight: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        name = type(self).__name__
        if self.student_taps:
            raise ValueError(f"{name} chooses the taps in the heads itself, found {self.student_taps}.")
        for option, value in (("confidence_power", confidence_power), ("box_weight", box_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {option} must be a finite number >= 0, found {value}.")
        self.confidence_power, self.box_weight = confidence_power, box_weight

    @classmethod
    def from_config(cls, cfg, student, teacher):
        node = cfg.KD[cls.name.upper()]
        options = {"confidence_power": node.CONFIDENCE_POWER, "box_weight": node.BOX_WEIGHT}
        return {**super().from_config(cfg, student, teacher), **options}

    def connect(self, student, teacher):
        super().connect(student, teacher)
        try:
            own, theirs = self.find_head(student, side="student"), self.find_head(teacher, side="teacher")
            check_same_anchors(own, theirs)
        except ValueError as e:
            raise ValueError(f"{type(self).__name__} compares two heads at the same anchors: {e}") from None
        if self.compares_classes:
            self.match(own.num_classes, theirs.num_classes)
        self.student_taps = self.teacher_taps = own.taps
        self.num_anchors, self.transform = own.num_anchors, own.transform

    def by_anchor(self, maps: Sequence[Tensor], num_taps: int) -> list[Tensor]:
        """The maps of each tap as (N A, D, P); a tap has one a level."""
        levels = len(maps) // num_taps
        return [per_anchor(maps[i : i + levels], self.num_anchors) for i in range(0, len(maps), levels)]

    def share_of_ranks(self, weights: Tensor) -> float | Tensor:
        """The factor that makes DDP's average over ranks the average over the anchors of all ranks."""
        return share_of_samples(weights.sum().clamp(min=1), weights.device)


@DISTILLATION_LOSS_REGISTRY.register()
class DenseSoftTargetLoss(DenseHeadLoss):
    """
    What the heads of two RetinaNets or two FCOS predict: :func:`dense_class_loss`, plus
    ``box_weight`` times :func:`dense_box_loss`, plus in FCOS the divergence of the centerness (T = 1). Every anchor
    that holds image counts by the teacher's confidence in it, see :func:`confidence_weights`, in a class that both
    know, on all ranks together: the value depends neither on the size of the images nor on the number of objects.
    """

    name = "dense_soft_target"

    @configurable
    def __init__(self, *, temperature: float = 1.0, box_loss: str = "giou", **kwargs):
        """
        Args:
            temperature: T of the classes' sigmoids, positive.
            box_loss: "giou" or "l1", see :func:`dense_box_loss`.
            kwargs: ``confidence_power`` of :func:`confidence_weights`; ``box_weight``; :class:`DistillationLoss`'s,
                without taps.
        """
        super().__init__(**kwargs)
        none = torch.empty(0, 4, 1)
        dense_class_loss(none, none, none[:, :1], temperature=temperature)  # both check their options
        dense_box_loss(none, none, none[:, :1], kind=box_loss)
        self.temperature, self.box_loss = temperature, box_loss

    @classmethod
    def from_config(cls, cfg, student, teacher):
        node = cfg.KD[cls.name.upper()]
        options = {"temperature": node.TEMPERATURE, "box_loss": node.BOX_LOSS}
        return {**super().from_config(cfg, student, teacher), **options}

    def forward(self, student, teacher, context):
        own, theirs = (self.by_anchor(maps, len(self.student_taps)) for maps in (student, teacher))
        valid = valid_anchors(student[: len(student) // len(own)], self.num_anchors, context)
        if self.classes is not None:
            own[0], theirs[0] = self.classes.logits(own[0], theirs[0], background=False)
        centerness = theirs[2] if len(theirs) > 2 else None
        weights = confidence_weights(theirs[0], power=self.confidence_power, centerness=centerness, valid=valid)
        loss = dense_class_loss(own[0], theirs[0], weights, temperature=self.temperature)
        if self.box_weight:
            options = {"kind": self.box_loss, "transform": self.transform}
            loss = loss + self.box_weight * dense_box_loss(own[1], theirs[1], weights, **options)
        if centerness is not None:
            loss = loss + dense_class_loss(own[2], centerness, weights)
        return self.share_of_ranks(weights) * loss


@DISTILLATION_LOSS_REGISTRY.register()
class RPNSoftTargetLoss(DenseSoftTargetLoss):
    """:class:`DenseSoftTargetLoss` of two RPNs: their objectness and their deltas. Classes may differ."""

    name = "rpn_soft_target"
    compares_classes = False
    find_head = staticmethod(rpn_head)
