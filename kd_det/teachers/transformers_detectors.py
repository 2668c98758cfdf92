"""
Detectors of the transformers library as teachers: DETR, Conditional, DAB and Deformable DETR, RT-DETR, D-FINE.

By config, ``KD.TEACHER.CONFIG_FILE: "hf://NAME"`` with a name of the Hugging Face hub or a folder that
``save_pretrained`` wrote, model and image processor. Their maps teach by level: ``res<k>`` of the backbone, ``p<k>`` of
the encoder. Called as any detector of Detectron2, they give their detections.
"""

import contextlib
import math
import os
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from kd_det.errors import one_line
from kd_det.teachers.feature_teacher import FeatureTeacher
from kd_det.teachers.sources import TeacherSource, register_teacher_source

__all__ = ["TransformersDetector"]

# What detectors published for COCO call classes that COCO, and Detectron2, call otherwise.
_COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


class _EncoderMaps(nn.Module):
    """Normalised images (N, 3, H, W) to ``res<k>`` of the backbone and ``p<k>`` of the encoder, all (N, C, h, w)."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector
        self.image_sizes: Optional[List[Tuple[int, int]]] = None  # of the next batch; None: without padding
        self.outputs: Any = None  # of the detector, for the last batch, whose images had
        self.canvas = (0, 0)

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        sizes, self.image_sizes = self.image_sizes, None
        mask = torch.ones_like(images[:, 0], dtype=torch.long)
        for one, (height, width) in zip(mask, sizes or ()):
            one[height:] = 0
            one[:, width:] = 0
        seen: Dict[str, Tuple[Dict, Any]] = {}

        def keep(name: str, module: nn.Module):
            hook = lambda _, args, kwargs, output: seen.update({name: (kwargs, output)})  # noqa: E731
            stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))

        with contextlib.ExitStack() as stack:
            keep("backbone", self.detector.model.backbone)
            keep("encoder", self.detector.model.encoder)
            self.outputs = self.detector(pixel_values=images, pixel_mask=mask)
        self.canvas = tuple(images.shape[-2:])
        backbone = _backbone_maps(seen["backbone"][1])
        encoder = _encoder_maps(*seen["encoder"], coarsest=backbone[-1])
        # Each map has half the size of the one before; padded images are multiples of the stride of the first.
        first = round(math.log2(images.shape[-2] / backbone[0].shape[-2]))
        first_encoded = first if len(encoder) > 1 else first + len(backbone) - 1
        maps = {f"res{first + i}": value for i, value in enumerate(backbone)}
        return maps | {f"p{first_encoded + i}": value for i, value in enumerate(encoder)}


def _backbone_maps(output: Sequence) -> List[Tensor]:
    """Of pairs of a map and its mask; DAB-DETR has a list of position embeddings behind the list of pairs."""
    pairs = output[0] if isinstance(output[0], list) else output
    return [value for value, _ in pairs]


def _encoder_maps(kwargs: Dict, output: Any, coarsest: Tensor) -> List[Tensor]:
    """Maps already, or a sequence (N, places, C) of all levels, or of the coarsest alone."""
    encoded = output[0]
    if not isinstance(encoded, Tensor):
        return list(encoded)
    shapes = kwargs.get("spatial_shapes_list") or [tuple(coarsest.shape[-2:])]
    levels = encoded.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
    return [level.unflatten(2, shape) for level, shape in zip(levels, shapes)]


class TransformersDetector(FeatureTeacher):
    """
    A detector of transformers. Its ``backbone`` gives maps, called as a whole it gives ``[{"instances": Instances}]``
    as Detectron2's detectors in eval mode do, with ``pred_classes`` in the order of ``class_names``.

    Images keep the size that the student gives them. Where the image processor pads, a mask tells the network what is
    padding and boxes are relative to the image; otherwise (RT-DETR, D-FINE) the network takes the padding for image.
    """

    def __init__(self, *, detector: nn.Module, processor: Any, score_threshold: float = 0.05):
        """
        Args:
            detector: ``transformers.AutoModelForObjectDetection``.
            processor: its ``transformers.AutoImageProcessor``: normalisation, and boxes and scores from outputs.
            score_threshold: detections below it are left out.

        Raises:
            ValueError: a detector without a backbone and an encoder (YOLOS).
        """
        parts = [name for name in ("backbone", "encoder") if not hasattr(getattr(detector, "model", None), name)]
        if parts:
            raise ValueError(
                f"{type(detector).__name__} has no {' and no '.join(parts)} to read maps of. Expected a detector such "
                f"as DETR, Conditional, DAB or Deformable DETR, RT-DETR or D-FINE."
            )
        scale = 1 / processor.rescale_factor if processor.do_rescale else 1
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0] * 3, [1] * 3)
        super().__init__(
            network=_EncoderMaps(detector.eval()),
            pixel_mean=[scale * float(x) for x in mean],
            pixel_std=[scale * float(x) for x in std],
        )
        self.score_threshold = score_threshold
        self._processor = processor
        names = [detector.config.id2label[i] for i in sorted(detector.config.id2label)]
        self.class_names, classes = _contiguous_classes(names)
        self.register_buffer("class_of_label", torch.tensor(classes), persistent=False)

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """As of any :class:`FeatureTeacher`; around these images, the next call of the backbone sees padding."""
        images = super().preprocess_image(batched_inputs)
        self.backbone.network.image_sizes = images.image_sizes
        return images

    def forward(self, batched_inputs: List[Dict]) -> List[Dict[str, Instances]]:
        images = self.preprocess_image(batched_inputs)
        self.backbone(images.tensor)
        network = self.backbone.network
        outputs, network.outputs = network.outputs, None
        detections = self._processor.post_process_object_detection(
            outputs,
            threshold=self.score_threshold,
            target_sizes=images.image_sizes if self._processor.do_pad else [network.canvas] * len(images),
        )
        results = []
        for x, size, found in zip(batched_inputs, images.image_sizes, detections):
            instances = Instances(size, pred_boxes=Boxes(found["boxes"]), scores=found["scores"])
            instances.pred_classes = self.class_of_label[found["labels"]]
            instances = instances[instances.pred_classes >= 0]
            height, width = x.get("height", size[0]), x.get("width", size[1])
            results.append({"instances": detector_postprocess(instances, height, width)})
        return results


def _contiguous_classes(names: Sequence[str]) -> Tuple[Tuple[str, ...], List[int]]:
    """
    A detector's classes, and the class of each of its labels, -1 for those that are none. Where COCO's 80 are among
    them, in whatever order and with whatever gaps, they are the classes, in Detectron2's order.
    """
    names = [_COCO_NAMES.get(name, name) for name in names]
    coco = tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
    classes = coco if set(coco) <= set(names) else tuple(name for name in names if name != "N/A")
    index = {name: i for i, name in enumerate(classes)}
    return classes, [index.get(name, -1) for name in names]


@register_teacher_source("hf")
class TransformersSource(TeacherSource):
    """``hf://NAME``: a detector of the Hugging Face hub, or of a folder."""

    def configure(self, cfg: CfgNode, student: CfgNode) -> None:
        _import_transformers()
        if not os.path.isdir(self.path) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.path):
            raise FileNotFoundError(
                f"There is no folder {self.path!r} ({self.name}), and the hub's names are NAME or OWNER/NAME: expected "
                f"a folder that save_pretrained wrote, model and image processor."
            )
        cfg.MODEL.META_ARCHITECTURE = TransformersDetector.__name__
        cfg.MODEL.WEIGHTS = self.name
        cfg.INPUT.FORMAT = "RGB"

    def build(self, cfg: CfgNode) -> nn.Module:
        transformers = _import_transformers()
        with self._errors():
            config = transformers.AutoConfig.from_pretrained(self.path)
            processor = transformers.AutoImageProcessor.from_pretrained(self.path)
            detector = transformers.AutoModelForObjectDetection.from_config(config)
        return TransformersDetector(detector=detector, processor=processor)

    def read_weights(self, cfg: CfgNode) -> Optional[Mapping[str, Tensor]]:
        if cfg.MODEL.WEIGHTS != self.name:
            return None
        automatic = _import_transformers().AutoModelForObjectDetection
        with self._errors():
            detector, found = automatic.from_pretrained(self.path, dtype=torch.float32, output_loading_info=True)
        missing = sorted(found["missing_keys"])  # transformers would start them at random
        if missing:
            raise ValueError(f"The weights of {self.name!r} lack {len(missing)} of the network, first {missing[0]}.")
        return {f"detector.{key}": value for key, value in detector.state_dict().items()}

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except (ImportError, OSError, RuntimeError, ValueError) as e:
            where = "" if os.path.isdir(self.path) else ", which is no folder here, from the Hugging Face hub"
            raise ValueError(f"transformers cannot load {self.name!r}{where}: {one_line(e)[:300]}") from e


def _import_transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError('transformers is not installed; install it with: pip install "kd_det[transformers]"') from None
    return transformers
