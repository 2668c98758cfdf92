"""The command line of the training tools, and the config it asks for."""

import argparse
import re

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from kd_det.classification import data as classification_data
from kd_det.config import add_kd_config
from kd_det.config_file import merge_config_file, merge_options
from kd_det.errors import UserError
from kd_det.losses import loss_class
from kd_det.quickstart import register as digits
from kd_det.random_state import preserved_random_state
from kd_det.student import build_student, student_cfg
from kd_det.teachers.build import build_teacher_architecture, get_teacher_cfg

__all__ = ["add_teacher", "argument_parser", "load_config", "parse_arguments"]


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and the shortest way from a plain config to a distillation run."""
    parser = default_argument_parser()
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", metavar="NAME_OR_YAML", help="the teacher's config: a file or a model-zoo name")
    group.add_argument("--teacher-weights", metavar="FILE", default="", help="default: the zoo entry's checkpoint")
    group.add_argument(
        "--losses",
        metavar="NST,...",
        help="default: the config's; with --teacher, NST,SoftTarget if both have ROI heads, NST otherwise",
    )
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Parse and check what argparse cannot; a wrong command line ends with exit status 2, as argparse does."""
    args = parser.parse_args(argv)
    if args.num_gpus < 1 or args.num_machines < 1:
        parser.error(f"--num-gpus and --num-machines must be at least 1, found {args.num_gpus}, {args.num_machines}")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(f"--machine-rank must be in 0..{args.num_machines - 1}, found {args.machine_rank}")
    if args.dist_url == "auto" and args.num_machines > 1:
        parser.error("--dist-url auto works on one machine; several need the first one's address, tcp://HOST:PORT")
    if args.teacher_weights and not args.teacher:
        parser.error("--teacher-weights needs --teacher (or KD.TEACHER.WEIGHTS, for the teacher that the config names)")
    if len(args.opts) % 2 or any(not re.fullmatch(r"[A-Z0-9_]+(\.[A-Za-z0-9_]+)*", key) for key in args.opts[::2]):
        parser.error(f"expected KEY VALUE pairs at the end, such as SOLVER.BASE_LR 0.01; found {' '.join(args.opts)}")
    return args


def load_config(args: argparse.Namespace, *add_configs) -> CfgNode:
    """
    The config of a run: defaults, ``--config-file``, the arguments of the teacher, ``KEY VALUE`` pairs. With
    ``--eval-only``, of the plain student.

    Args:
        args: see :func:`argument_parser`.
        add_configs: functions that add the nodes of other packages to a config, as ``add_kd_config`` does.

    Raises:
        ValueError: a file that is not a config, an unknown key or a value of another type.
        OSError: a file that cannot be read.
    """
    cfg = get_cfg()
    for add_config in (add_kd_config, *add_configs):
        add_config(cfg)
    if args.config_file:
        merge_config_file(cfg, args.config_file)
    merge_options(cfg, args.opts, where="KEY VALUE")
    losses = args.losses.split(",") if args.losses else None
    if (args.teacher or losses) and not args.eval_only:
        if args.teacher:
            add_teacher(cfg, args.teacher, weights=args.teacher_weights, losses=losses)
        elif cfg.MODEL.META_ARCHITECTURE == "Distiller":
            cfg.KD.LOSSES = tuple(losses)
        else:
            raise UserError("--losses needs --teacher, or a config that names a teacher (KD.TEACHER.CONFIG_FILE)")
        pairs = zip(args.opts[::2], args.opts[1::2], strict=True)
        # The user's own KD keys win over what the arguments imply.
        merge_options(cfg, [x for pair in pairs if pair[0].startswith("KD.") for x in pair], where="KEY VALUE")
    # The data sets that configs/ trains on, where a project has not given their names to its own.
    digits.register_builtin()
    classification_data.register_builtin()
    cfg.MODEL.DEVICE = _usable_device(cfg.MODEL.DEVICE, asked_for="MODEL.DEVICE" in args.opts)
    if args.eval_only:
        cfg.MODEL.TIMM.WEIGHTS = ""  # MODEL.WEIGHTS has them all; timm's may be out of reach
    cfg.freeze()
    return student_cfg(cfg) if args.eval_only else cfg


def add_teacher(cfg: CfgNode, teacher: str, *, weights: str = "", losses=None) -> None:
    """
    Turn the config of any detector into one that distils a teacher into it, in place.

    Args:
        cfg: a config with the KD node; a plain one's meta-architecture becomes the student's.
        teacher: config file or model-zoo name.
        weights: the teacher's weights; empty: the zoo entry's checkpoint, or the config's.
        losses: names of losses; None: ``NST`` and, where both networks have ROI heads, ``SoftTarget``.
            Their taps on pyramid levels are restricted to the levels that both backbones have.

    Raises:
        ValueError: an unknown teacher, meta-architecture or loss, or no level in common.
    """
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        cfg.KD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.KD.TEACHER.CONFIG_FILE = teacher
    cfg.KD.TEACHER.WEIGHTS = weights
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    on_cpu.MODEL.TIMM.WEIGHTS = ""  # the levels are asked for, nothing else
    with preserved_random_state():
        networks = build_student(on_cpu), build_teacher_architecture(get_teacher_cfg(on_cpu))
    if losses is None:
        with_regions = all(getattr(network, "roi_heads", None) is not None for network in networks)
        losses = ("NST", "SoftTarget") if with_regions else ("NST",)
    cfg.KD.LOSSES = tuple(losses)
    shapes = [network.backbone.output_shape() for network in networks]
    shared = [level for level in shapes[0] if level in shapes[1]]
    for loss in losses:
        cls = loss_class(loss)
        node = cfg.KD[cls.name.upper()]
        levels = [tap for tap in node.STUDENT_TAPS if re.fullmatch(r"p\d+", tap)]
        if levels and len(levels) == len(node.STUDENT_TAPS) and not set(levels) <= set(shared):
            if not shared:
                raise UserError(
                    f"The backbones have no level in common: the student's are {', '.join(shapes[0])}, the teacher's "
                    f"{', '.join(shapes[1])}. Pair them by STUDENT_TAPS and TEACHER_TAPS of KD.{cls.name.upper()}."
                )
            node.STUDENT_TAPS = tuple(level for level in levels if level in shared) or tuple(shared)


def _usable_device(name: str, *, asked_for: bool) -> str:
    """The device, or "cpu" where it is Detectron2's default "cuda", nobody named it, and there is no GPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"MODEL.DEVICE {name!r} is not a device; expected 'cuda' or 'cpu'") from None
    if device.type != "cuda" or torch.cuda.is_available():
        return name
    if asked_for:
        raise UserError(f"MODEL.DEVICE is {name!r}, and PyTorch finds no GPU: set MODEL.DEVICE cpu")
    return "cpu"
