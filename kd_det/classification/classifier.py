"""
Image classification as a Detectron2 meta-architecture.

Shapes: N images of a batch, K classes, C channels of the classified feature map.
"""

import contextlib
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from kd_det.errors import unknown_name
from kd_det.features.context import normalised_images, valid_mask
from kd_det.weights.convert import classifier_names
from kd_det.weights.strict import refuse_misshapen

__all__ = ["ImageClassifier"]


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A backbone, global average pooling of one of its maps, and a linear layer named ``linear``."""

    # What it reads of kd_det's config nodes, see kd_det.student.student_cfg.
    config_nodes = ("CLASSIFICATION",)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_feature: str = "res5",
        input_format: Optional[str] = None,
        label_smoothing: float = 0.0,
        input_size: int = 0,
    ):
        """
        Args:
            num_classes: K.
            pixel_mean, pixel_std: one number a channel, in the units of the images (0 to 255).
            in_feature: the backbone's output that is classified.
            input_format: channel order of the images, e.g. "RGB".
            label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).
            input_size: side to which the backbone's input is resized first; 0: as it comes.

        Raises:
            ValueError: the backbone has no such output, or a number out of range.
        """
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"ImageClassifier: num_classes must be at least 2, found {num_classes}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"ImageClassifier: label_smoothing must be in [0, 1), found {label_smoothing}.")
        self.backbone = backbone
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.input_format = input_format
        self.label_smoothing = label_smoothing
        self.linear = self._build_linear()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        if input_size:
            # In the backbone's call, so that its maps cover the images it is given also for those who run it alone.
            resize = {"size": (input_size, input_size), "mode": "bilinear", "antialias": True}
            self.backbone.register_forward_pre_hook(lambda _, args: (F.interpolate(args[0], **resize),))

    _build_backbone = staticmethod(build_backbone)

    def _build_linear(self) -> nn.Module:
        shapes = self.backbone.output_shape()
        if self.in_feature not in shapes:
            raise ValueError(
                unknown_name("output of the backbone in CLASSIFICATION.IN_FEATURE", self.in_feature, shapes)
                + " MODEL.RESNETS.OUT_FEATURES chooses a ResNet's."
            )
        linear = nn.Linear(shapes[self.in_feature].channels, self.num_classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        return linear

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        node = cfg.CLASSIFICATION
        return {
            "backbone": cls._build_backbone(cfg),
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "in_feature": node.IN_FEATURE,
            "input_format": cfg.INPUT.FORMAT,
            "label_smoothing": node.LABEL_SMOOTHING,
            "input_size": node.INPUT_SIZE,
        }

    @staticmethod
    def configure_teacher(teacher_cfg: CfgNode, name: str) -> None:
        """How a network of another library teaches a classifier: whole, with its logits."""
        from kd_det.classification.networks import configure_network

        configure_network(teacher_cfg, name)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: List[Dict]):
        """
        From dicts with ``image``, (3, H, W) in 0..255, and for training ``label``, a class index or a distribution
        (K,), to ``{"loss_cls": scalar}`` in training, in eval to a dict an image with ``scores``, (K,), which sum to 1.
        """
        if self.training:
            return self.task_losses(batched_inputs)
        if not batched_inputs:
            return []
        return [{"scores": scores} for scores in self.logits(batched_inputs).softmax(dim=1)]

    def task_losses(self, batched_inputs: List[Dict]) -> Dict[str, Tensor]:
        """
        The losses of training, also in eval mode, and differentiable twice. Without autocast where the images want
        gradients.
        """
        targets = self._targets(batched_inputs)
        # Gradients at the pixels, per grey value, lie below float16's range.
        full_precision = any(x["image"].requires_grad for x in batched_inputs)
        with torch.autocast(self.device.type, enabled=False) if full_precision else contextlib.nullcontext():
            logits = self.logits(batched_inputs)
            return {"loss_cls": F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)}

    def logits(self, batched_inputs: List[Dict]) -> Tensor:
        """(N, K)."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)[self.in_feature]
        return self.linear(self._pool(features, images))

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

    def _targets(self, batched_inputs: List[Dict]) -> Tensor:
        labels = [x["label"] for x in batched_inputs]
        if isinstance(labels[0], Tensor) and labels[0].dim() == 1:
            return torch.stack(labels).to(self.device)
        for x in batched_inputs:
            if not 0 <= x["label"] < self.num_classes:
                raise ValueError(
                    f"The label of {x.get('file_name', 'an image')} is {x['label']}; expected 0.."
                    f"{self.num_classes - 1} (CLASSIFICATION.NUM_CLASSES is {self.num_classes})."
                )
        return torch.tensor(labels, device=self.device)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Takes torchvision's names of a ResNet too, and the names that Detectron2's files give the head."""
        renamed = classifier_names([key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)])
        for old, new in renamed.items():
            state_dict[prefix + new] = state_dict.pop(prefix + old)
        own = self.state_dict()
        classes = state_dict.get(f"{prefix}linear.weight", own["linear.weight"]).shape[0]
        refuse_misshapen(
            ((new, state_dict[prefix + new].shape, own[new].shape) for new in renamed.values() if new in own),
            hint=f"; they classify {classes} classes, not {self.num_classes}" if classes != self.num_classes else "",
        )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
