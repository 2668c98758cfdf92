"""
What a loss may know of a training step besides the maps, and which positions of a map hold image.

Shapes: N images; R sampled regions of all images together.
"""

from typing import Callable, Dict, List, Optional, Tuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from kd_det.features.regions import RegionHead, RegionOutputs, RegionTargets

__all__ = ["StepContext", "valid_mask"]


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


def valid_sizes(image_sizes, canvas, size):
    return [tuple(-(-side * m // c) for side, m, c in zip(image, size, canvas)) for image in image_sizes]


class StepContext:
    """
    What a loss may know of a training step besides the maps: image sizes, valid positions, ground truth, and the
    regions that both networks share. One object a step, shared by all losses.
    """

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
