"""
Turn weights of torchvision or timm into a file that Detectron2 loads as a detector's backbone: of a ResNet (also
ResNeXt and wide) for Detectron2's own, of any other network for kd_det's timm backbone. Or turn a whole detector of
torchvision into one of Detectron2.

    kd-det convert resnet18-f37072fd.pth R-18.pkl
    kd-det convert mobilenet_v2-b0353104.pth MobileNetV2.pkl --for mobilenetv2_100
    kd-det convert fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth v2.pth --detector fasterrcnn_resnet50_fpn_v2

Prints the config keys that fit the file; a detector's config is written beside it, v2.yaml. Mean and std default to
those of both libraries' ImageNet weights.
"""

import argparse
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg

from kd_det.cli.arguments import describe
from kd_det.cli.run_tool import run_tool
from kd_det.config import add_kd_config
from kd_det.errors import UserError
from kd_det.teachers.build import build_teacher, get_teacher_cfg
from kd_det.teachers.feature_teacher import FeatureTeacher
from kd_det.weights.backbone_file import IMAGENET_METADATA, save_backbone
from kd_det.weights.convert import convert_for_timm, convert_resnet, resnet_options
from kd_det.weights.files import read_weights, write_aside


def _convert(args: argparse.Namespace) -> None:
    if args.detector:
        return _convert_detector(args)
    state = read_weights(args.weights, who="backbone")
    if args.timm_name:
        weights = convert_for_timm(state, args.timm_name)
        options = {"BACKBONE.NAME": "build_timm_fpn_backbone", "TIMM.NAME": args.timm_name}
    else:
        weights = convert_resnet(state)
        options = {f"RESNETS.{key}": value for key, value in resnet_options(weights).items()}
    images = {name: getattr(args, name) for name in IMAGENET_METADATA}
    save_backbone(args.output, weights, {**images, "model": options})
    print(f"{args.output}: {len(weights)} weights. It fits a config with")
    print(f"  MODEL.WEIGHTS {args.output}")
    for key, value in options.items():
        print(f"  MODEL.{key} {value}")
    print(f"  INPUT.FORMAT {args.input_format}")
    print(f"  MODEL.PIXEL_MEAN {args.pixel_mean}")
    print(f"  MODEL.PIXEL_STD {args.pixel_std}")


def _convert_detector(args: argparse.Namespace) -> None:
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS = f"torchvision://{args.detector}", args.weights
    detector = build_teacher(cfg)
    if isinstance(detector, FeatureTeacher):
        raise UserError(f"torchvision's {args.detector!r} is no detector that Detectron2 has")
    found, config = get_teacher_cfg(cfg), Path(args.output).with_suffix(".yaml")
    if str(config) == args.output:
        raise UserError(f"{args.output!r} is the name of the config; expected one of a file of weights, .pth")
    write_aside(args.output, lambda file: torch.save({"model": detector.state_dict()}, file))
    plain = _keys_of(get_cfg(), found)
    plain.MODEL.WEIGHTS = args.output
    config.write_text(plain.dump())
    print(f"{args.output}: {sum(p.numel() for p in detector.parameters()):,} parameters, of {config}. Next:")
    print(f"  kd-det train --config-file STUDENT.yaml --teacher {config}")


def _keys_of(cfg: CfgNode, values: CfgNode) -> CfgNode:
    """A config with values of another one that has more keys."""
    for key, own in cfg.items():
        cfg[key] = _keys_of(own, values[key]) if isinstance(own, CfgNode) else values[key]
    return cfg


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    parser.add_argument("weights", help="a state dict: .pth, .pt or .safetensors")
    parser.add_argument("output", help="file to write, .pkl; of a detector .pth")
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--for", dest="timm_name", metavar="NAME", help="timm's name of the network, if no ResNet")
    of.add_argument("--detector", metavar="NAME", help="torchvision's name of the detector, to convert it as a whole")
    parser.add_argument("--input-format", choices=("RGB", "BGR"), default=IMAGENET_METADATA["input_format"])
    for name in ("pixel_mean", "pixel_std"):
        option = "--" + name.replace("_", "-")
        text = "one number a channel, in 0..255, default %(default)s"
        parser.add_argument(option, nargs=3, type=float, default=IMAGENET_METADATA[name], help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_convert, get_parser().parse_args(argv))
