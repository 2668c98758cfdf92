"""LazyConfigs (.py): read with one line for what is wrong, with ``--import``, ``--teacher`` and ``--losses``."""

import argparse

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from kd_det.cli.teacher import choose_losses, name_teacher
from kd_det.config import add_kd_config
from kd_det.config_file import check_lazy_key, import_project, merge_options, read_lazy_config
from kd_det.distiller import Distiller
from kd_det.errors import UserError, one_line
from kd_det.losses.build import build_losses
from kd_det.teachers import build_teacher, build_teacher_architecture, get_teacher_cfg

__all__ = ["KEYS", "distil", "load_lazy_config", "networks", "plain_student"]

KEYS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """
    The config of a run: the file with ``KEY=VALUE`` overrides, and a Distiller around its model with ``--teacher``.
    ``UserError`` for a file that is no such config, or an override that does not fit.
    """
    _kd_config(args.imports)
    cfg = read_lazy_config(args.config_file)
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
            imports=args.imports,
        )
    return cfg


def distil(
    *,
    student: nn.Module,
    teacher: nn.Module | str,
    weights: str = "",
    losses: list[str] | None = None,
    input_format: str | None = None,
    imports: list[str] | tuple[str, ...] = (),
) -> Distiller:
    """
    What ``--teacher`` makes of the model of a LazyConfig.

    Args:
        teacher: a network, or the name of a config (yaml or LazyConfig) or zoo entry, with its weights (empty: the zoo
            entry's checkpoint).
        losses: names of losses, with the options that ``KD.*`` has by default; None: the default losses.
        input_format: channel order of the images; default: the student's.
        imports: modules that register losses of a project.
    """
    cfg = _kd_config(imports)
    cfg.MODEL.DEVICE = "cpu"  # the teacher follows the student
    name_teacher(cfg, teacher if isinstance(teacher, str) else "", weights=weights, losses=losses)
    network = build_teacher(cfg) if isinstance(teacher, str) else teacher
    merge_options(cfg, choose_losses(cfg, student, network), where="--teacher")
    built = build_losses(cfg, student, network)
    return Distiller(student=student, teacher=network, losses=built, input_format=input_format)


def plain_student(model: DictConfig) -> DictConfig:
    """The student's node of a Distiller's, or the node of a plain model."""
    wrappers = (Distiller, distil, "kd_det.distiller.Distiller", f"{__name__}.distil")
    return model.student if model._target_ in wrappers else model


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


def _teacher(cfg: DictConfig):
    return cfg.model.get("teacher") if plain_student(cfg.model) is not cfg.model else None


def _kd_config(imports) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    for name in imports:
        import_project(cfg, name)
    return cfg
