"""
Which positions and which regions count, and the regions that both networks share.

Shapes: N images; R sampled regions of all images together; K classes, background last.
"""

import contextlib
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

__all__ = ["RegionHead", "RegionOutputs", "RegionTaps", "RegionTargets", "Regions", "valid_mask"]


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


def valid_mask(image_sizes: List[Tuple[int, int]], canvas: Tuple[int, int], size: Tuple[int, int]) -> Tensor:
    """
    Which positions of a feature map hold image, when images are padded at the right and bottom.

    Args:
        image_sizes: each image's height and width in pixels.
        canvas: the padded batch's height and width in pixels.
        size: the map's height and width.

    Returns:
        bool, (N, 1, H, W): true where any pixel of the position's cell lies inside the image.
    """
    # ceil(image * map / canvas), in integers
    limits = torch.tensor([[-(-side * m // c) for side, m, c in zip(i, size, canvas)] for i in image_sizes])
    rows = torch.arange(size[0])[None] < limits[:, :1]
    columns = torch.arange(size[1])[None] < limits[:, 1:]
    return (rows[:, None, :, None]) & (columns[:, None, None, :])


class Regions:
    """What a loss may know of a batch besides the maps. One object a training step, shared by all losses."""

    def __init__(
        self,
        image_sizes: List[Tuple[int, int]],
        canvas: Tuple[int, int],
        *,
        instances: Optional[List[Instances]] = None,
        student_head: Optional[RegionHead] = None,
        student_stages: Optional[List[Tuple[List[Boxes], RegionOutputs]]] = None,
        teacher_head: Optional[RegionHead] = None,
        teacher_outputs: Optional[Dict[str, Tensor]] = None,
        input_gradients: Optional[Callable[[], Tuple[List[Tensor], List[Tensor]]]] = None,
    ):
        """
        Args:
            image_sizes: each image's height and width.
            canvas: height and width of the padded batch.
            instances: each image's ground truth, or None if the batch has none.
            student_head: the student's box branch.
            student_stages: the student's sampled regions, see :meth:`RegionTaps.pop`.
            teacher_head: the teacher's box branch.
            teacher_outputs: the outputs of the teacher's backbone.
            input_gradients: computes what :meth:`input_gradients` returns.
        """
        self.image_sizes = image_sizes
        self.canvas = canvas
        self.instances = instances
        self._student_head = student_head
        self._student_stages = student_stages
        self._teacher_head = teacher_head
        self._teacher_outputs = teacher_outputs
        self._input_gradients = input_gradients
        self._masks: Dict[Tuple, Optional[Tensor]] = {}
        self._pairs: Optional[List[Tuple[RegionOutputs, RegionOutputs]]] = None

    def valid(self, features: Tensor) -> Optional[Tensor]:
        """The mask of a map's positions that hold image, bool (N, 1, H, W), or None where all of them do."""
        size = tuple(features.shape[-2:])
        key = (size, features.device)
        if key not in self._masks:
            mask = valid_mask(self.image_sizes, self.canvas, size)
            self._masks[key] = None if bool(mask.all()) else mask.to(features.device)
        return self._masks[key]

    @torch.no_grad()
    def _ask_teacher(self, boxes: List[Boxes], stage: int) -> RegionOutputs:
        return self._teacher_head(self._teacher_outputs, boxes, stage)

    def region_pairs(self) -> List[Tuple[RegionOutputs, RegionOutputs]]:
        """
        For each stage of the student's box head (one, unless a cascade): what the student said of its sampled
        regions, with its graph, and what the teacher says of the same regions. The teacher is asked once a step.
        """
        if self._student_stages is None:
            raise RuntimeError("regions were not recorded: the loss must declare needs_regions = True")
        if self._pairs is None:
            self._pairs = [
                (student, self._ask_teacher(boxes, stage))
                for stage, (boxes, student) in enumerate(self._student_stages)
            ]
        return self._pairs

    def first_regions(self, stage: int, most: int) -> Tensor:
        """Which of the regions in ``region_pairs()[stage]`` are among the first ``most`` of their image: an index."""
        offset, first = 0, []
        for boxes in self._student_stages[stage][0]:
            first.append(torch.arange(offset, offset + min(most, len(boxes)), device=boxes.device))
            offset += len(boxes)
        return torch.cat(first)

    def input_gradients(self) -> Tuple[List[Tensor], List[Tensor]]:
        """
        The gradient of each image's own task loss at its pixels, (C, H, W) in 1 / grey value: of the student, with its
        graph, and of the teacher, with the same labels. Computed at every call.
        """
        if self._input_gradients is None:
            raise RuntimeError("images kept no gradient: the loss must declare needs_input_gradients = True")
        return self._input_gradients()

    def ground_truth(self) -> List[Instances]:
        """
        Each image's ground truth.

        Raises:
            ValueError: the batch has none.
        """
        if self.instances is None:
            raise ValueError("This loss needs ground truth: the batch has no 'instances'.")
        return self.instances

    def region_targets(self, stage: int) -> RegionTargets:
        """The ground truth of the regions in ``region_pairs()[stage]``, as the student matched them."""
        boxes, _ = self._student_stages[stage]
        truth = [instances.to(boxes[0].device) for instances in self.ground_truth()]
        return self._student_head.label(boxes, truth, stage)

    def teacher_units(self, stage: int) -> Tensor:
        """(4,): factors from the teacher's units of box regression (BBOX_REG_WEIGHTS) to the student's."""
        return self._student_head.delta_weights(stage) / self._teacher_head.delta_weights(stage)
