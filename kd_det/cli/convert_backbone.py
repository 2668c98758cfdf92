"""
Turn the weights of a torchvision or timm ResNet (also ResNeXt and wide) into a file that Detectron2 loads as a
detector's backbone.

    kd-det convert-backbone resnet18-f37072fd.pth R-18.pkl

Prints the config keys that fit the file. Mean and std default to those of both libraries' ImageNet weights.
"""

import argparse

from kd_det.cli.arguments import describe
from kd_det.cli.run_tool import run_tool
from kd_det.weights.convert import IMAGENET_METADATA, convert_resnet, read_weights, resnet_options, save_backbone

__all__ = ["main"]


def _convert(args: argparse.Namespace) -> None:
    weights = convert_resnet(read_weights(args.weights))
    options = resnet_options(weights)
    images = {name: getattr(args, name) for name in IMAGENET_METADATA}
    save_backbone(args.output, weights, {**images, "resnet": options})
    print(f"{args.output}: {len(weights)} weights. It fits a config with")
    print(f"  MODEL.WEIGHTS {args.output}")
    for key, value in options.items():
        print(f"  MODEL.RESNETS.{key} {value}")
    print(f"  INPUT.FORMAT {args.input_format}")
    print(f"  MODEL.PIXEL_MEAN {args.pixel_mean}")
    print(f"  MODEL.PIXEL_STD {args.pixel_std}")


def main(argv: list[str] | None = None) -> None:
    parser = describe(argparse.ArgumentParser(), __doc__)
    parser.add_argument("weights", help="a state dict: .pth, .pt or .safetensors")
    parser.add_argument("output", help="file to write, .pkl")
    parser.add_argument("--input-format", choices=("RGB", "BGR"), default=IMAGENET_METADATA["input_format"])
    for name in ("pixel_mean", "pixel_std"):
        option = "--" + name.replace("_", "-")
        text = "one number a channel, in 0..255, default %(default)s"
        parser.add_argument(option, nargs=3, type=float, default=IMAGENET_METADATA[name], help=text)
    run_tool(_convert, parser.parse_args(argv))
