"""
Turn weights of torchvision or timm into a file that Detectron2 loads as a detector's backbone: of a ResNet (also
ResNeXt and wide) for Detectron2's own, of any other network for kd_det's timm backbone.

    kd-det convert resnet18-f37072fd.pth R-18.pkl
    kd-det convert mobilenet_v2-b0353104.pth MobileNetV2.pkl --for mobilenetv2_100

Prints the config keys that fit the file. Mean and std default to those of both libraries' ImageNet weights.
"""

import argparse

from kd_det.cli.arguments import describe
from kd_det.cli.run_tool import run_tool
from kd_det.weights.backbone_file import IMAGENET_METADATA, save_backbone
from kd_det.weights.convert import convert_for_timm, convert_resnet, resnet_options
from kd_det.weights.files import read_weights


def _convert(args: argparse.Namespace) -> None:
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


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    parser.add_argument("weights", help="a state dict: .pth, .pt or .safetensors")
    parser.add_argument("output", help="file to write, .pkl")
    parser.add_argument("--for", dest="timm_name", metavar="NAME", help="timm's name of the network, if no ResNet")
    parser.add_argument("--input-format", choices=("RGB", "BGR"), default=IMAGENET_METADATA["input_format"])
    for name in ("pixel_mean", "pixel_std"):
        option = "--" + name.replace("_", "-")
        text = "one number a channel, in 0..255, default %(default)s"
        parser.add_argument(option, nargs=3, type=float, default=IMAGENET_METADATA[name], help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_convert, get_parser().parse_args(argv))
