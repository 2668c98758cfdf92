"""CrossKD, cross-head knowledge distillation: arXiv 2306.11369."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.features.dense_heads import valid_anchors
from kd_det.losses._spatial import full_precision, match_maps, to_float
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.dense_soft_target import DenseHeadLoss, confidence_weights, dense_box_loss

__all__ = ["CrossKDLoss", "align_scale", "quality_focal_loss"]

_SUBNETS = ("cls_subnet", "bbox_subnet")


@full_precision
def align_scale(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """
    The student's map with each channel's mean and variance over images and positions made the teacher's:
    ``(s - mean_s) std_t / std_s + mean_t``. The published code does so at the cut, level by level and on each GPU by
    itself; the paper's equations leave it out.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W); is detached.
        valid: bool (N, 1, H, W), the positions that the statistics are taken over; None: all. The published code counts
            padding too.

    Returns:
        (N, C, H, W); a constant channel becomes the teacher's mean.

    Raises:
        ValueError: see :func:`kd_det.losses._spatial.match_maps`.
    """
    maps = match_maps("align_scale", student, teacher, valid, same_channels=True)
    student, teacher = maps.student, maps.teacher
    (s_mean, s_var), (t_mean, t_var) = (_statistics(x, maps.invalid) for x in (student, teacher))
    # Bounds the gradient of a channel that is constant; the convolutions of a new head have variances of 1e-4.
    return (student - s_mean) * (t_var.sqrt() * (s_var + 1e-8).rsqrt()) + t_mean


def _statistics(x: Tensor, invalid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, (1, C, 1, 1)."""
    dims = (0, 2, 3)
    if invalid is None:
        mean = x.mean(dims, keepdim=True)
        return mean, (x - mean).square().mean(dims, keepdim=True)
    count = (~invalid).sum().clamp(min=1)
    mean = x.masked_fill(invalid, 0).sum(dims, keepdim=True) / count
    return mean, (x - mean).masked_fill(invalid, 0).square().sum(dims, keepdim=True) / count


