#!/usr/bin/env python
"""
Detections of a checkpoint by Detectron2 alone: kd_det is never imported. Missing or left-over weights are an error.

    plain_detections.py --config-file student.yaml --weights w.pth --images images.txt --output found.pth
"""

import argparse
import runpy
import sys
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="of the plain model")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="for torch.load: boxes, scores and classes of each image")
    parser.add_argument("--images", required=True, help="text file with the path of one image a line")
    text = "a file that registers the student's backbone, as an exported student has it: backbones/basic_resnet.py"
    parser.add_argument("--register", help=text)
    args = parser.parse_args()
    if args.register:
        runpy.run_path(args.register)
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.MODEL.WEIGHTS = ""
    predictor = DefaultPredictor(cfg)  # with MODEL.WEIGHTS it would only warn of weights that do not fit
    predictor.model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True)["model"])
    found = []
    for path in Path(args.images).read_text().splitlines():
        instances = predictor(read_image(path, format="BGR"))["instances"].to("cpu")
        found.append((instances.pred_boxes.tensor, instances.scores, instances.pred_classes))
    torch.save(found, args.output)
    assert "kd_det" not in sys.modules


if __name__ == "__main__":
    main()
