"""
Make the offline data set: handwritten digits on photographs, in COCO, Pascal VOC and ImageFolder format.

    kd-det digits
    kd-det digits --output /data/digits --num-train 500 --size 96 --light

Downloads nothing. Detectron2 finds it as digits_coco_train, digits_coco_val, digits_voc_train and
digits_voc_val.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
from dataclasses import fields

from kd_det.cli.arguments import describe
from kd_det.cli.run_tool import run_tool
from kd_det.errors import UserError
from kd_det.quickstart.offline import OfflineDatasetOptions, make_offline_dataset

HELP = {
    "num_train": "training images",
    "num_val": "validation images",
    "size": "side of an image in pixels",
    "num_crops": "training crops for classification, 0 for none",
    "num_val_crops": "validation crops for classification, 0 for none",
    "crop_size": "side of a crop in pixels",
    "seed": "another seed, another data set",
    "light": "light digits on dimmed photographs: easier, to learn in minutes",
}


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("--output", default=os.path.join(root, "digits"), help="folder, default %(default)s")
    for field in fields(OfflineDatasetOptions):
        option = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(option, action="store_true", help=HELP[field.name])
            continue
        text = f"{HELP[field.name]}, default %(default)s"
        parser.add_argument(option, type=int, default=field.default, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a data set made before")
    return parser


def _make(output: str, overwrite: bool, options: dict) -> None:
    try:
        written = make_offline_dataset(output, OfflineDatasetOptions(**options), overwrite=overwrite)
    except ImportError as e:
        raise UserError(f"{e}; scikit-learn and scikit-image hold the digits and the photographs") from e
    print(f"{output}: {'written' if written else 'already there with these options, reused'}")
    folder, name = os.path.split(os.path.abspath(output))
    if name == "digits":  # Detectron2 finds it under that name only
        train = "kd-det train --config-file configs/Quickstart/student.yaml"
        print(f"Next: DETECTRON2_DATASETS={shlex.quote(folder)} {train}")


def main(argv: list[str] | None = None) -> None:
    options = vars(get_parser().parse_args(argv))
    output, overwrite = options.pop("output"), options.pop("overwrite")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what was begun is removed
    run_tool(_make, output, overwrite, options)
