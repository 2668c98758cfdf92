"""
Teachers of other libraries: any network that maps images to feature maps can teach a detector.

By config, ``KD.TEACHER.CONFIG_FILE: "torchvision://resnet50"`` or ``"timm://convnext_tiny"``, with the library's own
weights or a file of them; in Python, :class:`FeatureTeacher` around any network, or
:func:`torchvision_teacher`.
"""

import contextlib
import math
from typing import Dict, List, Mapping, Optional, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from kd_det.backbones.timm_backbone import flat_key, timm_feature_network, timm_options
from kd_det.features.context import normalised_images
from kd_det.random_state import preserved_random_state
from kd_det.student import student_class
from kd_det.teachers.networks import default_weights, expected_images, read_default_weights
from kd_det.teachers.sources import TeacherSource, register_teacher_source
from kd_det.weights.backbone_file import IMAGENET_METADATA
from kd_det.weights.strict import refuse_misshapen

__all__ = ["FeatureTeacher", "LibraryTeacher", "torchvision_teacher"]

# A multiple of 14, 16 and 64, the strides of all common networks.
_PROBE_SIDE = 448


class _Features(Backbone):
    """A network's maps under their own names, and under ``p<k>`` and ``res<k>`` where their stride is nearest 2^k."""

    def __init__(self, network: nn.Module, channels_last: bool, stage_modules: Dict[str, nn.Module], input_size: int):
        super().__init__()
        self.network = network
        self._channels_last = channels_last
        self._input_size = input_size
        # By name, so that a deep copy finds its own modules.
        names = {module: name for name, module in network.named_modules()}
        self._stage_names = {level: names[module] for level, module in stage_modules.items()}
        shapes = self._probe()
        outputs = [name for name in shapes if name not in stage_modules]
        self._levels: Dict[str, str] = {}
        for name in outputs:
            level = round(math.log2(shapes[name].stride))
            # The last of several maps with one stride.
            self._levels |= {alias: name for alias in (f"p{level}", f"res{level}") if alias not in shapes}
        shapes |= {alias: shapes[name] for alias, name in self._levels.items()}
        self._out_features = [*outputs, *self._levels]
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        strides = [shapes[name].stride for name in outputs]
        # Coarser maps are pooled from those of stride 32, and need no more padding.
        self._size_divisibility = 0 if input_size else max([s for s in strides if s <= 32], default=max(strides))

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def stage_modules(self) -> Dict[str, nn.Module]:
        """Levels inside the network, for taps."""
        return {level: self.network.get_submodule(name) for level, name in self._stage_names.items()}

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        if self._input_size:
            x = F.interpolate(x, size=(self._input_size,) * 2, mode="bilinear", antialias=True)
        maps = self._maps(x)
        return {**maps, **{alias: maps[name] for alias, name in self._levels.items()}}

    def _maps(self, x: Tensor) -> Dict[str, Tensor]:
        maps = self.network(x)
        if not isinstance(maps, dict):
            maps = {str(i): m for i, m in enumerate([maps] if isinstance(maps, Tensor) else maps)}
        for name, value in maps.items():
            if not isinstance(value, Tensor) or value.dim() != 4:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"The teacher's network must give maps (N, C, H, W); its output {name!r} is {found}.")
        if self._channels_last:
            maps = {name: value.permute(0, 3, 1, 2) for name, value in maps.items()}
        return maps

    @torch.no_grad()
    def _probe(self) -> Dict[str, ShapeSpec]:
        """Channels and strides, from one image of zeros."""
        seen: Dict[str, Tensor] = {}
        parameter = next(self.network.parameters())
        side = self._input_size or _PROBE_SIDE
        image = torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype)
        self.network.eval()
        try:
            with contextlib.ExitStack() as stack:
                for level, module in self.stage_modules.items():
                    hook = module.register_forward_hook(lambda _, args, y, level=level: seen.setdefault(level, y))
                    stack.enter_context(hook)
                stack.enter_context(preserved_random_state())
                maps = self._maps(image)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(
                f"The teacher's network must run on images of any size; on {side} x {side} it fails: {e} (A ViT of "
                f"timm needs MODEL.TIMM.OPTS ['dynamic_img_size', True] in KD.TEACHER.OPTS; or its own side there as "
                f"CLASSIFICATION.INPUT_SIZE, to which images are then resized.)"
            ) from e
        return {
            name: ShapeSpec(channels=value.shape[1], stride=round(side / value.shape[2]))
            for name, value in {**maps, **seen}.items()
        }


