"""
What a loss may know of a training step besides the maps, and which positions of a map hold image.

Shapes: N images; R sampled regions of all images together.
"""

from typing import Dict, List, Optional, Tuple, Union

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from kd_det.features.regions import RegionHead, RegionOutputs, RegionTargets, SampledRegions, to_device

__all__ = ["StepContext", "to_device", "valid_mask", "valid_sizes"]


def valid_sizes(
    image_sizes: List[Tuple[int, int]], canvas: Tuple[int, int], size: Tuple[int, int]
) -> List[Tuple[int, int]]:
    """
    How many rows and columns of a feature map hold image, for each image, when images are padded at the right and
    bottom: a position does where any pixel of its cell lies inside the image.

    Args:
        image_sizes: each image's height and width in pixels.
        canvas: the padded batch's height and width in pixels.
        size: the map's height and width.
    """
    # ceil(image * map / canvas), in integers
    return [tuple(-(-side * m // c) for side, m, c in zip(image, size, canvas)) for image in image_sizes]


def valid_mask(
    image_sizes: Union[Tensor, List[Tuple[int, int]]], canvas: Tuple[int, int], size: Tuple[int, int]
) -> Tensor:
    """
    Which positions of a feature map hold image, see :func:`valid_sizes`.

    Args:
        image_sizes: (N, 2), each image's height and width in pixels; a tensor on the device of the map, or numbers.
        canvas, size: of the padded batch and of the map.

    Returns:
        bool, (N, 1, H, W).
    """
    image_sizes = image_sizes if isinstance(image_sizes, Tensor) else torch.tensor(image_sizes)
    rows, columns = (
        # Position i lies inside where i < ceil(side * m / c), which is i * c < side * m.
        torch.arange(0, m * c, c, device=image_sizes.device) < side[:, None] * m
        if c % m
        else torch.arange(0, c, c // m, device=image_sizes.device) < side[:, None]
        for side, m, c in zip(image_sizes.unbind(1), size, canvas)
    )
    return rows[:, None, :, None] & columns[:, None, None, :]


class StepContext:
    """
    What a loss may know of a training step besides the maps: image sizes, valid positions, ground truth, and the
    regions that both networks share. One object a step, shared by all losses.

    Attributes:
        image_sizes: each image's height and width.
        canvas: height and width of the padded batch.
        batched_inputs: the student's inputs.
        task_losses: the student's own losses, with their graph.
        teacher: the :class:`kd_det.teachers.Teacher`.
    """

    def __init__(
        self,
        image_sizes: List[Tuple[int, int]],
        canvas: Tuple[int, int],
        *,
        batched_inputs: Optional[List[Dict]] = None,
        task_losses: Optional[Dict[str, Tensor]] = None,
        teacher=None,
        teacher_outputs: Optional[Dict[str, Tensor]] = None,
        student_head: Optional[RegionHead] = None,
        sampled: Optional[List[SampledRegions]] = None,
    ):
        """
        Args:
            image_sizes, canvas, batched_inputs, task_losses, teacher: see the attributes.
            teacher_outputs: the outputs of the teacher's backbone.
            student_head: the student's box branch.
            sampled: the student's sampled regions, one entry a stage, see :meth:`RegionTaps.pop`.
        """
        self.image_sizes = image_sizes
        self.canvas = canvas
        self.batched_inputs = batched_inputs
        self.task_losses = task_losses
        self.teacher = teacher
        self._teacher_outputs = teacher_outputs
        self._student_head = student_head
        self._sampled = sampled
        self._sizes: Dict[torch.device, Tensor] = {}
        self._masks: Dict[Tuple, Optional[Tensor]] = {}
        self._pairs: Optional[List[Tuple[RegionOutputs, RegionOutputs]]] = None
        self._targets: Dict[int, RegionTargets] = {}

    def valid_sizes(self, features: Tensor) -> List[Tuple[int, int]]:
        """How many rows and columns of a map (..., H, W) hold image, for each image; known on the host."""
        return valid_sizes(self.image_sizes, self.canvas, tuple(features.shape[-2:]))

    def valid(self, features: Tensor) -> Optional[Tensor]:
        """The mask of a map's positions that hold image, bool (N, 1, H, W), or None where all of them do."""
        size = tuple(features.shape[-2:])
        key = (size, features.device)
        if key not in self._masks:
            whole = all(limits == size for limits in self.valid_sizes(features))
            self._masks[key] = None if whole else valid_mask(self._sizes_on(features.device), self.canvas, size)
        return self._masks[key]

    def _sizes_on(self, device: torch.device) -> Tensor:
        """The image sizes as a tensor (N, 2), copied once a step."""
        if device not in self._sizes:
            self._sizes[device] = to_device(torch.tensor(self.image_sizes), device)
        return self._sizes[device]

    @torch.no_grad()
    def _teacher_on(self, boxes: List[Boxes], stage: int) -> RegionOutputs:
        return self.teacher.head(self._teacher_outputs, boxes, stage)

    def region_pairs(self) -> List[Tuple[RegionOutputs, RegionOutputs]]:
        """
        For each stage of the student's box head (one, unless a cascade): what the student predicts for its sampled
        regions, with its graph, and what the teacher predicts for the same regions. The teacher runs once a step.
        """
        if self._sampled is None:
            raise RuntimeError("regions were not recorded: the loss must declare needs_regions = True")
        if self._pairs is None:
            self._pairs = [
                (regions.outputs, self._teacher_on(regions.boxes, stage)) for stage, regions in enumerate(self._sampled)
            ]
        return self._pairs

    def first_regions(self, stage: int, most: int) -> Tensor:
        """Which of the regions in ``region_pairs()[stage]`` are among the first ``most`` of their image: an index."""
        offset, first = 0, []
        for boxes in self._sampled[stage].boxes:
            first.append(torch.arange(offset, offset + min(most, len(boxes)), device=boxes.device))
            offset += len(boxes)
        return torch.cat(first)

    def ground_truth(self) -> List[Instances]:
        """
        Each image's ground truth, on the device of the batch.

        Raises:
            ValueError: the batch has none.
        """
        if not self.batched_inputs or "instances" not in self.batched_inputs[0]:
            raise ValueError("This loss needs ground truth: the batch has no 'instances'.")
        return [x["instances"] for x in self.batched_inputs]

    def region_targets(self, stage: int) -> RegionTargets:
        """The ground truth of the regions in ``region_pairs()[stage]``, as the student matched them."""
        if stage not in self._targets:
            self._targets[stage] = self._student_head.label(self._sampled[stage], self.ground_truth(), stage)
        return self._targets[stage]

    def teacher_units(self, stage: int) -> List[float]:
        """Four factors from the teacher's units of box regression (BBOX_REG_WEIGHTS) to the student's."""
        student, teacher = self._student_head.delta_weights(stage), self.teacher.head.delta_weights(stage)
        return [s / t for s, t in zip(student, teacher)]
