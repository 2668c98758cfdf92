#!/usr/bin/env python
"""
Make the offline data set: handwritten digits on photographs, in COCO, Pascal VOC and ImageFolder format.

Downloads nothing. Detectron2 finds it as digits_coco_train, digits_coco_val, digits_voc_train and
digits_voc_val.
"""

import argparse
import logging
import os
import signal
import sys
from dataclasses import fields

from kd_det.data.checks import DatasetError
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


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__)
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


def main(argv=None):
    args = vars(get_parser().parse_args(argv))
    output, overwrite = args.pop("output"), args.pop("overwrite")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what was begun is removed
    try:
        written = make_offline_dataset(output, OfflineDatasetOptions(**args), overwrite=overwrite)
    except (DatasetError, OSError) as e:
        sys.exit(f"error: {e}")
    except ImportError as e:
        sys.exit(f"error: {e}; scikit-learn and scikit-image hold the digits and the photographs")
    print(f"{output}: {'written' if written else 'already there with these options, reused'}")


if __name__ == "__main__":
    main()
