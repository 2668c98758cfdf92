"""A trained student as a folder that plain Detectron2 loads: its config, its weights, and how to load them, checked."""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.export import TracingAdapter
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from torch import Tensor, nn

from kd_det.backbones import basic_resnet, timm_backbone
from kd_det.config_file import add_missing_keys, merge_config_file
from kd_det.student import student_cfg
from kd_det.weights.files import write_aside
from kd_det.weights.strict import load_strictly

__all__ = ["ExportReport", "export_student"]

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, TRACED, CLASSES, README = "config.yaml", "model.pth", "model.ts", "classes.json", "README.md"

# Largest relative error of the backbone's maps that the check run accepts in half precision: float16's rounding.
TOLERANCE = 0.02

_README = """\
# {architecture}, exported

`config.yaml` and `model.pth` are a plain Detectron2 model: {parameters:,} parameters, {dtype}, {megabytes:.1f} MB.
They need {needs}, not kd_det.

```python
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
{imports}
cfg = get_cfg()
{add_config}cfg.merge_from_file("config.yaml")
cfg.MODEL.WEIGHTS = "model.pth"
cfg.MODEL.DEVICE = "cpu"  # or "cuda"
predictor = DefaultPredictor(cfg)
instances = predictor(image)["instances"]  # image: (H, W, 3) uint8, BGR, as cv2.imread gives it
```

{classes}{traced}Check run: the files, loaded again, give the trained student's maps with a relative error of
{error:.2g}, and {after} detections where it has {before}.
"""

_TRACED = """\
`model.ts` is a TorchScript trace of it, made by Detectron2's exporter: it takes one image, a float tensor (3, H, W) of
the channel order {order} with values 0 to 255, already resized as `INPUT.MIN_SIZE_TEST` says, and returns the fields of
its detections in that image's coordinates, {fields}.

"""


class ExportReport(NamedTuple):
    folder: str
    files: tuple[str, ...]  # their names
    num_parameters: int  # of the student
    needs: tuple[str, ...]  # packages besides Detectron2 that loading needs, e.g. ("timm",)
    feature_error: float  # of the reloaded backbone's maps: maximum of the difference over that of the map
    num_detections: tuple[int, int]  # on the check images, before and after


