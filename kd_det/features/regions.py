"""
The regions that both networks share: the box branch of Detectron2's ROI heads, and what a student samples.

Shapes: N images; R sampled regions of all images together; K classes, background last.
"""

import contextlib
from dataclasses import dataclass
from typing import Dict, List, Tuple

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

__all__ = ["RegionHead", "RegionOutputs", "RegionTaps", "RegionTargets"]


@dataclass
class RegionOutputs:
    """
    What one head says about R regions.

    Attributes:
        features: pooled features, (R, C, P, P).
        logits: class logits, (R, K + 1).
        deltas: box regression, (R, 4) or (R, 4 K).
    """

    features: Tensor
    logits: Tensor
    deltas: Tensor


@dataclass
class RegionTargets:
    """
    What the ground truth says of the F foreground ones among R regions.

    Attributes:
        index: which of the regions, (F,).
        classes: their classes, (F,).
        deltas: from their boxes to the matched ground truth, in the head's units of box regression, (F, 4).
    """

    index: Tensor
    classes: Tensor
    deltas: Tensor

    def of_class(self, deltas: Tensor) -> Tensor:
        """The rows and columns of (R, 4) or (R, 4 K) deltas that belong to these regions and their classes: (F, 4)."""
        rows = deltas[self.index].unflatten(1, (-1, 4))
        if rows.shape[1] == 1:
            return rows[:, 0]
        return rows[torch.arange(len(rows), device=rows.device), self.classes]


class RegionHead:
    """One interface to the box branch of Detectron2's ROI heads: C4, standard, and each stage of a cascade."""

    def __init__(self, roi_heads: nn.Module, *, side: str = "model"):
        """
        Args:
            roi_heads: a :class:`StandardROIHeads`, :class:`CascadeROIHeads` or :class:`Res5ROIHeads`, or a subclass.
            side: what messages call the model.

        Raises:
            ValueError: other ROI heads, or none.
        """
        if not isinstance(roi_heads, (StandardROIHeads, Res5ROIHeads)):
            found = "no roi_heads" if roi_heads is None else type(roi_heads).__name__
            raise ValueError(
                f"Losses on regions need StandardROIHeads, CascadeROIHeads or Res5ROIHeads (or a subclass); "
                f"the {side} has {found}."
            )
        self.roi_heads = roi_heads
        self.num_classes: int = roi_heads.num_classes
        is_c4 = isinstance(roi_heads, Res5ROIHeads)
        self.pooler: nn.Module = roi_heads.pooler if is_c4 else roi_heads.box_pooler
        self._in_features = roi_heads.in_features if is_c4 else roi_heads.box_in_features
        if isinstance(roi_heads, CascadeROIHeads):
            self.predictors, self._heads = list(roi_heads.box_predictor), list(roi_heads.box_head)
        else:
            self.predictors = [roi_heads.box_predictor]
            self._heads = [roi_heads.res5 if is_c4 else roi_heads.box_head]

    @property
    def num_stages(self) -> int:
        return len(self.predictors)

    @property
    def is_class_agnostic(self) -> bool:
        return all(predictor.bbox_pred.out_features == 4 for predictor in self.predictors)

    def delta_weights(self, stage: int) -> Tensor:
        """(4,): the factors of its units of box regression."""
        return torch.tensor(self.predictors[min(stage, self.num_stages - 1)].box2box_transform.weights)

    @torch.no_grad()
    def label(self, boxes: List[Boxes], instances: List[Instances], stage: int) -> RegionTargets:
        """
        Match regions that this head sampled with the ground truth, by the head's own matcher, as it did itself.

        Args:
            boxes: each image's regions.
            instances: each image's ground truth, on the device of the boxes.
            stage: whose regions these are.
        """
        is_cascade = isinstance(self.roi_heads, CascadeROIHeads)
        matcher = self.roi_heads.proposal_matchers[stage] if is_cascade else self.roi_heads.proposal_matcher
        transform = self.predictors[stage].box2box_transform
        offset, index, classes, deltas = 0, [], [], []
        for regions, truth in zip(boxes, instances):
            if len(truth) and len(regions):
                matched, labels = matcher(pairwise_iou(truth.gt_boxes, regions))
                foreground = torch.nonzero(labels == 1)[:, 0]
                matched = matched[foreground]
                index.append(foreground + offset)
                classes.append(truth.gt_classes[matched])
                deltas.append(transform.get_deltas(regions.tensor[foreground], truth.gt_boxes.tensor[matched]))
            offset += len(regions)
        if not index:
            nothing = boxes[0].tensor.new_zeros(0)
            return RegionTargets(nothing.long(), nothing.long(), nothing.view(0, 4))
        return RegionTargets(torch.cat(index), torch.cat(classes), torch.cat(deltas))

    def __call__(self, features: Dict[str, Tensor], boxes: List[Boxes], stage: int) -> RegionOutputs:
        """
        Pool and classify given boxes; of a cascade with fewer stages, the last stage answers for later ones.

        Args:
            features: outputs of the backbone.
            boxes: each image's regions, in the coordinates of the network's input.
            stage: whose regions these are.
        """
        stage = min(stage, self.num_stages - 1)
        pooled = self.pooler([features[name] for name in self._in_features], boxes)
        hidden = self._heads[stage](pooled)
        if isinstance(self.roi_heads, Res5ROIHeads):
            hidden = hidden.mean(dim=[2, 3])
        logits, deltas = self.predictors[stage](hidden)
        return RegionOutputs(pooled, logits, deltas)


class RegionTaps:
    """Records the regions that a student samples and what it says of them, in the forward its own losses need."""

    def __init__(self, head: RegionHead):
        self.head = head
        self._clear()

    def _clear(self):
        self._boxes: List[List[Boxes]] = []
        self._features: List[Tensor] = []
        self._predictions: List[Tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def recording(self):
        """Record inside this context; an exception inside leaves nothing recorded."""
        self._clear()

        def read_pooler(module, args, output):
            self._boxes.append(args[1])
            self._features.append(output)

        def read_predictor(module, args, output):
            self._predictions.append(output)

        handles = [self.head.pooler.register_forward_hook(read_pooler)]
        handles += [predictor.register_forward_hook(read_predictor) for predictor in self.head.predictors]
        try:
            yield self
        except BaseException:
            self._clear()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def pop(self) -> List[Tuple[List[Boxes], RegionOutputs]]:
        """Each stage's boxes (one entry an image) and outputs. Reading empties."""
        stages = [
            (boxes, RegionOutputs(features, *predictions))
            for boxes, features, predictions in zip(self._boxes, self._features, self._predictions)
        ]
        self._clear()
        if len(stages) != self.head.num_stages:
            raise RuntimeError(
                f"expected the student's box head to run {self.head.num_stages} times in a training step, "
                f"found {len(stages)}"
            )
        return stages
