"""
What a loss may know of a training step besides the maps, and which positions of a map hold image.

Shapes: N images; R sampled regions of all images together.
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from kd_det.features.position_weights import pad_boxes, position_weights
from kd_det.features.region_branches import BranchRegions, RegionBranch
from kd_det.features.regions import RegionHead, RegionOutputs, RegionTargets, SampledRegions, to_device

__all__ = ["StepContext", "normalised_images", "to_device", "valid_mask", "valid_sizes"]


def valid_sizes(
    image_sizes: List[Tuple[int, int]], canvas: Tuple[int, int], size: Tuple[int, int]
) -> List[Tuple[int, int]]:
    """
    How many rows and columns of a feature map of this size hold image, for each image, when images are padded at the
    right and bottom to the canvas (heights and widths in pixels): where any pixel of a cell lies inside the image.
    """
    # ceil(image * map / canvas), in integers
    return [tuple(-(-side * m // c) for side, m, c in zip(image, size, canvas)) for image in image_sizes]


def valid_mask(
    image_sizes: Union[Tensor, List[Tuple[int, int]]], canvas: Tuple[int, int], size: Tuple[int, int]
) -> Tensor:
    """
    Which positions of a feature map hold image, bool (N, 1, H, W), see :func:`valid_sizes`. Image sizes are numbers, or
    a tensor (N, 2) on the device of the map.
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


def normalised_images(model: nn.Module, batched_inputs: List[Dict]) -> ImageList:
    """
    The images as a model with ``pixel_mean``, ``pixel_std`` and a ``backbone`` reads them: normalised, padded and
    batched, with gradients to them (v0.6's ``ImageList.from_tensors`` has none).
    """
    mean, std, multiple = model.pixel_mean, model.pixel_std, max(model.backbone.size_divisibility, 1)
    images = [(x["image"].to(mean.device) - mean) / std for x in batched_inputs]
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes))
    padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes)]
    return ImageList(torch.stack(padded), sizes)


