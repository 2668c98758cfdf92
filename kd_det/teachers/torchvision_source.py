"""``torchvision://NAME`` as a teacher: a detector whole, another network by its features."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torchvision import models

from kd_det.errors import one_line
from kd_det.random_state import preserved_random_state
from kd_det.teachers.build import NUM_CLASSES
from kd_det.teachers.feature_teacher import FeatureTeacher, LibraryTeacher
from kd_det.teachers.networks import default_weights
from kd_det.teachers.sources import register_teacher_source
from kd_det.teachers.torchvision_detectors import configure_torchvision_detector, why_not_convertible
from kd_det.weights.strict import load_strictly
from kd_det.weights.torchvision_detectors import COCO_LABELS, copy_detector_weights

# torchvision gives the norms of these published detectors, and of no others, an eps of 0 instead of 1e-5.
_WITHOUT_EPS = [f"{name}_resnet50_fpn.COCO_V1" for name in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")]


@register_teacher_source("torchvision")
class TorchvisionTeacher(LibraryTeacher):
    """
    A network of torchvision by its name. A detector becomes one of Detectron2 if that has a counterpart, with weights
    of torchvision's own or of a file, both by torchvision's names; other networks are as in :class:`LibraryTeacher`.
    """

    def configure(self, cfg: CfgNode, student: CfgNode) -> None:
        super().configure(cfg, student)
        is_detector = self._architecture in models.list_models(module=models.detection)
        if cfg.MODEL.META_ARCHITECTURE != FeatureTeacher.__name__ or not is_detector:
            return
        with torch.device("meta"):
            detector = self._network()
        problem = why_not_convertible(detector)
        if problem is None:
            configure_torchvision_detector(cfg, detector)
        else:
            log_first_n(logging.INFO, f"{self.name} teaches by its features alone: {problem}.", name=__name__)

    def read_weights(self, cfg: CfgNode) -> Mapping[str, Tensor] | None:
        own = super().read_weights(cfg)
        node = NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE)
        if node is None:
            return own
        num_classes = cfg.MODEL[node].NUM_CLASSES
        with preserved_random_state():
            detector = self._network(num_classes=COCO_LABELS if num_classes == 80 else num_classes + 1)
            converted = self.build(cfg)
        try:
            load_strictly(detector, cfg.MODEL.WEIGHTS, who=f"teacher {self.name!r}", read=own)
        except RuntimeError as e:  # torchvision's modules rename older weights while they load, and then compare shapes
            message = f"The weights {cfg.MODEL.WEIGHTS!r} do not fit the teacher {self.name!r}: {one_line(e)[:300]}"
            raise ValueError(message) from None
        if self._has_no_eps(cfg.MODEL.WEIGHTS):
            for module in detector.backbone.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0
        copy_detector_weights(detector, converted)
        return converted.state_dict()

    @property
    def _architecture(self) -> str:
        return self.path.partition(".")[0]

    def _network(self, **options) -> nn.Module:
        return models.get_model(self._architecture, weights=None, weights_backbone=None, **options)

    def _has_no_eps(self, weights: str) -> bool:
        """Whether these are such weights, also as a file that was downloaded by hand."""
        published = default_weights(self.name)
        variant = published.rpartition("/")[2]
        if variant not in _WITHOUT_EPS:
            return False
        url = models.get_model_weights(self._architecture)[variant.partition(".")[2]].url
        return weights == published or Path(weights).name == Path(url).name
