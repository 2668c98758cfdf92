"""
What a loss may know of a training step besides the maps, and which positions of a map hold image.

Shapes: N images; R sampled regions of all images together.
"""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from kd_det.features.regions import RegionHead, RegionOutputs, RegionTargets, SampledRegions

__all__ = ["StepContext", "valid_mask", "valid_sizes"]


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
    image_sizes: List[Tuple[int, int]], canvas: Tuple[int, int], size: Tuple[int, int], device: torch.device = "cpu"
) -> Tensor:
    """
    Which positions of a feature map hold image, see :func:`valid_sizes`.

    Returns:
        bool, (N, 1, H, W).
    """
    limits = _to_device(torch.tensor(valid_sizes(image_sizes, canvas, size)), device)
    rows = torch.arange(size[0], device=device) < limits[:, :1]
    columns = torch.arange(size[1], device=device) < limits[:, 1:]
    return rows[:, None, :, None] & columns[:, None, None, :]


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device, for which the host does not wait where memory can be pinned."""
    is_cuda = torch.device(device).type == "cuda"
    return (values.pin_memory() if is_cuda else values).to(device, non_blocking=is_cuda)


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
            mask = None if whole else valid_mask(self.image_sizes, self.canvas, size, features.device)
            self._masks[key] = mask
        return self._masks[key]

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
