"""Tiny detectors of every kind on a device, and steps of them."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import tests.classification.tiny_classifier  # noqa: F401  registers the backbone of C4
from kd_det import Distiller
from tests.tiny import KEYPOINT, MASK, RCNN_LOSSES, batch, distillation_cfg, tiny_cfg

DETECTOR_LOSSES = RCNN_LOSSES
# Those whose values depend on the maps only, not on the regions or positions that are sampled at random.
MAP_LOSSES = ("NST", "AttentionTransfer", "Overhaul", "Hint", "PKD", "CWD", "FGD", "ReviewKD", "FSP")

DENSE = {
    "MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32], [64], [128]],
    "MODEL__RETINANET__IN_FEATURES": ["p3", "p4", "p5", "p6"],
    "MODEL__RETINANET__NUM_CLASSES": 3,
    "MODEL__RETINANET__NUM_CONVS": 1,
}
DETECTORS = {
    "Faster R-CNN": ("GeneralizedRCNN", {}),
    "Mask R-CNN": ("GeneralizedRCNN", MASK),
    "Keypoint R-CNN": ("GeneralizedRCNN", KEYPOINT),
    "Cascade R-CNN": (
        "GeneralizedRCNN",
        {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True},
    ),
    "C4": (
        "GeneralizedRCNN",
        {
            "MODEL__BACKBONE__NAME": "build_tiny_resnet_backbone",
            "MODEL__RESNETS__WIDTH_PER_GROUP": 4,
            "MODEL__ROI_HEADS__NAME": "Res5ROIHeads",
            "MODEL__ROI_HEADS__IN_FEATURES": ["res4"],
            "MODEL__RPN__IN_FEATURES": ["res4"],
            "MODEL__ANCHOR_GENERATOR__SIZES": [[16, 32, 64]],
            "MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION": 6,
        },
    ),
    "RetinaNet": ("RetinaNet", DENSE),
}


def detector_cfg(tmp_path, detector: str, device: str, *losses: str, **opts) -> CfgNode:
    """A distillation config of a detector of ``DETECTORS``; maps are compared where it has them."""
    architecture, own = DETECTORS[detector]
    levels = {"C4": ("res4",), "RetinaNet": ("p3", "p4", "p5")}.get(detector, ("p2", "p3", "p4", "p5"))
    taps = {f"KD__{name}__STUDENT_TAPS": levels for name in ("NST", "PKD", "HINT", "FGD")}
    teacher = tiny_cfg(depth=50, width=8, MODEL__META_ARCHITECTURE=architecture, **own)
    student = {**own, "KD__STUDENT__META_ARCHITECTURE": architecture, "MODEL__DEVICE": device}
    return distillation_cfg(tmp_path, *losses, teacher=teacher, **{**student, **taps, **opts})


def faster_cfg(tmp_path, device: str, *losses: str, **opts) -> CfgNode:
    """A distillation config of the tiny Faster R-CNN; OFD's margins need no images."""
    small = {"KD__OVERHAUL__MARGIN": "norm", "KD__REVIEW_KD__MID_CHANNELS": 8}
    return distillation_cfg(tmp_path, *losses, **{"MODEL__DEVICE": device, **small, **opts})


def build(cfg: CfgNode) -> Distiller:
    """Of the same weights on every device: they are drawn on the CPU."""
    torch.manual_seed(0)
    return build_model(cfg).train()


def batch_with_an_empty_image() -> list[dict]:
    inputs = batch()
    inputs[1]["instances"] = inputs[1]["instances"][torch.zeros(3, dtype=torch.bool)]
    return inputs


def losses_of(model, inputs: list[dict] | None = None) -> dict:
    torch.manual_seed(0)
    with EventStorage():
        return model(batch() if inputs is None else inputs)


def distillation_losses(model: Distiller) -> dict:
    losses = losses_of(model)
    return {loss.key: losses[loss.key] for loss in model.losses.values()}


def train(model, steps: int, inputs: list[dict] | None = None, *, amp: torch.dtype | None = None) -> list[dict]:
    """Steps of SGD; the losses of each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device.type
    scaler = torch.amp.GradScaler(device, enabled=amp == torch.float16)
    optimizer, history = torch.optim.SGD(parameters, lr=1e-3), []
    with EventStorage() as storage:
        for _ in range(steps):
            with torch.autocast(device, dtype=amp, enabled=amp is not None):
                losses = model(batch() if inputs is None else inputs)
            optimizer.zero_grad()
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()
            storage.step()
            history.append({key: value.detach() for key, value in losses.items()})
    return history


def assert_fine(history: list[dict], device: str) -> None:
    for losses in history:
        assert all(value.device.type == device for value in losses.values())
        assert all(value.isfinite() for value in losses.values()), losses
