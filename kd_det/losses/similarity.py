"""SP, similarity-preserving knowledge distillation: arXiv 1907.09682."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils import comm
from torch import Tensor

from kd_det.losses._products import SelfProduct
from kd_det.losses._ranks import gather_samples
from kd_det.losses._spatial import full_precision, to_float, unit_rows, within_range, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, DistillationLoss

__all__ = ["SimilarityLoss", "similarity_preserving_loss"]


@full_precision
def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """
    ``|G_T - G_S|_F^2 / b^2`` where ``G = Q Q^T``, its rows divided by their L2 norm, and Q holds one sample a row
    (equations 2 to 4).

    Args:
        student: (b, ...): b samples, such as the features of b regions or of b images.
        teacher: (b, ...), of any trailing shape; is detached.

    Returns:
        A scalar; 0 for no sample, and identically 0 for one. A sample that is all zeros has similarity 0 to all and
        gets zero gradient.

    Raises:
        ValueError: different numbers of samples, or types or devices that do not fit.
    """
    student, teacher = to_float("similarity_preserving_loss", student, teacher)
    if student.dim() == 0 or teacher.dim() == 0 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"similarity_preserving_loss: the first axis of both must hold the same samples, found shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if student.numel() == 0 or teacher.numel() == 0:
        return zero_loss(student)
    return (_similarity(teacher) - _similarity(student)).square().sum() / student.shape[0] ** 2


def _similarity(samples: Tensor) -> Tensor:
    """(b, b): the Gram of the samples, its rows divided by their L2 norm; 0 with a sample that is all zeros."""
    samples = samples.reshape(1, len(samples), -1)
    # One factor common to all samples does not change the similarities.
    gram, _ = within_range(SelfProduct.apply, lambda gram: gram.diagonal(dim1=1, dim2=2).amax(), (0, 1, 2), samples)
    alive = gram.detach().diagonal(dim1=1, dim2=2) > 0
    return unit_rows(gram * (alive[:, None] & alive[:, :, None]))


@DISTILLATION_LOSS_REGISTRY.register()
class SimilarityLoss(DistillationLoss):
    """
    :func:`similarity_preserving_loss` where a batch has enough samples for it: over the regions that the student
    samples (hundreds an image), or over the images. Samples are those of all ranks; gradients flow to the local ones.

    Every sample is compared with every other, so the cost of regions would grow with the square of the images. Only the
    first regions of each image are samples, ``max_regions`` in all. Detectron2 lists an image's
    foreground first, in random order.
    """

    name = "similarity"

    @configurable
    def __init__(self, *, samples: str = "regions", max_regions: int = 512, grid: int = 8, **kwargs):
        """
        Args:
            samples: "regions": the pooled features of the sampled regions, from both networks; taps are not read.
                "images": the maps at the taps.
            max_regions: with "regions", how many are samples, of all images of all ranks; at least one of each image.
            grid: with "images", every image's valid part is average-pooled to (grid, grid), so that images of
                different sizes compare and padding does not count.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        if samples not in ("regions", "images"):
            raise ValueError(f"SimilarityLoss: samples must be 'regions' or 'images', found {samples!r}.")
        if max_regions < 2:
            raise ValueError(f"SimilarityLoss: max_regions must be at least 2, found {max_regions}.")
        if grid < 1:
            raise ValueError(f"SimilarityLoss: grid must be at least 1, found {grid}.")
        if samples == "images" and not self.student_taps:
            raise ValueError("SimilarityLoss over images needs taps: KD.SIMILARITY.STUDENT_TAPS is empty.")
        self.needs_regions = samples == "regions"
        if self.needs_regions:
            self.student_taps = self.teacher_taps = ()
        self.max_regions = max_regions
        self.grid = grid

    @classmethod
    def from_config(cls, cfg, student, teacher):
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD.SIMILARITY
        if node.SAMPLES == "images" and cfg.SOLVER.IMS_PER_BATCH < 2:
            raise ValueError(
                f"SimilarityLoss compares the images of a batch with each other: SOLVER.IMS_PER_BATCH must be at least "
                f"2, found {cfg.SOLVER.IMS_PER_BATCH}; or set KD.SIMILARITY.SAMPLES 'regions'."
            )
        return {**ret, "samples": node.SAMPLES, "max_regions": node.MAX_REGIONS, "grid": node.GRID}

    def forward(self, student, teacher, context):
        if self.needs_regions:
            images = len(context.image_sizes) * comm.get_world_size()
            samples = []
            for stage, outputs in enumerate(context.region_pairs()):
                first = context.first_regions(stage, max(1, self.max_regions // images))
                samples += [output.features[first] for output in outputs]
        else:
            pairs = self.pairs(student, teacher, context)
            samples = [self._to_grid(x, context) for s, t, _ in pairs for x in (s, t)]
        samples = gather_samples(*samples)
        if not self.needs_regions and len(samples[0]) < 2:
            raise ValueError("SimilarityLoss over images needs at least 2 images in the global batch, found 1.")
        total = sum(similarity_preserving_loss(s, t) for s, t in zip(samples[::2], samples[1::2]))
        return total * 2 / len(samples) if self.needs_regions else total

    def _to_grid(self, features: Tensor, context) -> Tensor:
        if features.dim() != 4:
            return features
        sizes = context.valid_sizes(features)
        if all(size == tuple(features.shape[2:]) for size in sizes):
            return F.adaptive_avg_pool2d(features, self.grid)
        return torch.stack([F.adaptive_avg_pool2d(x[:, :h, :w], self.grid) for x, (h, w) in zip(features, sizes)])