@META_ARCH_REGISTRY.register()
class FeatureTeacher(nn.Module):
    """
    A frozen network that only gives feature maps, with a normalisation of its own.

    Its taps are the network's own names ("0", "body"), ``p<k>`` and ``res<k>`` for the map whose stride is nearest 2^k,
    levels inside it (``res4.pre_activation`` of a ResNet), and any dotted module name. Losses with equal or free
    channel counts work at once, the others through their connectors. It has no box head, so losses that compare what
    both networks predict for regions refuse it.
    """

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        pixel_mean: Sequence[float] = IMAGENET_METADATA["pixel_mean"],
        pixel_std: Sequence[float] = IMAGENET_METADATA["pixel_std"],
        input_format: str = "RGB",
        channels_last: bool = False,
        stage_modules: Optional[Dict[str, nn.Module]] = None,
        input_size: int = 0,
    ):
        """
        Args:
            network: maps normalised images (N, 3, H, W) to one map, a sequence or a dict of maps (N, C, h, w).
            pixel_mean, pixel_std: of raw images, values 0 to 255, in the order of ``input_format``.
            input_format: channel order that the network wants.
            channels_last: the maps are (N, h, w, C).
            stage_modules: modules inside the network whose outputs (N, C, h, w) are levels, e.g. {"res4": body.layer3}.
            input_size: side to which a batch is resized first, for a network of one size; 0: as it comes.

        Raises:
            ValueError: the network cannot run on images of any size, or gives something else than maps.
        """
        super().__init__()
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.backbone = _Features(network, channels_last, stage_modules or {}, input_size)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        library, _, name = cfg.KD.TEACHER.CONFIG_FILE.partition("://")
        ret = _from_torchvision(name, cfg) if library == "torchvision" else _from_timm(name, cfg)
        return {**ret, "input_size": cfg.CLASSIFICATION.INPUT_SIZE}

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """Normalise and pad raw images (3, H, W), given in the order ``input_format``."""
        return normalised_images(self, batched_inputs)

    def forward(self, batched_inputs: List[Dict]) -> Dict[str, Tensor]:
        return self.backbone(self.preprocess_image(batched_inputs).tensor)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Takes the names of the network's own library too, and leaves its heads behind."""
        own = {flat_key(_inner(key)): (key, value.shape) for key, value in self.state_dict().items()}
        shapes = []
        for key in [k for k in state_dict if k.startswith(prefix)]:
            value = state_dict.pop(key)
            name, expected = own.get(flat_key(_inner(key.removeprefix(prefix))), (None, None))
            if name is not None:
                state_dict[prefix + name] = value
                shapes.append((key, value.shape, expected))
        refuse_misshapen(shapes)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def torchvision_teacher(detector: nn.Module) -> FeatureTeacher:
    """
    The features of a trained detector of ``torchvision.models.detection`` as a teacher, ``p2``, ``p3``, ... by stride,
    and ``res2`` to ``res5`` where its backbone is a ResNet. Its own resizing is left out: the student's images are
    taken as they are.
    """
    return FeatureTeacher(**_of_torchvision_detector(detector))


@register_teacher_source("timm")
class LibraryTeacher(TeacherSource):
    """
    A network of torchvision or timm by its name: the features of a detector, of any network of timm, or of a classifier
    of torchvision that has maps before its head. A student that is a classifier takes a classifier whole.
    """

    def configure(self, cfg: CfgNode, student: CfgNode) -> None:
        whole = getattr(student_class(student), "configure_teacher", None)
        if whole is not None:
            whole(cfg, self.name)
        else:
            cfg.MODEL.META_ARCHITECTURE = FeatureTeacher.__name__
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = 90  # of torchvision's COCO weights, with gaps; the head is left out
            cfg.INPUT.FORMAT = "RGB"
        cfg.MODEL.WEIGHTS = default_weights(self.name)

    def read_weights(self, cfg: CfgNode) -> Optional[Mapping[str, Tensor]]:
        if cfg.MODEL.WEIGHTS != default_weights(self.name):
            return None
        options = timm_options(cfg)
        options.pop("out_indices", None)  # the weights are the whole network's
        return read_default_weights(cfg.MODEL.WEIGHTS, **options)


def _inner(key: str) -> str:
    return key.removeprefix("backbone.").removeprefix("network.")


def _resnet_stages(network: Optional[nn.Module]) -> Dict[str, nn.Module]:
    return {f"res{i + 1}": getattr(network, f"layer{i}") for i in range(1, 5) if hasattr(network, f"layer{i}")}


def _of_torchvision_detector(detector: nn.Module) -> Dict:
    return {
        "network": detector.backbone,
        "pixel_mean": [255 * x for x in detector.transform.image_mean],
        "pixel_std": [255 * x for x in detector.transform.image_std],
        "stage_modules": _resnet_stages(getattr(detector.backbone, "body", None)),
    }


def _from_torchvision(name: str, cfg: CfgNode) -> Dict:
    from torchvision import models
    from torchvision.models._utils import IntermediateLayerGetter

    architecture = name.partition(".")[0]
    if architecture in models.list_models(module=models.detection):
        options = {"weights": None, "weights_backbone": None, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1}
        return _of_torchvision_detector(models.get_model(architecture, **options))
    mean, std, _ = expected_images("torchvision", name)
    network = models.get_model(architecture, weights=None)
    stages = _resnet_stages(network)
    # The stages of a ResNet; of other networks, the part in front of the classifier.
    parts = [f"layer{i}" for i in range(1, 5)] if len(stages) == 4 else ["features", "trunk_output", "conv5"]
    parts = [part for part in parts if hasattr(network, part)]
    if not parts:
        raise ValueError(
            f"torchvision's {architecture!r} has no layer1 to layer4, features or trunk_output to read. Take it from "
            f"timm ('timm://...'), or wrap it: kd_det.teachers.feature_teacher.FeatureTeacher(network=...)."
        )
    body = IntermediateLayerGetter(network, {part: part for part in parts})
    ret = {"network": body, "pixel_mean": mean, "pixel_std": std, "stage_modules": stages}
    return {**ret, "channels_last": isinstance(network, models.SwinTransformer)}


def _from_timm(name: str, cfg: CfgNode) -> Dict:
    network = timm_feature_network(name, timm_options(cfg))
    mean, std, _ = expected_images("timm", name)
    return {
        "network": network,
        "pixel_mean": mean,
        "pixel_std": std,
        "channels_last": getattr(network, "output_fmt", None) == "NHWC",
        "stage_modules": _resnet_stages(network),
    }
