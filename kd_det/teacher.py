"""The teacher: built from its own config, checked to the last weight, frozen, and run only as deep as it is read."""

import logging
import os
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from kd_det.adapters import configure_feature_teacher
from kd_det.checkpoint import load_strictly
from kd_det.classification.classifier import is_classifier
from kd_det.classification.networks import NETWORK_SOURCES, configure_network
from kd_det.compat import model_zoo
from kd_det.config import add_kd_config
from kd_det.config_file import add_missing_keys, merge_config_file, merge_options
from kd_det.errors import unknown_name
from kd_det.taps import Taps

__all__ = ["Teacher", "build_teacher", "get_teacher_cfg"]

logger = logging.getLogger(__name__)


def get_teacher_cfg(cfg: CfgNode) -> CfgNode:
    """
    The teacher's own config: ``KD.TEACHER.CONFIG_FILE`` (a file, a model-zoo name, or the name of a network of
    torchvision or timm), its weights, its options, on the student's device. Keys that neither Detectron2 nor kd_det
    has (a project's own) start from the student's values.

    Raises:
        ValueError: no config, an unknown file or zoo name (says the nearest), or no weights.
    """
    name = cfg.KD.TEACHER.CONFIG_FILE
    if not name:
        raise ValueError(
            "KD.TEACHER.CONFIG_FILE is empty: distillation needs the teacher's config, a yaml file or a model-zoo "
            "name such as 'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'."
        )
    teacher_cfg = get_cfg()
    add_kd_config(teacher_cfg)
    add_missing_keys(teacher_cfg, cfg)
    weights = cfg.KD.TEACHER.WEIGHTS
    if name.partition("://")[0] in NETWORK_SOURCES:
        teaches_classifier = is_classifier(cfg.KD.STUDENT.META_ARCHITECTURE)
        (configure_network if teaches_classifier else configure_feature_teacher)(teacher_cfg, name)
    elif "://" in name:
        raise ValueError(
            f"KD.TEACHER.CONFIG_FILE {name!r} is a URL. Expected a yaml file, a model-zoo name, or a network as "
            f"{' or '.join(f'{source}://NAME' for source in NETWORK_SOURCES)}."
        )
    elif PathManager.isfile(name):
        merge_config_file(teacher_cfg, name)
    else:
        merge_config_file(teacher_cfg, _zoo_config_file(name))
        weights = weights or model_zoo.get_checkpoint_url(name)
    merge_options(teacher_cfg, cfg.KD.TEACHER.OPTS, where="KD.TEACHER.OPTS")
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.KD.STUDENT.META_ARCHITECTURE
    teacher_cfg.MODEL.WEIGHTS = weights or teacher_cfg.MODEL.WEIGHTS
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    if not teacher_cfg.MODEL.WEIGHTS:
        raise ValueError(f"The teacher {name!r} has no weights, and would teach noise: set KD.TEACHER.WEIGHTS.")
    teacher_cfg.freeze()
    return teacher_cfg


def build_teacher(cfg: CfgNode) -> nn.Module:
    """
    Build the teacher of a student's config and load its weights.

    Args:
        cfg: the student's config, with ``KD.TEACHER.*``.

    Returns:
        The teacher's own meta-architecture, in eval mode, without gradients, on ``MODEL.DEVICE``. Its
        ``input_format`` says the channel order it wants.

    Raises:
        ValueError: an unknown config or meta-architecture, or weights that are missing, misshapen or left over.
        FileNotFoundError: the weights' file does not exist.
    """
    teacher_cfg = get_teacher_cfg(cfg)
    model = build_teacher_architecture(teacher_cfg)
    if getattr(model, "input_format", None) is None:
        model.input_format = teacher_cfg.INPUT.FORMAT
    load_strictly(model, teacher_cfg.MODEL.WEIGHTS, who=f"teacher {cfg.KD.TEACHER.CONFIG_FILE!r}")
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(f"Teacher {cfg.KD.TEACHER.CONFIG_FILE}: {parameters:,} parameters from {teacher_cfg.MODEL.WEIGHTS}")
    return model.to(teacher_cfg.MODEL.DEVICE).eval().requires_grad_(False)


def build_teacher_architecture(teacher_cfg: CfgNode) -> nn.Module:
    """
    The network of :func:`get_teacher_cfg`, without its weights.

    Raises:
        ValueError: an unknown meta-architecture.
    """
    registered = dict(iter(META_ARCH_REGISTRY))
    if teacher_cfg.MODEL.META_ARCHITECTURE not in registered:
        raise ValueError(unknown_name("teacher meta-architecture", teacher_cfg.MODEL.META_ARCHITECTURE, registered))
    return registered[teacher_cfg.MODEL.META_ARCHITECTURE](teacher_cfg)


def _zoo_config_file(name: str) -> str:
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        raise ValueError(
            f"KD.TEACHER.CONFIG_FILE {name!r} is neither a file nor in Detectron2's model zoo. "
            + unknown_name("model-zoo name", name, _zoo_names())
        ) from None


def _zoo_names() -> List[str]:
    root = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    found = []
    for folder, _, files in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files if f.endswith(".yaml")]
    return sorted(name for name in found if os.path.dirname(name) and "Base" not in name)


