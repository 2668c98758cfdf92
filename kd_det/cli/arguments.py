"""The command lines of kd_det, and the config that each describes."""

import argparse
import re

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from kd_det.classification import data as classification_data
from kd_det.cli.teacher import name_teacher
from kd_det.config import add_kd_config
from kd_det.config_file import find_config, import_project, is_lazy_config, merge_config_file, merge_options
from kd_det.errors import UserError
from kd_det.quickstart import register as digits
from kd_det.student import student_cfg

__all__ = [
    "argument_parser",
    "config_parser",
    "describe",
    "is_lazy",
    "load_config",
    "parse_arguments",
    "refuse",
    "usable_device",
]


def describe(parser: argparse.ArgumentParser, text: str | None) -> argparse.ArgumentParser:
    """Give a parser its description: a module's docstring, whose indented lines are examples."""
    parser.description = (text or "").strip()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The arguments of a training: Detectron2's, and the shortest way from a plain config to a distillation run."""
    parser = describe(default_argument_parser(epilog=""), description)
    group = _add_config_arguments(parser)
    group.add_argument("--overwrite", action="store_true", help="replace the run that OUTPUT_DIR holds")
    text = "the config may have more classes than the data sets"
    group.add_argument("--allow-unused-classes", action="store_true", help=text)
    return parser


def config_parser(description: str, *, teacher: bool = True) -> argparse.ArgumentParser:
    """The arguments of a tool that reads the config of a training and trains nothing."""
    parser = describe(argparse.ArgumentParser(), description)
    parser.add_argument("--config-file", default="", metavar="FILE", help="a yaml config, or a LazyConfig")
    _add_config_arguments(parser, teacher=teacher)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    # What a training's command line has besides; these tools write nothing into OUTPUT_DIR.
    parser.set_defaults(eval_only=False, resume=False, overwrite=True, allow_unused_classes=True)
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, dist_url="")
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser, *, teacher: bool = True):
    group = parser.add_argument_group("distillation")
    text = "a project's module or .py file that registers its data sets, losses, ...; may be repeated"
    group.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help=text)
    parser.set_defaults(teacher=None, teacher_weights="", losses=None)
    if teacher:
        text = "a config file (yaml or LazyConfig), a model-zoo name, torchvision://NETWORK, timm://NETWORK, "
        text += "hf://NAME_OR_FOLDER, 'ema' (the student's own average), or SOURCE://NAME of a module of --import"
        group.add_argument("--teacher", metavar="NAME_OR_FILE", help=text)
        text = "default: the zoo entry's checkpoint, the library's weights, or those that the config file names"
        group.add_argument("--teacher-weights", metavar="FILE", default="", help=text)
        text = "default: the config's; with --teacher, PKD, and KD.INHERIT of what fits above the backbone"
        group.add_argument("--losses", metavar="NST,...", help=text)
    return group


def refuse(message: str):
    """In the place of a parser's ``error``, which ends the process: raises ``UserError``."""
    raise UserError(message)


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
    args.config_file = find_config(args.config_file)
    if is_lazy(args):
        return args
    if len(args.opts) % 2 or any(not re.fullmatch(r"[A-Z0-9_]+(\.[A-Za-z0-9_]+)*", key) for key in args.opts[::2]):
        parser.error(
            "expected KEY VALUE pairs at the end, such as SOLVER.BASE_LR 0.01, and all --options before them; found "
            + " ".join(args.opts)
        )
    if "KD.IMPORTS" in args.opts[::2]:
        parser.error("KD.IMPORTS is a key of config files; on the command line it is --import MODULE")
    return args


def is_lazy(args: argparse.Namespace) -> bool:
    """Whether the config is a LazyConfig; its options are ``KEY=VALUE``."""
    return is_lazy_config(args.config_file)


def load_config(args: argparse.Namespace, *add_configs) -> CfgNode:
    """
    The config of a run: defaults, the keys of imported modules, ``--config-file``, the arguments of the teacher, ``KEY
    VALUE`` pairs. With ``--eval-only``, of the plain student. Nothing is built: with ``--teacher`` and without
    ``--losses``, :func:`kd_det.cli.check_run` completes it.

    Args:
        args: see :func:`argument_parser`.
        add_configs: functions that add the nodes of other packages to a config, as ``add_kd_config`` does.

    Raises:
        ValueError: a file that is not a config, a module that cannot be imported, an unknown key or a value of another
            type.
        OSError: a file that cannot be read.
    """
    cfg = get_cfg()
    for add_config in (add_kd_config, *add_configs):
        add_config(cfg)
    for name in args.imports:
        import_project(cfg, name)
    if args.config_file:
        merge_config_file(cfg, args.config_file)
    merge_options(cfg, args.opts, where="KEY VALUE")
    losses = args.losses.split(",") if args.losses else None
    if (args.teacher or losses) and not args.eval_only:
        if args.teacher:
            name_teacher(cfg, args.teacher, weights=args.teacher_weights, losses=losses)
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
    classification_data.register_configured(cfg)
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE, is_given="MODEL.DEVICE" in args.opts)
    if args.eval_only:
        cfg.MODEL.TIMM.WEIGHTS = ""  # MODEL.WEIGHTS has them all; timm's may be out of reach
    cfg.freeze()
    return student_cfg(cfg) if args.eval_only else cfg


def usable_device(name: str, *, is_given: bool) -> str:
    """The device, or "cpu" where it is Detectron2's default "cuda", nobody named it, and there is no GPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"MODEL.DEVICE {name!r} is not a device; expected 'cuda' or 'cpu'") from None
    if device.type != "cuda" or torch.cuda.is_available():
        return name
    if is_given:
        raise UserError(f"MODEL.DEVICE is {name!r}, and PyTorch finds no GPU: set MODEL.DEVICE cpu")
    return "cpu"