def export_student(
    cfg: CfgNode, weights: str, folder: str, *, half: bool = False, trace: bool = False, images: Sequence[Tensor] = ()
) -> ExportReport:
    """
    Write a plain Detectron2 config and its weights, load them again, and compare outputs.

    Args:
        cfg: of the training, with or without KD keys.
        weights: a checkpoint of the training.
        folder: is created; must be empty or not exist. Nothing is left there if the export fails.
        half: save floating-point weights in float16 (half the size; Detectron2 loads them into float32).
        trace: also save a TorchScript trace of the detector, where Detectron2's exporter can make one.
        images: raw images (3, H, W) of ``INPUT.FORMAT`` for the check run; default: random ones.

    Raises:
        FileNotFoundError, ValueError: weights that do not exist or do not fit; a model that only kd_det can build; a
            folder that is not empty; a trace that cannot be made; or a check run that failed.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{folder!r} is not a folder to export to.")
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"The folder {folder!r} is not empty; the export needs one of its own.")
    cfg = student_cfg(cfg)
    cfg.defrost()
    uses_timm = "TIMM" in cfg.MODEL
    if uses_timm:
        cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.MODEL.WEIGHTS = WEIGHTS
    if META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).__module__.startswith("kd_det"):
        raise ValueError(
            f"{cfg.MODEL.META_ARCHITECTURE} is kd_det's own meta-architecture, which plain Detectron2 cannot load; "
            f"a classifier's backbone is exported by tools/pretrain_backbone.py."
        )
    model = build_model(cfg).eval()
    load_strictly(model, weights, who="student")
    generator = torch.Generator().manual_seed(0)
    sizes = ((192, 256), (256, 160))
    images = list(images) or [torch.randint(256, (3, *size), generator=generator).float() for size in sizes]
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    packages = {"timm" if name == "kd_det" else name for name in packages}
    needs = tuple(sorted(packages - {"detectron2", "torch", "fvcore", "torchvision"}))
    num_parameters = sum(p.numel() for p in model.parameters())
    # The file of kd_det that registers the backbone's builder.
    is_basic = cfg.MODEL.BACKBONE.NAME in basic_resnet.__all__
    registers = timm_backbone if uses_timm else basic_resnet if is_basic else None
    classes, imports, traced = _class_names(cfg), "", ""

    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as made:
        path = {name: os.path.join(made, name) for name in (CONFIG, WEIGHTS, TRACED, CLASSES, README)}
        write_aside(path[WEIGHTS], lambda file: torch.save({"model": _weights(model, half)}, file))
        _write(path[CONFIG], cfg.dump())
        files = [CONFIG, WEIGHTS]
        if classes:
            _write(path[CLASSES], json.dumps(classes, indent=0))
            files.append(CLASSES)
        if registers is not None:
            files.append(os.path.basename(shutil.copy(registers.__file__, made)))
            module = registers.__name__.rpartition(".")[2]
            imports = f"from {module} import add_timm_config" if uses_timm else f"import {module}"
            imports += "  # the file beside the config; it registers the backbone\n"
        error, (before, after) = _check_run(cfg, model, made, images)
        if not error <= TOLERANCE * half:
            raise ValueError(f"The exported student differs from the trained one: its maps by {error:.2g}, relatively.")
        if trace:
            traced = _TRACED.format(order=cfg.INPUT.FORMAT, fields=", ".join(_trace(model, images, path[TRACED])))
            files.append(TRACED)
        names = (
            f"`{CLASSES}` names the {len(classes)} classes in the order of `pred_classes`: {', '.join(classes)}.\n\n"
        )
        _write(
            path[README],
            _README.format(
                architecture=cfg.MODEL.META_ARCHITECTURE,
                parameters=num_parameters,
                dtype="float16" if half else "float32",
                megabytes=os.path.getsize(path[WEIGHTS]) / 2**20,
                needs=" and ".join(("Detectron2", *needs)),
                imports=imports,
                add_config="add_timm_config(cfg)\n" if uses_timm else "",
                classes=names if classes else "",
                traced=traced,
                error=error,
                before=before,
                after=after,
            ),
        )
        os.makedirs(folder, exist_ok=True)  # readable for whom the umask allows, unlike the temporary one
        for name in (*files, README):
            shutil.move(os.path.join(made, name), os.path.join(folder, name))
    return ExportReport(folder, (*files, README), num_parameters, needs, error, (before, after))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _weights(model: nn.Module, half: bool) -> dict[str, Tensor]:
    def fits(value: Tensor) -> bool:
        return value.is_floating_point() and value.abs().max() < torch.finfo(torch.float16).max

    return {key: value.half() if half and fits(value) else value for key, value in model.state_dict().items()}


@torch.no_grad()
def _check_run(cfg: CfgNode, model: nn.Module, folder: str, images: list[Tensor]) -> tuple[float, tuple[int, int]]:
    reloaded_cfg = get_cfg()
    add_missing_keys(reloaded_cfg, cfg)  # timm's and a project's own; who loads the files adds them likewise
    merge_config_file(reloaded_cfg, os.path.join(folder, CONFIG))
    reloaded = build_model(reloaded_cfg).eval()
    load_strictly(reloaded, os.path.join(folder, WEIGHTS), who="exported student")
    error, counts = 0.0, [0, 0]
    for image in images:
        height, width = image.shape[-2:]
        inputs = [{"image": image, "height": height, "width": width}]
        maps = [network.backbone(network.preprocess_image(inputs).tensor) for network in (model, reloaded)]
        for name, want in maps[0].items():
            error = max(error, ((maps[1][name] - want).abs().max() / want.abs().max().clamp(min=1e-12)).item())
        for i, network in enumerate((model, reloaded)):
            counts[i] += len(network(inputs)[0]["instances"])
    return error, (counts[0], counts[1])


@torch.no_grad()
def _trace(model: nn.Module, images: list[Tensor], path: str) -> list[str]:
    """Save the trace, compared with the model on every image; returns the names of what it gives."""

    def inference(network, inputs):
        if isinstance(network, GeneralizedRCNN):  # in the coordinates of the network's input
            return [{"instances": network.inference(inputs, do_postprocess=False)[0]}]
        return network(inputs)

    adapter = TracingAdapter(model, [{"image": images[0]}], inference).eval()
    try:
        with warnings.catch_warnings():
            # The tracer warns of what may be constant in the trace; the other images show whether anything is.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(adapter, (images[0],), check_trace=False)
        for image in images:
            for want, got in zip(adapter(image), traced(image)):
                if want.shape != got.shape or not torch.allclose(want.float(), got.float(), atol=1e-3):
                    raise ValueError("on another image, the trace gives other detections than the model")
    except (RuntimeError, ValueError, AttributeError, TypeError, AssertionError) as e:
        raise ValueError(f"Detectron2's exporter cannot trace this {type(model).__name__}: {e}") from e
    torch.jit.save(traced, path)
    instances = inference(model, [{"image": images[0]}])[0]["instances"]
    return [*instances.get_fields(), "image_size"]


def _class_names(cfg: CfgNode) -> list[str]:
    """The names of the first data set's classes; none where they, or the data set's files, are not on this machine."""
    for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][:1]:
        if name in DatasetCatalog.list() and not MetadataCatalog.get(name).get("thing_classes"):
            try:
                DatasetCatalog.get(name)  # COCO's loader registers the names that it reads
            except (OSError, AssertionError, KeyError, ValueError) as e:
                logger.warning(f"The export does not name its classes: data set {name!r} cannot be read ({e}).")
        return list(MetadataCatalog.get(name).get("thing_classes") or ())
    return []
