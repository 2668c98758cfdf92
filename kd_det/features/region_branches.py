"""
The mask and keypoint branches of Detectron2's ROI heads, on the regions that the student's own was trained on.

Shapes: R foreground regions of all images together; logits (R, C, S, S): C classes (1 if class-agnostic) or keypoints.
"""

import contextlib
from dataclasses import dataclass
from typing import Dict, List

import torch
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from kd_det.features.regions import pool_regions

__all__ = ["BranchRegions", "RegionBranch"]

_HEADS = {"mask": BaseMaskRCNNHead, "keypoint": BaseKeypointRCNNHead}


@dataclass
class BranchRegions:
    """The regions that a student's mask or keypoint head was trained on, and what it predicted for them."""

    instances: List[Instances]  # each image's, as the student labelled them (gt_classes, gt_keypoints)
    logits: Tensor  # (R, C, S, S)

    @property
    def boxes(self) -> List[Boxes]:
        return [x.proposal_boxes for x in self.instances]

    @property
    def classes(self) -> Tensor:
        """(R,), of the ground truth."""
        return torch.cat([x.gt_classes for x in self.instances])


class RegionBranch:
    """One interface to the mask or the keypoint branch of ROI heads: standard, cascade, and the masks of C4."""

    def __init__(self, roi_heads: nn.Module, name: str, *, side: str = "model"):
        """
        Args:
            name: "mask" or "keypoint".
            side: the model in the messages.

        Raises:
            ValueError: no such head, or one that is not Detectron2's (or a subclass) on pooled regions.
        """
        head = getattr(roi_heads, f"{name}_head", None)
        if not isinstance(roi_heads, (StandardROIHeads, Res5ROIHeads)) or not isinstance(head, _HEADS[name]):
            raise ValueError(
                f"A loss on the {name} head needs a {_HEADS[name].__name__} (or a subclass) on both sides "
                f"(MODEL.{name.upper()}_ON); the {side} has {'none' if head is None else type(head).__name__}."
            )
        self.name, self.head, self.num_classes = name, head, roi_heads.num_classes
        # The masks of C4 share the regions' features with the boxes.
        is_c4 = isinstance(roi_heads, Res5ROIHeads)
        self._pooler = roi_heads.pooler if is_c4 else getattr(roi_heads, f"{name}_pooler")
        self._in_features = roi_heads.in_features if is_c4 else getattr(roi_heads, f"{name}_in_features")
        self._shared = roi_heads.res5 if is_c4 else nn.Identity()
        if self._pooler is None:
            raise ValueError(
                f"A loss on the {name} head needs one that pools its regions; the {side}'s reads whole maps "
                f"(MODEL.ROI_{name.upper()}_HEAD.POOLER_TYPE is empty)."
            )

    @property
    def is_class_agnostic(self) -> bool:
        """Whether it is known to predict one mask for all of several classes."""
        return getattr(getattr(self.head, "predictor", None), "out_channels", 0) == 1 < self.num_classes

    def __call__(self, features: Dict[str, Tensor], boxes: List[Boxes]) -> Tensor:
        """The logits (R, C, S, S) of each image's boxes, from the outputs of the backbone."""
        pooled = pool_regions(self._pooler, [features[name] for name in self._in_features], boxes)
        return self.head.layers(self._shared(pooled))

    @contextlib.contextmanager
    def recording(self, record):
        """A context in which ``record`` is called with the :class:`BranchRegions` of each forward of the head."""
        head, layers, logits = self.head, self.head.layers, []

        # Only ``layers`` returns the logits: the head's forward makes losses of them.
        def recorded_layers(x: Tensor) -> Tensor:
            logits.append(layers(x))
            return logits[-1]

        head.layers = recorded_layers
        handle = head.register_forward_hook(lambda _, args, out: record(BranchRegions(args[1], logits.pop())))
        try:
            yield
        finally:
            handle.remove()
            del head.layers