@full_precision
def quality_focal_loss(student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """
    ``|p - q| BCE(q, p)`` with the sigmoids q of the student and p of the teacher, summed over classes and anchors: the
    quality focal loss (arXiv 2006.04388, beta 1) with the teacher's probabilities as labels.

    Args:
        student_logits: (M, K, P).
        teacher_logits: of the same shape; is detached.
        valid: bool (M, 1, P), the anchors that hold image; None: all.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: shapes that differ.
    """
    name = "quality_focal_loss"
    student, teacher = to_float(name, student_logits, teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: both logits must be (M, K, P) over the same classes, found shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    if valid is not None:
        student, teacher = student.masked_fill(~valid, 0), teacher.masked_fill(~valid, 0)
    target = teacher.sigmoid()
    focus = (student.sigmoid() - target).abs()
    return (focus * F.binary_cross_entropy_with_logits(student, target, reduction="none")).sum()


@DISTILLATION_LOSS_REGISTRY.register()
class CrossKDLoss(DenseHeadLoss):
    """
    The student's features behind the first ``cut`` convolutions of its head's subnets pass through the rest of the
    teacher's frozen head; what comes out is compared with what the teacher predicts (section 3.2):
    :func:`quality_focal_loss` of the classes, plus ``box_weight`` times ``1 - GIoU`` of the boxes weighted by the
    teacher's confidence. Gradients pass the teacher's layers to the student's first ones, so that the student's own
    predictions follow the ground truth alone. For RetinaNet and FCOS; centerness is not compared, as published.

    As the published code does, features are cut in front of the ReLU and aligned by :func:`align_scale`. Unlike it,
    both sums are divided by the sum of :func:`confidence_weights`, on all ranks together, where it takes the number of
    positive anchors (in FCOS, their centerness): no ground truth is needed. Boxes are weighted by the same weights,
    there by the highest probability of a class; and FCOS takes GIoU, there the logarithm of the IoU.
    """

    name = "cross_kd"
    compares_classes = False  # both sides are the teacher's head, so they are its classes
    needs_one_teacher = True

    @configurable
    def __init__(self, *, cut: int = 3, **kwargs):
        """
        Args:
            cut: how many of its own convolutions the student's features have passed, at least 1.
            kwargs: ``confidence_power`` of :func:`confidence_weights`; ``box_weight``; :class:`DistillationLoss`'s,
                without taps.
        """
        super().__init__(**kwargs)
        if not cut >= 1:
            raise ValueError(f"CrossKDLoss: the cut must be at least 1 convolution, found {cut}.")
        self.cut = cut

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "cut": cfg.KD.CROSS_KD.CUT}

    def connect(self, student, teacher):
        super().connect(student, teacher)
        networks = ((student, "student"), (teacher, "teacher"))
        cuts = [[self._cut(network, side, name) for name in _SUBNETS] for network, side in networks]
        channels = [[conv.out_channels for conv, _ in own] for own in cuts]
        if channels[0] != channels[1]:
            raise ValueError(
                f"CrossKDLoss passes the student's features through the teacher's head, which needs equal channels: "
                f"behind convolution {self.cut} of {' and '.join(_SUBNETS)} the student has {channels[0]} and the "
                f"teacher {channels[1]}. In Detectron2 a head is as wide as the pyramid (MODEL.FPN.OUT_CHANNELS)."
            )
        places = [tuple(f"head.{name}.{index}" for name, (_, index) in zip(_SUBNETS, own)) for own in cuts]
        self.student_taps, self.teacher_taps = places[0], (*places[1], "head.cls_score", "head.bbox_pred")
        self._rest = [index + 1 for _, index in cuts[1]]

    def _cut(self, network: nn.Module, side: str, name: str) -> tuple[nn.Conv2d, int]:
        """The last convolution in front of the cut, and the index of the last module in front of its ReLU."""
        subnet = getattr(network.head, name, ())
        convs = [module for module in subnet if isinstance(module, nn.Conv2d)]
        relus = [i for i, module in enumerate(subnet) if isinstance(module, nn.ReLU)]
        if min(len(convs), len(relus)) < self.cut:
            raise ValueError(
                f"CrossKDLoss cuts the heads behind convolution {self.cut} (KD.CROSS_KD.CUT), and the {side}'s "
                f"{type(network.head).__name__}.{name} has {len(convs)}."
            )
        return convs[self.cut - 1], relus[self.cut - 1] - 1

    def forward(self, student, teacher, context):
        levels, head = len(student) // 2, context.teacher.model.head
        predictors = head.cls_score, head.bbox_pred
        rest = [getattr(head, name)[start:] for name, start in zip(_SUBNETS, self._rest)]
        crossed = [], []
        for level in range(levels):
            # Both branches at once, in half the kernels.
            pairs = [maps[level : 2 * levels : levels] for maps in (student, teacher)]
            own, theirs = (torch.cat(pair, dim=1) for pair in pairs)
            aligned = align_scale(own, theirs, valid=context.valid(own)).split([x.shape[1] for x in pairs[0]], dim=1)
            for out, layers, predictor, x in zip(crossed, rest, predictors, aligned):
                out.append(predictor(layers(x)))
        logits, deltas = self.by_anchor(crossed[0] + crossed[1], 2)
        theirs = self.by_anchor(teacher[2 * levels :], 2)
        valid = valid_anchors(student[:levels], self.num_anchors, context)
        weights = confidence_weights(theirs[0], power=self.confidence_power, valid=valid)
        loss = quality_focal_loss(logits, theirs[0], valid=valid) / weights.sum().clamp(min=1)
        if self.box_weight:
            boxes = dense_box_loss(deltas, theirs[1], weights, kind="giou", transform=self.transform)
            loss = loss + self.box_weight * boxes
        return self.share_of_ranks(weights) * loss
