"""
A backbone alone as a Detectron2 meta-architecture, for pretraining without labels.

Shapes: N images of a batch, C channels of the pooled feature map.
"""

from typing import Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from kd_det.errors import unknown_name
from kd_det.features.context import normalised_images, valid_mask

__all__ = ["BackboneOnly"]


@META_ARCH_REGISTRY.register()
class BackboneOnly(nn.Module):
    """
    A backbone and global average pooling of one of its maps. It has no head and no losses: what it learns are a
    teacher's maps, from images without labels.
    """

    # What it reads of kd_det's config nodes, see kd_det.student.student_cfg.
    config_nodes = ("CLASSIFICATION",)
    # Whether it trains on data sets with labels, and is evaluated by its own predictions.
    needs_labels = False

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_feature: str = "res5",
        input_format: Optional[str] = None,
        input_size: int = 0,
    ):
        """
        Args:
            pixel_mean, pixel_std: one number a channel, in the units of the images (0 to 255).
            in_feature: the backbone's output that is pooled.
            input_format: channel order of the images, e.g. "RGB".
            input_size: side to which the backbone's input is resized first; 0: as it comes.

        Raises:
            ValueError: the backbone has no such output.
        """
        super().__init__()
        self.backbone = backbone
        self.in_feature = in_feature
        self.in_channels = self._pooled_channels()
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        if input_size:
            # In the backbone's call, so that its maps cover the images it is given also for those who run it alone.
            resize = {"size": (input_size, input_size), "mode": "bilinear", "antialias": True}
            self.backbone.register_forward_pre_hook(lambda _, args: (F.interpolate(args[0], **resize),))

    _build_backbone = staticmethod(build_backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        node = cfg.CLASSIFICATION
        return {
            "backbone": cls._build_backbone(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "in_feature": node.IN_FEATURE,
            "input_format": cfg.INPUT.FORMAT,
            "input_size": node.INPUT_SIZE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def _pooled_channels(self) -> int:
        shapes = self.backbone.output_shape()
        if self.in_feature not in shapes:
            raise ValueError(
                unknown_name("output of the backbone in CLASSIFICATION.IN_FEATURE", self.in_feature, shapes)
                + " MODEL.RESNETS.OUT_FEATURES chooses a ResNet's."
            )
        return shapes[self.in_feature].channels

    def forward(self, batched_inputs: List[Dict]):
        """
        From dicts with ``image``, (3, H, W) in 0..255: in training an empty dict of losses, once the backbone has run
        for the losses that read it; in eval a dict an image with ``features``, (C,).
        """
        if self.training:
            self.backbone(self.preprocess_image(batched_inputs).tensor)
            return {}
        return [{"features": x} for x in self.pooled(batched_inputs)] if batched_inputs else []

    def pooled(self, batched_inputs: List[Dict]) -> Tensor:
        """(N, C)."""
        images = self.preprocess_image(batched_inputs)
        return self._pool(self.backbone(images.tensor)[self.in_feature], images)

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        return normalised_images(self, batched_inputs)

    @staticmethod
    def _pool(features: Tensor, images: ImageList) -> Tensor:
        """(N, C): the mean over the positions that hold image."""
        valid = valid_mask(images.image_sizes, tuple(images.tensor.shape[-2:]), tuple(features.shape[-2:]))
        if valid.all():
            return features.mean(dim=(2, 3))
        valid = valid.to(features)
        return (features * valid).sum(dim=(2, 3)) / valid.sum(dim=(2, 3))
