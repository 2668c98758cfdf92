"""
Images without annotations in a training batch: dicts with a true "unlabelled", and pseudo-labels for them.

On such images the distillation losses act; the student's own losses act on pseudo-labels alone: what a teacher finds
with a score above a threshold (Liu et al., Unbiased Teacher, arXiv 2102.09480, section 3.2). With none, everything in
an image would be background to the student.
"""

from collections.abc import Sequence
from typing import Dict, List, Optional, Tuple

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from torch import Tensor, nn

from kd_det.features.classes import ClassMatch, match_classes

__all__ = ["UNLABELLED", "PseudoLabels", "pseudo_labels", "split_unlabelled", "without_labels"]

# The key of a model's input that marks an image without annotations.
UNLABELLED = "unlabelled"

# What the heads of a Detectron2 detector find, and how ground truth is named.
_BRANCHES = {"mask": "pred_masks", "keypoint": "pred_keypoints"}


def pseudo_labels(
    detections: Instances, threshold: float, classes: Optional[ClassMatch] = None, branches: Sequence[str] = ()
) -> Instances:
    """
    Detections as ground truth: ``gt_boxes`` and ``gt_classes``, with "mask" among the branches ``gt_masks``, with
    "keypoint" ``gt_keypoints``, all of them visible.

    Args:
        detections: of one image, in the coordinates of the network's input: ``pred_boxes``, ``pred_classes``,
            ``scores``, ``pred_masks`` (bool, (R, H, W)), ``pred_keypoints`` ((R, K, 3)).
        threshold: those with a lower score are left out.
        classes: which of the teacher's classes are which of the student's: those of others are left out; None: equal.
    """
    theirs = detections.pred_classes
    mine = theirs if classes is None else classes.of_student(theirs)
    kept = (detections.scores >= threshold) & (mine >= 0)
    ret = Instances(detections.image_size)
    ret.gt_boxes = Boxes(detections.pred_boxes.tensor[kept].float())
    ret.gt_classes = mine[kept]
    if "mask" in branches:
        ret.gt_masks = BitMasks(detections.pred_masks[kept])
    if "keypoint" in branches:
        points = detections.pred_keypoints[kept].float()
        ret.gt_keypoints = Keypoints(torch.cat([points[..., :2], torch.full_like(points[..., :1], 2)], dim=-1))
    return ret


def split_unlabelled(batched_inputs: List[Dict]) -> Tuple[List[Dict], List[Dict]]:
    """
    The images of a batch with and without annotations, each in their order; a ``ValueError`` if all are without: the
    student's own losses would have nothing to learn from.
    """
    labelled = [x for x in batched_inputs if not x.get(UNLABELLED)]
    if batched_inputs and not labelled:
        raise ValueError(f"All {len(batched_inputs)} images of a batch are unlabelled; expected labelled ones too.")
    return labelled, [x for x in batched_inputs if x.get(UNLABELLED)]


class PseudoLabels:
    """How a teacher's detections label the images that are marked as unlabelled and have no "instances"."""

    def __init__(
        self,
        *,
        threshold: float = 0.7,
        weight: float = 1.0,
        from_teacher: bool = True,
        student_classes: Sequence[str] = (),
        teacher_classes: Sequence[str] = (),
        class_map: Sequence = (),
    ):
        """
        Args:
            threshold: lowest score of a detection that becomes a label.
            weight: of the student's own losses on them, which are logged as ``loss_..._pseudo``; 0: they do not act,
                and labels are made only for distillation losses that read them.
            from_teacher: False: they come with the images, as their "instances".
            student_classes, teacher_classes, class_map: see :func:`kd_det.features.classes.match_classes`.

        Raises:
            ValueError: a number out of range.
        """
        if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise ValueError(f"KD.UNLABELLED.THRESHOLD must be a score in 0..1, found {threshold!r}.")
        if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"KD.UNLABELLED.WEIGHT must be a finite number >= 0, found {weight!r}.")
        self.threshold, self.weight, self.from_teacher = threshold, weight, from_teacher
        self._known = {
            "student_classes": student_classes,
            "teacher_classes": teacher_classes,
            "class_map": class_map,
        }
        self._classes: Optional[ClassMatch] = None
        self._branches: List[str] = []

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """
        Match the classes of student and teacher.

        Raises:
            ValueError: no class in common, or a student that learns masks or keypoints, which the teacher has not.
        """
        self._branches = [name for name in _BRANCHES if _has_branch(student, name)]
        missing = [name for name in self._branches if not _has_branch(teacher, name)]
        if missing:
            raise ValueError(
                f"The student has a {missing[0]} head, and the teacher {type(teacher).__name__} has none to label "
                f"unlabelled images with: take another teacher, or KD.UNLABELLED.RESULTS with {missing[0]}s."
            )
        counts = _num_classes(student), _num_classes(teacher)
        if None in counts:
            return
        try:
            self._classes = match_classes(*counts, **self._known)
        except ValueError as e:
            raise ValueError(f"The teacher cannot label unlabelled images: {e}") from None

    def __call__(self, batched_inputs: List[Dict], detections: List[Dict]) -> List[Dict]:
        """The inputs with "instances": their own or, where they have none, from what the teacher returned for them."""
        device = detections[0]["instances"].scores.device
        classes = self._classes.to(device) if self._classes is not None else None
        return [
            x
            if "instances" in x
            else {**x, "instances": pseudo_labels(found["instances"], self.threshold, classes, self._branches)}
            for x, found in zip(batched_inputs, detections, strict=True)
        ]


def without_labels(batched_inputs: List[Dict]) -> List[Dict]:
    """The inputs with empty "instances", which the student's forward wants, where they have none."""
    return [{**x, "instances": x["instances"] if "instances" in x else _nothing(x["image"])} for x in batched_inputs]


def _nothing(image: Tensor) -> Instances:
    ret = Instances(tuple(image.shape[-2:]))
    ret.gt_boxes = Boxes(torch.zeros(0, 4, device=image.device))
    ret.gt_classes = torch.zeros(0, dtype=torch.int64, device=image.device)
    return ret


def _has_branch(model: nn.Module, name: str) -> bool:
    return bool(getattr(getattr(model, "roi_heads", None), f"{name}_on", False))


def _num_classes(model: nn.Module) -> Optional[int]:
    count = getattr(getattr(model, "roi_heads", model), "num_classes", None)
    return count or len(getattr(model, "class_names", ())) or None
