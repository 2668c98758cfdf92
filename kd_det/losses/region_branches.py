"""Soft targets on the mask and keypoint heads, on the foreground regions that the student's own was trained on."""

from typing import List, Optional

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.structures import Boxes
from torch import Tensor, nn

from kd_det.features.region_branches import BranchRegions, RegionBranch
from kd_det.losses._ranks import share_of_samples
from kd_det.losses._spatial import full_precision
from kd_det.losses.binary_soft_target import binary_soft_target_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, DistillationLoss
from kd_det.losses.class_loss import ClassLoss
from kd_det.losses.soft_target import soft_target_loss

__all__ = ["KeypointSoftTargetLoss", "MaskSoftTargetLoss", "keypoint_soft_target_loss"]


@full_precision
def keypoint_soft_target_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, visible: Optional[Tensor] = None
) -> Tensor:
    """
    ``T^2 KL(softmax(t / T) || softmax(s / T))`` over the positions of each keypoint's heatmap, averaged over keypoints:
    :func:`soft_target_loss` in which positions are the classes, as they are in the task loss of Keypoint R-CNN.

    DWPose (arXiv 2307.15880) counts invisible keypoints too, on crops that hold the whole person. A detector's region
    often holds a part, and its softmax must sum to 1 even if the keypoint is elsewhere; so pass as ``visible`` the
    keypoints that the task loss counts, which are labelled visible and lie inside the region.

    Args:
        student: heatmaps (R, K, S, S) of K keypoints in R regions.
        teacher: of the same shape; is detached.
        temperature: T > 0.
        visible: bool (R, K), the keypoints that count; None: all.

    Returns:
        A scalar; 0 for no region or no keypoint that counts.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"keypoint_soft_target_loss: both heatmaps must be (R, K, S, S), found shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    if visible is not None and visible.shape != student.shape[:2]:
        raise ValueError(
            f"keypoint_soft_target_loss: visible must be {tuple(student.shape[:2])}, found {tuple(visible.shape)}."
        )
    rows = [x.flatten(2).flatten(0, 1) for x in (student, teacher)]
    valid = None if visible is None else visible.reshape(-1, 1)
    return soft_target_loss(*rows, temperature=temperature, valid=valid)


class _BranchLoss(DistillationLoss):
    """What both losses share."""

    needs_taps = False
    needs_one_teacher = True

    @configurable
    def __init__(self, *, temperature: float = 1.0, **kwargs):
        """
        Args:
            temperature: T, positive.
            kwargs: see the base classes, without taps.
        """
        super().__init__(**kwargs)
        if self.student_taps:
            raise ValueError(f"{type(self).__name__} reads no taps, found {self.student_taps}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"{type(self).__name__}: the temperature must be a positive number, found {temperature}.")
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "temperature": cfg.KD[cls.name.upper()].TEMPERATURE}

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        super().connect(student, teacher)
        sides = (("student", student), ("teacher", teacher))
        heads = [getattr(network, "roi_heads", None) for _, network in sides]
        self.connect_branches(*(RegionBranch(h, self.branch, side=side) for h, (side, _) in zip(heads, sides)))


@DISTILLATION_LOSS_REGISTRY.register()
class MaskSoftTargetLoss(_BranchLoss, ClassLoss):
    """
    :func:`binary_soft_target_loss` of every pixel of the mask of a region's ground-truth class (or of the one mask of a
    class-agnostic head), averaged over the foreground regions of all ranks. Regions of a class that the teacher does
    not know are left out, unless both heads are class-agnostic. Reads no taps.
    """

    name = "mask_soft_target"
    branch = "mask"

    def connect_branches(self, student: RegionBranch, teacher: RegionBranch) -> None:
        if not (student.is_class_agnostic and teacher.is_class_agnostic):
            self.match(student.num_classes, teacher.num_classes)

    def forward(self, student, teacher, context):
        regions, taught = context.branch_pair("mask")
        theirs, counts = regions.classes, None
        if self.classes is not None:
            theirs, counts = self.classes.of_teacher(theirs)
        s, t = _of_class(regions.logits, regions.classes), _of_class(taught, theirs)
        valid = None if counts is None else counts[:, None, None, None].expand_as(s)
        mean = binary_soft_target_loss(s, _resize(t, s), temperature=self.temperature, valid=valid)
        return share_of_samples(len(s) if counts is None else counts.sum(), s.device) * mean


@DISTILLATION_LOSS_REGISTRY.register()
class KeypointSoftTargetLoss(_BranchLoss):
    """
    :func:`keypoint_soft_target_loss` on the regions that the student's keypoint head was trained on, averaged over the
    keypoints of all ranks that its own loss counts. Reads no taps.
    """

    name = "keypoint_soft_target"
    branch = "keypoint"

    def connect_branches(self, student: RegionBranch, teacher: RegionBranch) -> None:
        have, want = student.head.num_keypoints, teacher.head.num_keypoints
        if have != want:
            raise ValueError(
                f"KeypointSoftTargetLoss compares keypoint by keypoint: the student has {have} and the teacher {want} "
                f"(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)."
            )

    def forward(self, student, teacher, context):
        regions, taught = context.branch_pair("keypoint")
        s, visible = regions.logits, _visible(regions)
        mean = keypoint_soft_target_loss(s, _resize(taught, s), temperature=self.temperature, visible=visible)
        return share_of_samples(visible.sum(), s.device) * mean


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """The mask of each region's class, (R, 1, S, S), from (R, K, S, S) or a class-agnostic (R, 1, S, S)."""
    if logits.shape[1] == 1:
        return logits
    return logits.gather(1, classes[:, None, None, None].expand(-1, 1, *logits.shape[2:]))


def _resize(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's logits at the size of the student's, bilinearly: both cover the same regions."""
    size = student.shape[-2:]
    if teacher.shape[-2:] == size or not len(teacher):
        return teacher.reshape(*teacher.shape[:2], *size)
    return F.interpolate(teacher.float(), size=size, mode="bilinear", antialias=True)


def _visible(regions: BranchRegions) -> Tensor:
    """Which keypoints the student's own loss counts, bool (R, K): visible, and inside the region."""
    # Detectron2 gives an image without ground truth no gt_keypoints.
    found: List[Tensor] = [x.gt_keypoints.tensor for x in regions.instances if len(x)]
    if not found:
        return torch.zeros(regions.logits.shape[:2], dtype=torch.bool, device=regions.logits.device)
    points, flags = torch.cat(found).split((2, 1), dim=2)
    boxes = Boxes.cat(regions.boxes).tensor[:, None]
    inside = (points >= boxes[..., :2]) & (points <= boxes[..., 2:])
    return inside.all(dim=2) & (flags[..., 0] > 0)