@dataclass(eq=False)
class StepContext:
    """
    What a loss may know of a training step besides the maps: image sizes, valid positions, ground truth, and the
    regions that both networks share. One object a step, shared by all losses.
    """

    image_sizes: List[Tuple[int, int]]  # each image's height and width
    canvas: Tuple[int, int]  # height and width of the padded batch
    _: KW_ONLY
    batched_inputs: Optional[List[Dict]] = None  # the student's
    task_losses: Optional[Dict[str, Tensor]] = None  # the student's own losses, with their graph
    teacher: Any = None  # the kd_det.teachers.Teacher
    teacher_outputs: Optional[Dict[str, Tensor]] = None  # of the teacher's backbone
    student_head: Optional[RegionHead] = None  # the student's box branch
    sampled: Optional[List[SampledRegions]] = None  # the student's, one entry a stage, see RegionTaps.pop
    branch_regions: Dict[str, BranchRegions] = field(default_factory=dict)  # of its mask and keypoint heads
    _sizes: Dict[torch.device, Tensor] = field(default_factory=dict, init=False)
    _masks: Dict[Tuple, Optional[Tensor]] = field(default_factory=dict, init=False)
    _boxes: Dict[Tuple, Tensor] = field(default_factory=dict, init=False)
    _weights: Dict[Tuple, Tensor] = field(default_factory=dict, init=False)
    _targets: Dict[int, RegionTargets] = field(default_factory=dict, init=False)
    _pairs: Optional[List[Tuple[RegionOutputs, RegionOutputs]]] = field(default=None, init=False)

    def valid_sizes(self, features: Tensor) -> List[Tuple[int, int]]:
        """How many rows and columns of a map (..., H, W) hold image, for each image; known on the host."""
        return valid_sizes(self.image_sizes, self.canvas, tuple(features.shape[-2:]))

    def valid(self, features: Tensor) -> Optional[Tensor]:
        """The mask of a map's positions that hold image, bool (N, 1, H, W), or None where all of them do."""
        size, device = tuple(features.shape[-2:]), features.device
        if (size, device) not in self._masks:
            if device not in self._sizes:
                self._sizes[device] = to_device(torch.tensor(self.image_sizes), device)
            whole = all(limits == size for limits in self.valid_sizes(features))
            self._masks[size, device] = None if whole else valid_mask(self._sizes[device], self.canvas, size)
        return self._masks[size, device]

    def position_weights(self, features: Tensor, regions: str, foreground_share: float) -> Tensor:
        """
        How much each position of a map counts, float (N, 1, H, W), see
        :func:`kd_det.features.position_weights.position_weights`: by the ground truth's boxes or, for "proposals", the
        regions that the student sampled, in a cascade those of its first stage. Boxes are copied to the device once a
        step, and maps of one size share their weights.
        """
        size, device = tuple(features.shape[-2:]), features.device
        of_student, key = regions == "proposals", (regions, foreground_share, size, device)
        if key not in self._weights:
            if (of_student, device) not in self._boxes:
                if of_student and self.sampled is None:
                    raise RuntimeError("proposals were not recorded: the loss must declare needs_proposals = True")
                boxes = self.sampled[0].boxes if of_student else [x.gt_boxes for x in self.ground_truth()]
                self._boxes[of_student, device] = pad_boxes([b.tensor for b in boxes], device)
            self._weights[key] = position_weights(
                regions,
                self._boxes[of_student, device],
                self.canvas,
                size,
                valid=self.valid(features),
                foreground_share=foreground_share,
            )
        return self._weights[key]

    def region_pairs(self) -> List[Tuple[RegionOutputs, RegionOutputs]]:
        """
        For each stage of the student's box head (one, unless a cascade): what the student predicts for its sampled
        regions, with its graph, and what the teacher predicts for the same regions. The teacher runs once a step.

        Of a cascade, the teacher's stages are the student's, but for the student's last one: its teacher is the last
        stage, the strongest, and so it is for a student of one stage. It sees the student's regions as they are, not as
        its own earlier stages would refine them.
        """
        if self.sampled is None:
            raise RuntimeError("regions were not recorded: the loss must declare needs_regions = True")
        if self._pairs is None:
            with torch.no_grad():
                taught = [
                    self.teacher.head(self.teacher_outputs, regions.boxes, self._teacher_stage(stage))
                    for stage, regions in enumerate(self.sampled)
                ]
            self._pairs = [(regions.outputs, theirs) for regions, theirs in zip(self.sampled, taught)]
        return self._pairs

    def _teacher_stage(self, stage: int) -> int:
        last = self.teacher.head.num_stages - 1
        return last if stage == len(self.sampled) - 1 else min(stage, last)

    def branch_pair(self, name: str) -> Tuple[BranchRegions, Tensor]:
        """
        The regions that the student's "mask" or "keypoint" head was trained on in this step, with what it predicted,
        and what the teacher's head predicts for them, pooled from its own features: (R, C, S, S).
        """
        if name not in self.branch_regions:
            raise RuntimeError(f"the {name} head was not recorded: the loss must declare branch = {name!r}")
        regions = self.branch_regions[name]
        with torch.no_grad():
            branch = RegionBranch(self.teacher.model.roi_heads, name, side="teacher")
            return regions, branch(self.teacher_outputs, regions.boxes)

    def first_regions(self, stage: int, most: int) -> Tensor:
        """Which of the regions in ``region_pairs()[stage]`` are among the first ``most`` of their image: an index."""
        offset, first = 0, []
        for boxes in self.sampled[stage].boxes:
            first.append(torch.arange(offset, offset + min(most, len(boxes)), device=boxes.device))
            offset += len(boxes)
        return torch.cat(first)

    def ground_truth(self) -> List[Instances]:
        """Each image's ground truth, on the device of the batch; a ``ValueError`` if it has none."""
        if not self.batched_inputs or not all("instances" in x for x in self.batched_inputs):
            raise ValueError("This loss needs ground truth: the batch has no 'instances'.")
        return [x["instances"] for x in self.batched_inputs]

    def region_targets(self, stage: int) -> RegionTargets:
        """The ground truth of the regions in ``region_pairs()[stage]``, as the student matched them."""
        if stage not in self._targets:
            self._targets[stage] = self.student_head.label(self.sampled[stage], self.ground_truth(), stage)
        return self._targets[stage]

    def teacher_units(self, stage: int) -> List[float]:
        """Four factors from the teacher's units of box regression (BBOX_REG_WEIGHTS) to the student's."""
        student = self.student_head.delta_weights(stage)
        teacher = self.teacher.head.delta_weights(self._teacher_stage(stage))
        return [s / t for s, t in zip(student, teacher)]
