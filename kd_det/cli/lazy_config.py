"""LazyConfigs (.py): read with one line for what is wrong, with ``--import``, ``--teacher`` and ``--losses``."""

import argparse
import contextlib
from collections.abc import Collection

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from kd_det.cli.teacher import choose_losses, name_teacher
from kd_det.config import add_kd_config
from kd_det.config_file import check_lazy_key, import_project, merge_options, read_lazy_config
from kd_det.distiller import Distiller
from kd_det.errors import UserError, one_line
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, build_losses, loss_class
from kd_det.teachers import build_teacher, build_teacher_architecture, get_teacher_cfg

__all__ = [
    "KEYS",
    "LAZY_SIZE",
    "configured_losses",
    "data_sets",
    "distil",
    "load_lazy_config",
    "networks",
    "plain_student",
]

KEYS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
LAZY_SIZE = (800, 1333)  # height and width of an image, where the config tells none


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """
    The config of a run: the file with ``KEY=VALUE`` overrides, and a Distiller around its model with ``--teacher``.
    Its ``imports`` are the modules of ``--import``, for commands that read the yaml of a training.
    ``UserError`` for a file that is no such config, or an override that does not fit.
    """
    kd = _kd_config(args.imports)
    cfg = read_lazy_config(args.config_file)
    for name in cfg.get("imports", ()):
        import_project(kd, name, where=f"{args.config_file}: imports")
    if kd.KD.IMPORTS:
        cfg.imports = list(kd.KD.IMPORTS)
    try:
        for override in OverridesParser.create().parse_overrides(args.opts):
            if not (override.is_add() or override.is_force_add()):  # "+KEY=VALUE", hydra's way to add one
                check_lazy_key(cfg, override.key_or_group, where="KEY=VALUE")
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (KeyError, HydraException, OmegaConfBaseException) as e:
        raise UserError(f"{args.config_file}: {one_line(e)}") from e
    missing = [key for key in KEYS if key not in cfg]
    if missing:
        raise UserError(f"{args.config_file} lacks {', '.join(missing)}: a config must name {', '.join(KEYS)}")
    if args.teacher or args.losses:
        teacher = args.teacher or _teacher(cfg)
        if teacher is None:
            raise UserError("--losses needs --teacher, or a config whose model is a Distiller with a teacher")
        cfg.model = L(distil)(
            student=plain_student(cfg.model),
            teacher=teacher,
            weights=args.teacher_weights,
            losses=args.losses.split(",") if args.losses else None,
            input_format=cfg.model.get("input_format"),
            imports=list(kd.KD.IMPORTS),
            datasets=data_sets(cfg, "train"),
        )
    return cfg


def data_sets(cfg: DictConfig, kind: str) -> tuple[str, ...]:
    """The names of the data sets that a config trains on ("train"), or tests on ("test"); empty where it has none."""
    try:
        names = OmegaConf.select(cfg, f"dataloader.{kind}.dataset.names")
    except OmegaConfBaseException:  # a list or a number stands in the way
        names = None
    return (names,) if isinstance(names, str) else tuple(names or ())


def distil(
    *,
    student: nn.Module,
    teacher: nn.Module | str,
    weights: str = "",
    losses: list[str] | None = None,
    input_format: str | None = None,
    imports: list[str] | tuple[str, ...] = (),
    datasets: list[str] | tuple[str, ...] = (),
) -> Distiller:
    """
    What ``--teacher`` makes of the model of a LazyConfig.

    Args:
        teacher: a network, or the name of a config (yaml or LazyConfig) or zoo entry, with its weights (empty: the zoo
            entry's checkpoint).
        losses: names of losses, with the options that ``KD.*`` has by default; None: the default losses.
        input_format: channel order of the images; default: the student's.
        imports: modules that register losses of a project.
        datasets: that are trained on; their classes are matched with the teacher's by name.
    """
    cfg = _kd_config(imports)
    cfg.DATASETS.TRAIN = tuple(datasets)
    cfg.MODEL.DEVICE = "cpu"  # the teacher follows the student
    name_teacher(cfg, teacher if isinstance(teacher, str) else "", weights=weights, losses=losses)
    network = build_teacher(cfg) if isinstance(teacher, str) else teacher
    merge_options(cfg, choose_losses(cfg, student, network), where="--teacher")
    built = build_losses(cfg, student, network)
    return Distiller(student=student, teacher=network, losses=built, input_format=input_format)


def plain_student(model: DictConfig) -> DictConfig:
    """The student's node of a Distiller's, or the node of a plain model."""
    target = model._target_
    with contextlib.suppress(Exception):  # no such name, which building the model will tell
        target = locate(target) if isinstance(target, str) else target
    return model.student if target in (Distiller, distil) else model


def networks(cfg: DictConfig) -> dict[str, nn.Module]:
    """The student and, of a Distiller, the teacher's architecture, without weights."""
    ret = {"student": instantiate(plain_student(cfg.model))}
    teacher = _teacher(cfg)
    if isinstance(teacher, str):
        teacher_cfg = _kd_config(cfg.model.imports)
        name_teacher(teacher_cfg, teacher, weights="not read")
        ret["teacher"] = build_teacher_architecture(get_teacher_cfg(teacher_cfg))
    elif teacher is not None:
        ret["teacher"] = instantiate(teacher.get("model", teacher))  # load_teacher(model=..., weights=...)
    return ret


def configured_losses(cfg: DictConfig, *, logged: Collection[str]) -> dict[str, float]:
    """The weights of a config's distillation losses, by name; the default losses are those that a run has logged."""
    if plain_student(cfg.model) is cfg.model:
        return {}
    found = cfg.model.get("losses")
    if isinstance(found, ListConfig) and all(isinstance(node, DictConfig) for node in found):
        names = [getattr(node._target_, "__name__", str(node._target_).rpartition(".")[2]) for node in found]
        return {name.removesuffix("Loss"): node.get("weight", 1.0) for name, node in zip(names, found)}
    kd = _kd_config(cfg.model.imports).KD
    losses = [loss_class(name) for name in found or ()]
    losses = losses or [loss for _, loss in DISTILLATION_LOSS_REGISTRY if f"loss_{loss.name}" in logged]
    return {loss.__name__.removesuffix("Loss"): kd[loss.name.upper()].WEIGHT for loss in losses}


def _teacher(cfg: DictConfig):
    return cfg.model.get("teacher") if plain_student(cfg.model) is not cfg.model else None


def _kd_config(imports) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    for name in imports:
        import_project(cfg, name)
    return cfg
