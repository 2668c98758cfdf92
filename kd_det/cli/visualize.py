"""
Draw what a student learned: detections, attention maps of teacher and student before and after training, the channels
that single out the fewest positions, and OFD's margins; one picture for each image and tap, and sheets of them all.

    kd-det visualize --config-file output/config.yaml --num 4 --output pictures
    kd-det visualize --config-file output/config.yaml --weights output/model_best.pth --images a.jpg --taps p3 p4
    kd-det visualize --config-file mine.yaml --weights new.pth --before old.pth

The losses' taps are drawn, and for a config without losses, the backbone's levels.
"""

import argparse
import os

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, Metadata
from torch import nn
from tqdm import tqdm

from kd_det.cli.arguments import config_parser, parse_arguments
from kd_det.cli.networks import LazyNetworks, YamlNetworks, load_records, open_networks
from kd_det.cli.run_tool import run_tool
from kd_det.errors import UserError, one_line
from kd_det.random_state import preserved_random_state
from kd_det.visualization import (
    Row,
    Viewer,
    VisualizationHook,
    attention_row,
    detections_row,
    draw_row,
    read_sample,
    stack,
)
from kd_det.weights.checkpoint import SafeCheckpointer
from kd_det.weights.strict import load_strictly

HOOK_IMAGES = 2  # drawn every VIS_PERIOD


def visualization_hook(cfg: CfgNode, model: nn.Module) -> VisualizationHook:
    """The hook of a run with ``VIS_PERIOD``, with the first images that are tested on (without any, trained on)."""
    records, metadata = load_records([*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN][0])
    with preserved_random_state():  # Detectron2's resizing draws a size, of one
        mapper = DatasetMapper(cfg, is_train=False)
        samples = [read_sample(mapper, record) for record in records[:HOOK_IMAGES]]
    return VisualizationHook(model, samples, metadata, period=cfg.VIS_PERIOD, input_format=cfg.INPUT.FORMAT)


def _visualize(args: argparse.Namespace) -> None:
    networks = open_networks(args)
    if networks.is_classifier:
        raise UserError("kd-det visualize draws detectors, and this config is a classifier's")
    weights = args.weights or _final_weights(args.config_file)
    records, metadata = _images(networks, args)
    mapper, model = networks.mapper(), networks.build()
    if getattr(model, "missing_teacher", None):
        print(f"without the teacher: {one_line(model.missing_teacher)}")
    viewer = Viewer(model, input_format=networks.input_format, pairs=[(tap, tap) for tap in args.taps])
    samples = [read_sample(mapper, record) for record in records]
    seen: list[dict] = [{} for _ in samples]
    for name, path in (("student before", args.before), ("student", weights)):
        try:
            if path:
                load_strictly(model, path, who=name)
            else:  # as training does, which leaves what the file lacks
                SafeCheckpointer(model, save_to_disk=False).resume_or_load(networks.initial_weights, resume=False)
        except (OSError, ValueError) as e:
            if path:
                raise
            print(f"without the student before training: {one_line(e)}")
            continue
        for one, sample in tqdm(zip(seen, samples), name, len(samples), unit="image", disable=None):
            one.update(viewer(sample, name))

    contact_sheet = []
    for i, (sample, one) in enumerate(zip(tqdm(samples, "drawing", unit="image", disable=None), seen)):
        name = f"{i:03d}_{os.path.splitext(os.path.basename(sample.record['file_name']))[0]}"
        detections = detections_row(sample, one, metadata, min_score=args.min_score)
        everything = [draw_row(detections)]
        _write(args.output, f"{name}/detections.png", everything)
        by_tap: dict[str, list] = {}
        for tap, rows in viewer.rows(sample, one):
            by_tap.setdefault(tap, []).extend(draw_row(row) for row in rows)
        for tap, pictures in by_tap.items():
            _write(args.output, f"{name}/{tap}.png", pictures)
            everything += pictures
        _write(args.output, f"{name}.png", everything)
        panels, title = list(detections.panels), name
        for pair, maps in list(viewer.maps(one))[:1]:
            panels += [panel for panel in attention_row(sample, pair, maps).panels if not panel.is_difference]
            title = f"{name}, attention at {pair[0]}"
        contact_sheet.append(draw_row(Row(title, panels)))
    _write(args.output, "contact_sheet.png", contact_sheet)
    print(f"{args.output}: {len(samples)} images, {len(viewer.pairs)} taps; start with contact_sheet.png")


def _final_weights(config_file: str) -> str:
    """Those that a training has left beside its config."""
    path = os.path.join(os.path.dirname(config_file), "model_final.pth")
    if not os.path.isfile(path):
        raise UserError(f"--weights is missing, and beside the config there is no {path}")
    return path


def _images(networks: YamlNetworks | LazyNetworks, args: argparse.Namespace) -> tuple[list[dict], Metadata]:
    """The images to draw, and the metadata of their classes; without a data set, classes are numbers."""
    if args.num < 1:
        raise UserError(f"--num must be at least 1, found {args.num}")
    if not args.images:
        try:
            records, metadata = networks.records()
        except UserError as e:
            raise UserError(f"{e}: name images by --images") from None
        return records[: args.num], metadata
    for path in args.images:
        if not os.path.isfile(path):
            raise UserError(f"--images: {path} does not exist")
    records = [{"file_name": path} for path in args.images]
    try:
        return records, networks.records()[1]
    except (OSError, ValueError):
        return records, Metadata()


def _write(folder: str, name: str, pictures: list[np.ndarray]) -> None:
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    cv2.imwrite(path, stack(pictures))


def get_parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__)
    text = "the student's; default: model_final.pth beside the config, where a training has left both"
    parser.add_argument("--weights", metavar="FILE", help=text)
    text = "its weights before; default: the config's, and by its seed what they lack, as training began"
    parser.add_argument("--before", metavar="FILE", help=text)
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="default: the first of DATASETS.TEST")
    parser.add_argument("--num", type=int, default=8, help="how many of DATASETS.TEST, default %(default)s")
    parser.add_argument("--taps", nargs="+", default=[], metavar="TAP", help="default: those that the losses read")
    parser.add_argument("--min-score", type=float, default=0.5, help="of drawn detections, default %(default)s")
    parser.add_argument("--output", default="pictures", metavar="FOLDER", help="default %(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_visualize, parse_arguments(get_parser(), argv))
