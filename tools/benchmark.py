#!/usr/bin/env python
"""
What distillation costs.

    tools/benchmark.py losses                                 # every founding loss at p2..p6 of an 800x1333 image
    tools/benchmark.py losses --losses nst --levels p5 --channels 2048
    tools/benchmark.py losses --device cuda --json losses.json
    tools/benchmark.py step --config-file configs/Quickstart/student_distilled.yaml --losses all
    tools/benchmark.py step --config-file student.yaml --teacher teacher.yaml --losses all

``losses`` times forward and backward of each loss beside its floor, the arithmetic that no implementation can avoid,
taken in turns in the same run, and measures the memory that the loss needs on top of the features, its gradient
included. The ratio is that of the best times; on maps that fit the CPU's cache, calls cost more than arithmetic.

``step`` times a training step of the plain student, the teacher's features alone, and the distillation step,
in turns, on random images of the config's test size. Weights are random, with residual branches damped so that deep
networks keep finite features and the student samples as many regions as in training.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Callable, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import ResNetBlockBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from kd_det import Distiller, build_student, build_teacher_architecture
from kd_det.cli import argument_parser, load_config
from kd_det.features.tap_table import input_size
from kd_det.losses import build_losses
from kd_det.losses.attention_transfer import attention_transfer_loss
from kd_det.losses.hint import hint_loss
from kd_det.losses.nst import nst_loss
from kd_det.losses.overhaul import overhaul_loss
from kd_det.losses.similarity import similarity_preserving_loss
from kd_det.teachers.build import get_teacher_cfg

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
REGIONS = "roi"  # 512 pooled regions of 7x7 instead of a map


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        loss: (student, teacher) -> scalar.
        floor: (student, teacher) -> the gradient's size of memory, written; see below.
        most_ratio: what the time should not exceed, times the floor.
        most_maps: what the extra memory should not exceed, in bytes of the student's map, the gradient included.
        regions: whether it compares pooled regions rather than maps.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    floor: Callable[[Tensor, Tensor], Tensor]
    most_ratio: float
    most_maps: Optional[float]
    regions: bool = False


def gram_floor(student: Tensor, teacher: Tensor) -> Tensor:
    """
    The three blocks of channels by bmm; backward, one product each for the student's own and the mixed block. (The
    teacher's own needs none, and the two products of a self-product's backward are equal.)
    """
    s, t = student.detach().flatten(2), teacher.flatten(2)
    own, cross, _ = torch.bmm(s, s.mT), torch.bmm(s, t.mT), torch.bmm(t, t.mT)
    return torch.bmm(own, s).baddbmm_(cross, t)


def elementwise_floor(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward, one read of both maps; backward, one read of both and one write of the gradient."""
    student = student.detach()
    student.sum(), teacher.sum()
    return student + teacher


def similarity_floor(student: Tensor, teacher: Tensor) -> Tensor:
    """The Gram of either side; backward, one product."""
    s, t = student.detach().flatten(1), teacher.flatten(1)
    own, _ = s @ s.T, t @ t.T
    return own @ s


def _overhaul(student: Tensor, teacher: Tensor) -> Tensor:
    return overhaul_loss(student, teacher, torch.full((teacher.shape[1],), -0.5, device=teacher.device))


METHODS: Dict[str, Method] = {
    "nst": Method(nst_loss, gram_floor, 1.1, 4),
    "nst_linear": Method(functools.partial(nst_loss, kernel="linear"), gram_floor, 1.1, 4),
    "nst_gaussian": Method(functools.partial(nst_loss, kernel="gaussian"), gram_floor, 1.1, 4),
    "at": Method(attention_transfer_loss, elementwise_floor, 1.6, 2),
    "at_sum": Method(functools.partial(attention_transfer_loss, mapping="sum"), elementwise_floor, 1.6, 2),
    "at_max": Method(functools.partial(attention_transfer_loss, mapping="max_pow"), elementwise_floor, 1.6, 2),
    "overhaul": Method(_overhaul, elementwise_floor, 1.6, 2),
    "hint": Method(hint_loss, elementwise_floor, 1.6, 2),
    "similarity": Method(similarity_preserving_loss, similarity_floor, 1.25, None, regions=True),
}
ALL_LOSSES = ("NST", "AttentionTransfer", "Overhaul", "Similarity", "Hint", "SoftTarget")
FOUNDING = ["nst", "at", "overhaul", "hint", "similarity"]


