"""
The regions that both networks share: the box branch of Detectron2's ROI heads, and what a student samples.

Shapes: N images; R sampled regions of all images together; K classes, background last.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

__all__ = [
    "RegionHead",
    "RegionOutputs",
    "RegionTaps",
    "RegionTargets",
    "SampledRegions",
    "pool_regions",
    "to_device",
]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. For a GPU the copy is made from pinned memory, and the host does not wait."""
    is_cuda = device.type == "cuda"
    return (values.pin_memory() if is_cuda else values).to(device, non_blocking=is_cuda)


@dataclass
class RegionOutputs:
    """What one head predicts for R regions."""

    features: Tensor  # pooled, (R, C, P, P)
    logits: Tensor  # of the classes, (R, K + 1)
    deltas: Tensor  # box regression, (R, 4) or (R, 4 K)


@dataclass
class RegionTargets:
    """What the ground truth is for R regions."""

    classes: Tensor  # (R,), of the matched ground truth; K (background) where there is none
    foreground: Tensor  # bool (R,)
    boxes: Tensor  # (R, 4), the regions
    truth: Tensor  # (R, 4), the boxes of the matched ground truth; of background, the regions themselves
    transform: Box2BoxTransform  # the head's

    @functools.cached_property
    def deltas(self) -> Tensor:
        """(R, 4): from the regions to the matched ground truth, in the head's units of regression; 0 for background."""
        return self.transform.get_deltas(self.boxes, self.truth)

    def of_class(self, deltas: Tensor) -> Tensor:
        """The deltas of each region's class, (R, 4), from (R, 4) or (R, 4 K) predicted ones; 0 for background."""
        deltas = deltas.unflatten(1, (-1, 4))
        index = torch.where(self.foreground & (deltas.shape[1] > 1), self.classes, 0)
        chosen = deltas.gather(1, index[:, None, None].expand(-1, 1, 4))[:, 0]
        return torch.where(self.foreground[:, None], chosen, 0)


@dataclass
class SampledRegions:
    """The regions that one stage of a student's box head was run on."""

    boxes: List[Boxes]  # each image's
    outputs: RegionOutputs  # what the student predicts for them
    # Each image's, as the student labelled them (gt_classes, gt_boxes); None where its ROI heads do not return them.
    proposals: Optional[List[Instances]] = None


class RegionHead:
    """One interface to the box branch of Detectron2's ROI heads: C4, standard, and each stage of a cascade."""

    def __init__(self, roi_heads: nn.Module, *, side: str = "model"):
        """
        Raises:
            ValueError: ROI heads that are no subclass of one of these; ``side`` is the model in the message.
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
        head = roi_heads.res5 if is_c4 else roi_heads.box_head
        is_cascade = isinstance(roi_heads, CascadeROIHeads)
        self.predictors = list(roi_heads.box_predictor) if is_cascade else [roi_heads.box_predictor]
        self._heads = list(head) if is_cascade else [head]

    @property
    def num_stages(self) -> int:
        return len(self.predictors)

    @property
    def is_class_agnostic(self) -> bool:
        return all(predictor.bbox_pred.out_features == 4 for predictor in self.predictors)

    def delta_weights(self, stage: int) -> Tuple[float, ...]:
        """The four factors of its units of box regression."""
        return tuple(self.predictors[min(stage, self.num_stages - 1)].box2box_transform.weights)

    @torch.no_grad()
    def label(self, sampled: SampledRegions, truth: List[Instances], stage: int) -> RegionTargets:
        """
        The ground truth (``truth``: each image's) of regions that a stage of this head sampled, as it labelled them
        itself: read from its proposals, or matched again by its own matcher (later stages of a cascade, C4).
        """
        regions = torch.cat([boxes.tensor for boxes in sampled.boxes])
        if sampled.proposals is not None:
            classes = torch.cat([p.gt_classes for p in sampled.proposals])
            # Detectron2 gives the proposals of an image without ground truth no gt_boxes.
            matched = [p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in sampled.proposals]
            boxes = torch.cat([b.tensor for b in matched])
        else:
            classes, boxes = self._match(sampled.boxes, truth, stage)
        foreground = (classes >= 0) & (classes < self.num_classes)
        boxes = torch.where(foreground[:, None], boxes, regions)
        return RegionTargets(classes, foreground, regions, boxes, self.predictors[stage].box2box_transform)

    def _match(self, boxes: List[Boxes], truth: List[Instances], stage: int) -> Tuple[Tensor, Tensor]:
        """
        Classes (R,) and boxes (R, 4) of the ground truth that the regions are matched with: what the head's own matcher
        finds, of all images at once and with one copy to the device. Detectron2's waits several times an image.
        """
        regions = Boxes.cat(boxes)
        device, count = regions.device, len(regions)
        if not count or not any(map(len, truth)):
            return torch.full((count,), self.num_classes, device=device), regions.tensor
        is_cascade = isinstance(self.roi_heads, CascadeROIHeads)
        matcher = self.roi_heads.proposal_matchers[stage] if is_cascade else self.roi_heads.proposal_matcher
        objects = torch.cat(
            [
                torch.column_stack([t.gt_boxes.tensor, t.gt_classes, torch.full_like(t.gt_classes, image)])
                for image, t in enumerate(truth)
            ]
        )
        objects = objects if objects.device == device else to_device(objects, device)
        image_of_region = torch.cat([torch.full((len(b),), image, device=device) for image, b in enumerate(boxes)])
        overlap = pairwise_iou(Boxes(objects[:, :4]), regions) * (objects[:, 5:] == image_of_region)
        quality, matched = overlap.max(dim=0)
        foreground = torch.zeros_like(quality, dtype=torch.bool)
        for label, low, high in zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:]):
            if label == 1:
                foreground |= (low <= quality) & (quality < high)
        classes = torch.where(foreground, objects[:, 4].long()[matched], self.num_classes)
        return classes, objects[:, :4][matched]

    def __call__(self, features: Dict[str, Tensor], boxes: List[Boxes], stage: int) -> RegionOutputs:
        """
        Pool and classify each image's boxes, in the coordinates of the network's input, from the outputs of the
        backbone. Of a cascade with fewer stages, the last stage predicts for later ones.
        """
        stage = min(stage, self.num_stages - 1)
        maps = [features[name] for name in self._in_features]
        pooled = pool_regions(self.pooler, maps, boxes)
        hidden = self._heads[stage](pooled)
        if isinstance(self.roi_heads, Res5ROIHeads):
            hidden = hidden.mean(dim=[2, 3])
        logits, deltas = self.predictors[stage](hidden)
        return RegionOutputs(pooled, logits, deltas)


def pool_regions(pooler: nn.Module, maps: List[Tensor], boxes: List[Boxes]) -> Tensor:
    """What the pooler computes, (R, C, P, P); the host waits for the device once, ``ROIPooler`` at every level."""
    if type(pooler) is not ROIPooler:
        return pooler(maps, boxes)
    regions = torch.cat([F.pad(b.tensor, (1, 0), value=image) for image, b in enumerate(boxes)])
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], regions)
    levels = assign_boxes_to_levels(
        boxes, pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    )
    order = levels.argsort(stable=True)
    counts = F.one_hot(levels, len(maps)).sum(0).tolist()
    parts = regions[order].split(counts)
    pooled = torch.cat([level(x, part) for level, x, part in zip(pooler.level_poolers, maps, parts)])
    return pooled[order.argsort()]


class RegionTaps:
    """Records the regions that a student samples and what it predicts for them, in the forward of its own losses."""

    def __init__(self, head: RegionHead, branches: Sequence = ()):
        """``branches``: those of the student that are recorded too (kd_det.features.region_branches.RegionBranch)."""
        self.head = head
        self.branches = branches
        self._clear()

    def _clear(self):
        self._pooled: List[Tuple[List[Boxes], Tensor]] = []
        self._predictions: List[Tuple[Tensor, Tensor]] = []
        self._proposals: Optional[List[Instances]] = None
        self._branch_regions: Dict[str, list] = {branch.name: [] for branch in self.branches}

    @contextlib.contextmanager
    def recording(self):
        """A context in which regions are recorded; after an exception, nothing is."""
        self._clear()

        def read_proposals(module, args, output):
            if output[0] and all(p.has("gt_classes") for p in output[0]):
                self._proposals = output[0]

        head = self.head
        handles = [
            head.pooler.register_forward_hook(lambda _, args, output: self._pooled.append((args[1], output))),
            head.roi_heads.register_forward_hook(read_proposals),
            *(p.register_forward_hook(lambda _, args, out: self._predictions.append(out)) for p in head.predictors),
        ]
        try:
            with contextlib.ExitStack() as stack:
                for branch in self.branches:
                    stack.enter_context(branch.recording(self._branch_regions[branch.name].append))
                yield self
        except BaseException:
            self._clear()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def pop(self) -> List[SampledRegions]:
        """Each stage's regions. Reading empties; the branches' are read before."""
        stages = [
            SampledRegions(boxes, RegionOutputs(features, *predictions))
            for (boxes, features), predictions in zip(self._pooled, self._predictions)
        ]
        if stages and self._proposals and list(map(len, self._proposals)) == list(map(len, stages[0].boxes)):
            stages[0].proposals = self._proposals
        self._clear()
        if len(stages) != self.head.num_stages:
            raise RuntimeError(
                f"expected the student's box head to run {self.head.num_stages} times in a training step, "
                f"found {len(stages)}"
            )
        return stages

    def branch_regions(self) -> Dict[str, Any]:
        """The regions of each branch, by name."""
        for name, calls in self._branch_regions.items():
            if len(calls) != 1:
                raise RuntimeError(
                    f"expected the student's {name} head to run once in a training step, found {len(calls)} times"
                )
        return {name: calls[0] for name, calls in self._branch_regions.items()}
