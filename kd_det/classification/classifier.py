"""
Image classification as a Detectron2 meta-architecture.

Shapes: N images of a batch, K classes.
"""

import contextlib
from typing import Dict, List

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from kd_det.classification.backbone_only import BackboneOnly
from kd_det.weights.convert import classifier_names
from kd_det.weights.strict import refuse_misshapen

__all__ = ["ImageClassifier"]


@META_ARCH_REGISTRY.register()
class ImageClassifier(BackboneOnly):
    """A backbone, global average pooling of one of its maps, and a linear layer named ``linear``."""

    needs_labels = True

    @configurable
    def __init__(self, *, num_classes: int, label_smoothing: float = 0.0, **kwargs):
        """
        Args:
            num_classes: K.
            label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).
            kwargs: see :class:`BackboneOnly`.

        Raises:
            ValueError: the backbone has no such output, or a number out of range.
        """
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"ImageClassifier: num_classes must be at least 2, found {num_classes}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"ImageClassifier: label_smoothing must be in [0, 1), found {label_smoothing}.")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.linear = self._build_linear()

    def _build_linear(self) -> nn.Module:
        linear = nn.Linear(self.in_channels, self.num_classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        return linear

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        node = cfg.CLASSIFICATION
        own = {"num_classes": node.NUM_CLASSES, "label_smoothing": node.LABEL_SMOOTHING}
        return {**super().from_config(cfg), **own}

    @staticmethod
    def configure_teacher(teacher_cfg: CfgNode, name: str) -> None:
        """How a network of another library teaches a classifier: whole, with its logits."""
        from kd_det.classification.networks import configure_network

        configure_network(teacher_cfg, name)

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
        return self.linear(self.pooled(batched_inputs))

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