@dataclass
class Row:
    method: str
    level: str
    shape: List[int]
    seconds: float
    floor_seconds: float
    ratio: float
    median_ratio: float
    most_ratio: float
    extra_maps: float
    most_maps: Optional[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    losses = commands.add_parser("losses", help="each loss beside the floor of its arithmetic")
    losses.add_argument("--device", default="cpu", help="cpu or cuda")
    losses.add_argument("--levels", nargs="+", choices=STRIDES, default=list(STRIDES), help="default: all")
    losses.add_argument("--losses", nargs="+", choices=METHODS, default=FOUNDING, help="default: the founding ones")
    losses.add_argument("--image-size", nargs=2, type=int, metavar=("H", "W"), default=(800, 1333))
    losses.add_argument("--batch", type=int, default=2, help="images")
    losses.add_argument("--channels", type=int, default=256, help="of student and teacher")
    losses.add_argument("--threads", type=int, default=2, help="CPU threads")
    losses.add_argument("--repeat", type=int, default=15, help="pairs of measurements, of which the best counts")
    losses.add_argument("--json", metavar="FILE", help="also write the rows there")
    losses.set_defaults(run=benchmark_losses)

    arguments = argument_parser()
    step = commands.add_parser("step", help="a training step with and without", parents=[arguments], add_help=False)
    step.add_argument("--batch", type=int, default=2, help="images")
    step.add_argument("--threads", type=int, default=2, help="CPU threads")
    step.add_argument("--repeat", type=int, default=5, help="rounds of measurements; medians are reported")
    step.add_argument("--json", metavar="FILE", help="also write the figures there")
    step.set_defaults(run=benchmark_step)
    args = parser.parse_args()
    args.run(args)


def benchmark_losses(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each of its starts on stderr
    rows = []
    print(
        f"{'loss':<13}{'at':<5}{'shape':<20}{'ms':>9}{'floor':>9}"
        f"{'ratio':>7}{'median':>8}{'<=':>6}{'extra maps':>12}{'<=':>6}"
    )
    for name in args.losses:
        method = METHODS[name]
        for level in [REGIONS] if method.regions else args.levels:
            row = measure(name, level, level_shape(level, args), args)
            rows.append(row)
            most_maps = "" if row.most_maps is None else f"{row.most_maps:g}"
            print(
                f"{row.method:<13}{row.level:<5}{'x'.join(map(str, row.shape)):<20}{1e3 * row.seconds:>9.2f}"
                f"{1e3 * row.floor_seconds:>9.2f}{row.ratio:>7.2f}{row.median_ratio:>8.2f}{row.most_ratio:>6.2f}"
                f"{row.extra_maps:>12.2f}{most_maps:>6}",
                flush=True,
            )
    if args.json:
        settings = {"torch": torch.__version__, "device": args.device, "threads": args.threads, "repeat": args.repeat}
        with open(args.json, "w") as f:
            json.dump({**settings, "losses": [asdict(row) for row in rows]}, f, indent=2)


def level_shape(level: str, args: argparse.Namespace) -> List[int]:
    """A level's size is that of the image padded to a multiple of 32, as Detectron2 pads it for a feature pyramid."""
    if level == REGIONS:
        return [512, args.channels, 7, 7]
    padded = (-(-side // 32) * 32 for side in args.image_size)
    return [args.batch, args.channels, *(-(-side // STRIDES[level]) for side in padded)]


def measure(name: str, level: str, shape: List[int], args: argparse.Namespace) -> Row:
    method = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(args.device) for _ in range(2))
    student.requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(method.loss(student, teacher), student)[0]

    floor = functools.partial(method.floor, student, teacher)
    clock = cuda_seconds if student.is_cuda else cpu_seconds
    # Small maps take microseconds: as many calls as fill 20 ms. The second call counts, the first one warms up.
    calls = [max(1, min(200, int(0.02 / max(1e-6, [clock(f, 1) for _ in range(2)][1])))) for f in (step, floor)]
    pairs = [(clock(step, calls[0]), clock(floor, calls[1])) for _ in range(args.repeat)]
    # The best of each: whatever else the machine does only ever adds.
    seconds, floor_seconds = (min(column) for column in zip(*pairs))
    return Row(
        method=name,
        level=level,
        shape=shape,
        seconds=seconds,
        floor_seconds=floor_seconds,
        ratio=seconds / floor_seconds,
        median_ratio=statistics.median(loss / floor for loss, floor in pairs),
        most_ratio=method.most_ratio,
        extra_maps=extra_bytes(step, args.device) / (student.numel() * student.element_size()),
        most_maps=method.most_maps,
    )


@dataclass
class StepRow:
    what: str
    seconds: float
    peak_bytes: int


def benchmark_step(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    cfg = step_config(args)
    model = build_distiller(cfg)
    height, width = input_size(cfg)
    batch = random_batch(args.batch, height, width, model.student)
    parameters = {"plain": list(model.student.parameters()), "distillation": list(model.parameters())}
    optimizers = {name: torch.optim.SGD([p for p in ps if p.requires_grad], lr=1e-6) for name, ps in parameters.items()}

    def train(network: torch.nn.Module, name: str) -> None:
        with EventStorage():
            losses = network(batch)
        optimizers[name].zero_grad()
        sum(losses.values()).backward()
        optimizers[name].step()

    multiple = max(model.backbone.size_divisibility, 1)
    canvas = tuple(-(-side // multiple) * multiple for side in (height, width))
    runs = {
        "plain student step": lambda: train(model.student, "plain"),
        "teacher's features": lambda: model.run_teacher(batch, canvas),
        "distillation step": lambda: train(model, "distillation"),
    }
    clock = cuda_seconds if model.device.type == "cuda" else cpu_seconds
    for run in runs.values():
        run()
    rounds = [{what: clock(run, 1) for what, run in runs.items()} for _ in range(args.repeat)]
    device = cfg.MODEL.DEVICE
    medians = {what: statistics.median(r[what] for r in rounds) for what in runs}
    rows = [StepRow(what, medians[what], extra_bytes(run, device)) for what, run in runs.items()]
    plain, teacher, distillation = runs
    ratio = statistics.median(r[distillation] / (r[plain] + r[teacher]) for r in rounds)
    print(f"{args.batch} images of {height}x{width} on {device}; losses: {', '.join(model.losses)}")
    for row in rows:
        print(f"{row.what:<22}{row.seconds:>9.3f} s{row.peak_bytes / 2**20:>10.0f} MiB")
    print(f"distillation step / (plain step + teacher's features): {ratio:.3f} (to reach: 1.10)")
    if args.json:
        settings = {"torch": torch.__version__, "device": device, "threads": args.threads, "losses": list(model.losses)}
        with open(args.json, "w") as f:
            json.dump({**settings, "ratio": ratio, "steps": [asdict(row) for row in rows]}, f, indent=2)


def step_config(args: argparse.Namespace) -> CfgNode:
    if args.losses == "all":
        args.losses = ",".join(ALL_LOSSES)
    return load_config(args)


def build_distiller(cfg: CfgNode) -> Distiller:
    """The config's Distiller, with a teacher of random weights and margins at 0."""
    student, teacher = build_student(cfg), build_teacher_architecture(get_teacher_cfg(cfg))
    for network in (student, teacher):
        damp_residuals(network.to(cfg.MODEL.DEVICE))
    losses = build_losses(cfg, student, teacher)
    for loss in losses:
        loss.images_to_observe = lambda: 0
    model = Distiller(student=student, teacher=teacher, losses=losses, input_format=cfg.INPUT.FORMAT)
    return model.to(cfg.MODEL.DEVICE).train()


@torch.no_grad()
def damp_residuals(network: torch.nn.Module) -> None:
    """Frozen norms of untrained networks normalise nothing: the sum over many blocks would leave float32's range."""
    for block in network.modules():
        if isinstance(block, ResNetBlockBase):
            for norm in block.modules():
                if isinstance(norm, FrozenBatchNorm2d):
                    norm.weight.fill_(0.3)


def random_batch(images: int, height: int, width: int, student: torch.nn.Module) -> List[Dict]:
    """Images of noise with 8 boxes each."""
    generator = torch.Generator().manual_seed(0)
    num_classes = getattr(getattr(student, "roi_heads", student), "num_classes", 1)
    batch = []
    for _ in range(images):
        corners = torch.rand(8, 2, generator=generator) * torch.tensor([0.7 * width, 0.7 * height])
        extents = (0.05 + 0.25 * torch.rand(8, 2, generator=generator)) * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + extents], dim=1))
        instances.gt_classes = torch.randint(num_classes, (8,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def cpu_seconds(function: Callable[[], Tensor], calls: int) -> float:
    """Seconds of one call. What it returns is freed between the calls, as a gradient is between steps."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def cuda_seconds(function: Callable[[], Tensor], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def extra_bytes(function: Callable[[], Tensor], device: str) -> int:
    """
    The highest sum of bytes that were allocated and not yet freed during a call. On CUDA by the allocator's statistics;
    on a CPU by the allocations that the profiler records, which are those of torch's allocator and not the buffers
    inside a library (the resident size of the process would miss what is reused, and count what is only kept).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        with open(trace.name) as f:
            events = [event for event in json.load(f)["traceEvents"] if event["name"] == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return highest


if __name__ == "__main__":
    main()