class Teacher:
    """
    Runs a frozen network on the student's batches and reads its taps.

    It is not an ``nn.Module``, so nothing that walks the student's wrapper (``train()``, ``half()``, ``state_dict()``,
    optimizers, DDP) can meet the teacher; a deep copy of the wrapper shares it. It follows the images' device.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str], *, whole_backbone: bool = False):
        """
        Args:
            model: a detector with ``backbone`` and ``preprocess_image``, as :func:`build_teacher` returns it.
            taps: the places to read.
            whole_backbone: the outputs of the backbone are wanted too (to pool regions from), not only the taps.

        Raises:
            ValueError: a tap that does not exist.
        """
        self.model = model.eval().requires_grad_(False)
        self.taps = Taps(model, taps, side="teacher")
        self._whole_backbone = whole_backbone
        self._runs_whole_model = not self.taps.within(model.backbone)

    def __deepcopy__(self, memo):
        return self

    @torch.no_grad()
    def __call__(
        self, batched_inputs: List[Dict], *, input_format: str, canvas: Tuple[int, int], device: torch.device
    ) -> Tuple[Dict[str, List[Tensor]], Dict[str, Tensor]]:
        """
        Args:
            batched_inputs: the student's, with raw images (C, H, W).
            input_format: channel order of these images, e.g. "BGR".
            canvas: height and width of the batch as the student padded it; the maps at the taps cover just that.
            device: where the student is; the teacher follows it.

        Returns:
            The maps at every tap, and the outputs of the backbone (empty unless ``whole_backbone``).
        """
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        inputs = [{**x, "image": _reorder(x["image"], input_format, self.model.input_format)} for x in batched_inputs]
        outputs: Dict[str, Tensor] = {}
        if not self.taps.names and not self._whole_backbone:
            return {}, outputs
        if self._runs_whole_model:
            # A dense head is run by its own meta-architecture, which pads as it likes: Taps see what it computes.
            own_canvas = canvas
            with self.taps.recording(stop_when_complete=True):
                self.model(inputs)
        else:
            images = self._images(inputs, canvas)
            own_canvas = tuple(images.shape[-2:])
            with self.taps.recording(stop_when_complete=not self._whole_backbone):
                outputs = self.model.backbone(images)
        features = {
            name: [_crop(value, own_canvas, canvas) for value in values] for name, values in self.taps.pop().items()
        }
        return features, outputs

    def input_gradients(self, batched_inputs: List[Dict], *, input_format: str) -> List[Tensor]:
        """
        The gradient of each image's own task loss at its pixels, (C, H, W), in the images' own channel order.

        Args:
            batched_inputs: the student's, with labels.
            input_format: channel order of the images.
        """
        with torch.enable_grad():
            inputs = with_pixel_gradients(batched_inputs, next(self.model.parameters()).device)
            reordered = [{**x, "image": _reorder(x["image"], input_format, self.model.input_format)} for x in inputs]
            return pixel_gradients(self.model.task_losses(reordered), inputs)

    def _images(self, inputs: List[Dict], canvas: Tuple[int, int]) -> Tensor:
        """The normalised batch, padded to the student's canvas or, where the strides ask for more, to a multiple."""
        images = self.model.preprocess_image(inputs).tensor
        multiple = max(self.model.backbone.size_divisibility, 1)
        height, width = (max(-(-c // multiple) * multiple, s) for c, s in zip(canvas, images.shape[-2:]))
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def with_pixel_gradients(batched_inputs: List[Dict], device: torch.device) -> List[Dict]:
    """Batched inputs whose images are float leaves that keep their gradient."""
    return [
        {**x, "image": x["image"].detach().to(device, torch.float32, copy=True).requires_grad_()}
        for x in batched_inputs
    ]


def pixel_gradients(
    task_losses: Dict[str, Tensor], batched_inputs: List[Dict], *, create_graph: bool = False
) -> List[Tensor]:
    """The gradients of each image's own loss, if the task losses are means over the images."""
    images = [x["image"] for x in batched_inputs]
    total = len(images) * sum(task_losses.values())
    return list(torch.autograd.grad(total, images, create_graph=create_graph))


def _reorder(image: Tensor, found: str, wanted: str) -> Tensor:
    """
    The image's channels as the teacher wants them.

    Raises:
        ValueError: two orders that no permutation of channels joins, e.g. "BGR" and "YUV-BT.601".
    """
    if found == wanted:
        return image
    if sorted(found) != sorted(wanted):
        raise ValueError(
            f"The student's images are {found!r} (INPUT.FORMAT) and the teacher wants {wanted!r}; "
            f"only channel orders of the same colours, such as 'BGR' and 'RGB', can be matched."
        )
    return image[[found.index(channel) for channel in wanted]]


def _crop(features: Tensor, own_canvas: Tuple[int, int], canvas: Tuple[int, int]) -> Tensor:
    if features.dim() != 4 or own_canvas == canvas:
        return features
    height, width = (-(-f * c // o) for f, c, o in zip(features.shape[-2:], canvas, own_canvas))
    return features[:, :, :height, :width]
