"""A training step of the plain student, the teacher's features alone, and the distillation step."""

import statistics

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import ResNetBlockBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.benchmark.measure import kernels, peak_bytes, seconds, waits
from kd_det.cli.teacher import choose_losses
from kd_det.config_file import merge_options
from kd_det.distiller import Distiller
from kd_det.features.tap_table import input_size
from kd_det.losses import build_losses
from kd_det.student import build_student
from kd_det.teachers.build import build_teacher_architecture, get_teacher_cfg, teacher_dtype

__all__ = ["measure_prices", "measure_step"]


def measure_step(cfg: CfgNode, *, images: int, amp: torch.dtype | None, repeat: int) -> tuple[list[dict], float]:
    """
    Measure the steps of a distillation config in turns, on random images of its test size, with networks of random
    weights. The medians of the rounds count; float16 scales gradients.

    Returns:
        A row each, and the median of the distillation step's time by the sum of the two others'. Memory is what a
        run needs on top of networks, gradients and optimizer states.
    """
    model = build_distiller(cfg)
    height, width = input_size(cfg)
    batch = random_batch(images, height, width, model.student)
    device = model.device.type
    scaler = torch.amp.GradScaler(device, enabled=amp == torch.float16)
    autocast = torch.autocast(device, dtype=amp, enabled=amp is not None)

    def training_step(network: nn.Module):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-6)

        def step():
            with EventStorage(), autocast:
                losses = network(batch)
            optimizer.zero_grad()
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()

        return step

    def teacher():
        with torch.no_grad(), autocast:
            model.teacher.backbone(model.teacher.preprocess_image(batch).tensor)

    runs = {
        "plain student step": training_step(model.student),
        "teacher's features": teacher,
        "distillation step": training_step(model),
    }
    for run in 2 * list(runs.values()):  # to warm up
        run()
    rounds = [[seconds(run) for run in runs.values()] for _ in range(repeat)]
    rows = []
    for (what, run), times in zip(runs.items(), zip(*rounds)):
        row = {"": what, "seconds": statistics.median(times), "peak MiB": peak_bytes(run, device) / 2**20}
        if device == "cuda":
            found = waits(run)
            row.update({"kernels": kernels(run), "waits": found.total(), "waits by line": dict(found.most_common())})
        rows.append(row)
    return rows, statistics.median(distilled / (plain + features) for plain, features, distilled in rounds)


def measure_prices(cfg: CfgNode, *, images: int, amp: torch.dtype | None, repeat: int) -> list[dict]:
    """
    :func:`measure_step` with each of the config's losses alone.

    Returns:
        A row each: the three times, the ratio, the memory of the distillation step beside the plain one's, and on a GPU
        the kernels beyond those of the plain step and the teacher, and the waits beyond those of the plain step.
    """
    rows = []
    for loss in cfg.KD.LOSSES:
        alone = cfg.clone()
        alone.defrost()
        alone.KD.LOSSES = [loss]
        (plain, teacher, distilled), ratio = measure_step(alone, images=images, amp=amp, repeat=repeat)
        row = {"loss": loss, "plain": plain["seconds"], "teacher": teacher["seconds"]}
        row.update({"distillation": distilled["seconds"], "ratio": ratio})
        row.update({"plain MiB": plain["peak MiB"], "distillation MiB": distilled["peak MiB"]})
        if "kernels" in plain:
            added = distilled["kernels"] - plain["kernels"] - teacher["kernels"]
            row.update({"kernels": added, "waits": distilled["waits"] - plain["waits"]})
        rows.append(row)
    return rows


def build_distiller(cfg: CfgNode) -> Distiller:
    """
    The config's Distiller, with a teacher of random weights. Residual branches are damped: frozen
    norms of untrained networks normalise nothing, and sums over many blocks would leave float32's range.
    """
    networks = build_student(cfg), build_teacher_architecture(get_teacher_cfg(cfg))
    student, teacher = (network.to(cfg.MODEL.DEVICE) for network in networks)
    for block in (block for network in (student, teacher) for block in network.modules()):
        if isinstance(block, ResNetBlockBase):
            for norm in block.modules():
                if isinstance(norm, FrozenBatchNorm2d):
                    norm.weight.fill_(0.3)
    cfg = cfg.clone()
    cfg.defrost()
    merge_options(cfg, choose_losses(cfg, student, teacher), where="--teacher")
    losses = build_losses(cfg, student, teacher)
    options = {"input_format": cfg.INPUT.FORMAT, "teacher_dtype": teacher_dtype(cfg)}
    return Distiller(student=student, teacher=teacher, losses=losses, **options).train()


def random_batch(images: int, height: int, width: int, student: nn.Module) -> list[dict]:
    """Images of noise with 8 boxes each."""
    generator = torch.Generator().manual_seed(0)
    num_classes = getattr(getattr(student, "roi_heads", student), "num_classes", 1)
    batch = []
    for _ in range(images):
        corners = torch.rand(8, 2, generator=generator) * torch.tensor([0.7 * width, 0.7 * height])
        extents = (0.05 + 0.25 * torch.rand(8, 2, generator=generator)) * torch.tensor([width, height])
        instances = Instances((height, width), gt_boxes=Boxes(torch.cat([corners, corners + extents], dim=1)))
        instances.gt_classes = torch.randint(num_classes, (8,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch
