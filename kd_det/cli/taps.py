"""
List the places of a config's networks that KD.*.STUDENT_TAPS and KD.*.TEACHER_TAPS can name.

    kd-det taps --config-file configs/Quickstart/distilled.yaml
    kd-det taps --config-file any_student.yaml --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml
    kd-det taps --config-file configs/lazy/fcos_R_50_from_R_101_nst_1x.py

No weights are read, and nothing is run on data. Any module's dotted name works as a tap besides those listed.
"""

import argparse

from torch import nn

from kd_det.cli.arguments import config_parser, is_lazy, load_config, parse_arguments
from kd_det.cli.lazy_config import LAZY_SIZE, load_lazy_config, networks
from kd_det.cli.run_tool import run_tool
from kd_det.features.tap_table import format_taps, input_size, list_taps
from kd_det.student import build_student
from kd_det.teachers.build import build_teacher_architecture, get_teacher_cfg

UNREAD = "not read"  # a teacher's config without weights is refused elsewhere


def _networks(args: argparse.Namespace) -> tuple[dict[str, nn.Module], tuple[int, int]]:
    """The networks, by side, and the height and width of an image."""
    if is_lazy(args):
        return networks(load_lazy_config(args)), LAZY_SIZE
    args.teacher_weights = args.teacher_weights or UNREAD
    cfg = load_config(args).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.KD.TEACHER.WEIGHTS = cfg.KD.TEACHER.WEIGHTS or UNREAD
    ret = {"student": build_student(cfg)}
    if cfg.KD.TEACHER.CONFIG_FILE:
        ret["teacher"] = build_teacher_architecture(get_teacher_cfg(cfg))
    return ret, input_size(cfg)


def _print_taps(args: argparse.Namespace) -> None:
    found, size = _networks(args)
    for side, network in found.items():
        print(f"{side}, for images of {size[0]} x {size[1]}:\n{format_taps(list_taps(network, size))}\n")


def get_parser() -> argparse.ArgumentParser:
    return config_parser(__doc__)


def main(argv: list[str] | None = None) -> None:
    run_tool(_print_taps, parse_arguments(get_parser(), argv))
