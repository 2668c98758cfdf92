#!/usr/bin/env python
"""
Detections of a checkpoint by Detectron2 alone: kd_det is never imported. Missing or left-over weights are an error.

    plain_detections.py --config-file student.yaml --weights w.pth --images images.txt --output found.pth
"""

import argparse
import sys

import torch
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor


class StrictPredictor(DefaultPredictor):
    """Detectron2's ``DefaultPredictor``, which only warns of weights that do not fit."""

    def __init__(self, cfg, weights):
        super().__init__(cfg)
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"], strict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="of the plain model")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="for torch.load: boxes, scores and classes of each image")
    parser.add_argument("--images", required=True, help="text file with the path of one image a line")
    args = parser.parse_args()
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.MODEL.WEIGHTS = ""
    predictor = StrictPredictor(cfg, args.weights)
    with open(args.images) as f:
        paths = f.read().splitlines()
    found = []
    for path in paths:
        instances = predictor(read_image(path, format="BGR"))["instances"].to("cpu")
        found.append((instances.pred_boxes.tensor, instances.scores, instances.pred_classes))
    torch.save(found, args.output)
    assert "kd_det" not in sys.modules


if __name__ == "__main__":
    main()
