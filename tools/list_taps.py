#!/usr/bin/env python
"""
List the places of a config's networks that KD.*.STUDENT_TAPS and KD.*.TEACHER_TAPS can name.

    tools/list_taps.py --config-file configs/Quickstart/student_distilled.yaml
    tools/list_taps.py --config-file any_student.yaml --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml

No weights are read, and nothing is run on data. Any module's dotted name works as a tap besides those listed.
"""

from kd_det import build_student, build_teacher_architecture
from kd_det.cli import argument_parser, load_config, parse_arguments, run_tool
from kd_det.features.tap_table import format_taps, input_size, list_taps
from kd_det.teachers.build import get_teacher_cfg

UNREAD = "not read"  # a teacher's config without weights is refused elsewhere


def main(args):
    args.teacher_weights = args.teacher_weights or UNREAD
    cfg = load_config(args)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.KD.TEACHER.WEIGHTS = cfg.KD.TEACHER.WEIGHTS or UNREAD
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        cfg.KD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    networks = {"student": build_student(cfg)}
    if cfg.KD.TEACHER.CONFIG_FILE:
        networks["teacher"] = build_teacher_architecture(get_teacher_cfg(cfg))
    size = input_size(cfg)
    for side, network in networks.items():
        print(f"{side}, for images of {size[0]} x {size[1]}:\n{format_taps(list_taps(network, size))}\n")


if __name__ == "__main__":
    run_tool(main, parse_arguments(argument_parser()))
