"""LazyConfigs (.py): read with one line for what is wrong, with ``--import``, ``--teacher`` and ``--losses``."""

import argparse
import os

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from kd_det.cli.teacher import choose_losses, name_teacher
from kd_det.compat import model_zoo
from kd_det.config import add_kd_config
from kd_det.config_file import import_project, merge_options
from kd_det.distiller import Distiller
from kd_det.errors import IMPORT_HINT, UserError, one_line
from kd_det.losses.build import build_losses
from kd_det.teachers import build_teacher, load_teacher

__all__ = ["KEYS", "distil", "load_lazy_config", "networks", "plain_student"]

KEYS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """
    The config of a run: the file with ``KEY=VALUE`` overrides, and a Distiller around its model with ``--teacher``.
    ``UserError`` for a file that is no such config, or an override that does not fit.
    """
    _kd_config(args.imports)
    try:
        cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    except ModuleNotFoundError as e:
        raise UserError(f"{args.config_file}: {one_line(e)} {IMPORT_HINT}") from e
    except (SyntaxError, HydraException, OmegaConfBaseException) as e:
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
    network = teacher
    if isinstance(teacher, str):
        network = _lazy_teacher(teacher, weights) if teacher.endswith(".py") else build_teacher(cfg)
    merge_options(cfg, choose_losses(cfg, student, network), where="--teacher")
    built = build_losses(cfg, student, network)
    return Distiller(student=student, teacher=network, losses=built, input_format=input_format)


def _lazy_teacher(name: str, weights: str) -> nn.Module:
    is_file = os.path.isfile(name)
    cfg = LazyConfig.load(name) if is_file else model_zoo.get_config(name)
    weights = weights or (cfg.train.init_checkpoint if is_file else model_zoo.get_checkpoint_url(name))
    return load_teacher(model=instantiate(cfg.model), weights=weights)


def plain_student(model: DictConfig) -> DictConfig:
    """The student's node of a Distiller's, or the node of a plain model."""
    wrappers = (Distiller, distil, "kd_det.distiller.Distiller", f"{__name__}.distil")
    return model.student if model._target_ in wrappers else model


def networks(cfg: DictConfig) -> dict[str, nn.Module]:
    """The student and, of a Distiller, the teacher's architecture, without weights."""
    ret = {"student": instantiate(plain_student(cfg.model))}
    if (teacher := _teacher(cfg)) is not None:
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
