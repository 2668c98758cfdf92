#!/usr/bin/env python
"""
Distillation from nothing, on the CPU, in minutes: make a data set, train a teacher, a student alone and the same
student with NST and soft targets from the teacher, and compare them. What is already there is reused.

    tools/quickstart.py [--seeds 0 1 2] [--output output/quickstart]
"""

import argparse
import os
import shlex
import time

import cv2
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from kd_det import student_cfg
from kd_det.cli import run_tool
from kd_det.errors import UserError
from kd_det.quickstart import register_digits
from kd_det.study import Run, run_command
from kd_det.visualization import (
    comparison_table,
    detection_grid,
    draw_detections,
    draw_ground_truth,
    seeds_table,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS, TOOLS = (os.path.relpath(os.path.join(ROOT, path)) for path in ("configs/Quickstart", "tools"))
TEACHER, STUDENT = (os.path.join(CONFIGS, f"{name}.yaml") for name in ("teacher_R_50_FPN", "student_R_18_FPN"))
# Small enough for a CPU: a digit is 10 to 40 pixels high.
DATASET = "--num-train 2500 --num-val 300 --size 96 --light".split()
PICTURED_IMAGES = 6
COMPARED_IMAGES = 50


def main(args):
    start = time.perf_counter()
    dataset = os.path.join(args.output, "datasets", "digits")
    os.environ["DETECTRON2_DATASETS"] = os.path.dirname(dataset)  # for the commands below
    print(f"export DETECTRON2_DATASETS={shlex.quote(os.path.dirname(dataset))}", flush=True)
    run_command([f"{TOOLS}/make_offline_dataset.py", "--output", dataset, *DATASET])
    register_digits(dataset, prefix="quickstart")

    teacher, pairs = plan(args, dataset)
    for run in [teacher, *(run for pair in pairs.values() for run in pair)]:
        run.complete()

    compared = [teacher, *pairs[args.seeds[0]]]
    table = comparison_table([(run.name, parameters(run), run.metrics()) for run in compared])
    if len(pairs) > 1:
        ap = {seed: tuple(run.metrics()["bbox/AP"] for run in pair) for seed, pair in pairs.items()}
        table += "\n\n" + seeds_table(("alone", "distilled"), ap)
    table_file, picture = os.path.join(args.output, "table.md"), os.path.join(args.output, "detections.png")
    with open(table_file, "w") as f:
        f.write(table + "\n")
    draw_picture(picture, compared)
    agreement = check_plain(args.output, compared[-1])
    print(f"\n{table}\n\ntable       {table_file}\npicture     {picture}\ncheckpoint  {compared[-1].weights}")
    print(f"{agreement}\n{time.perf_counter() - start:.0f} s in all")


def plan(args, dataset: str) -> tuple[Run, dict[int, tuple[Run, Run]]]:
    """The teacher's run, and by seed the student's without and with the teacher."""
    data = os.path.join(dataset, "dataset.json")

    def run(name, config_file, folder, seed, *arguments, inputs=()):
        arguments = ["--config-file", config_file, *arguments, "SEED", str(seed), *args.opts]
        return Run(name, f"{TOOLS}/train_net.py", os.path.join(args.output, folder), arguments, [data, *inputs])

    teacher = run("teacher R-50-FPN", TEACHER, "teacher", 0)
    from_teacher = ["--teacher", TEACHER, "--teacher-weights", teacher.weights]
    pairs = {}
    for seed in args.seeds:
        alone = run("student R-18-FPN alone", STUDENT, f"alone_seed{seed}", seed)
        distilled = run(
            "student R-18-FPN, NST + soft targets",
            STUDENT,
            f"distilled_seed{seed}",
            seed,
            *from_teacher,
            inputs=[teacher.weights],
        )
        pairs[seed] = (alone, distilled)
    return teacher, pairs


def parameters(run: Run) -> int:
    """Of the network that is deployed: without teacher and connectors."""
    return sum(parameter.numel() for parameter in build_model(student_cfg(run.cfg())).parameters())


def predictor(run: Run) -> DefaultPredictor:
    cfg = run.cfg().clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = run.weights
    return DefaultPredictor(cfg)


def draw_picture(path: str, runs: list[Run]) -> None:
    """Ground truth and detections on the first images of val."""
    metadata = MetadataCatalog.get("quickstart_coco_val")
    predictors = [predictor(run) for run in runs]
    rows = []
    for record in DatasetCatalog.get("quickstart_coco_val")[:PICTURED_IMAGES]:
        image = cv2.imread(record["file_name"])
        detections = [draw_detections(image, p(image)["instances"], metadata) for p in predictors]
        rows.append([draw_ground_truth(image, record, metadata), *detections])
    cv2.imwrite(path, detection_grid(["ground truth", *(run.name for run in runs)], rows))


def check_plain(output: str, run: Run) -> str:
    """
    Load the distilled checkpoint where kd_det is not imported, and compare detections with the Distiller's.

    Raises:
        UserError: it does not load strictly, or the detections differ.
    """
    config_file, images_file, found_file = (
        os.path.join(output, f"plain_{name}") for name in ("student.yaml", "images.txt", "detections.pth")
    )
    images = [r["file_name"] for r in DatasetCatalog.get("quickstart_coco_val")[:COMPARED_IMAGES]]
    for path, text in ((config_file, student_cfg(run.cfg()).dump()), (images_file, "\n".join(images) + "\n")):
        with open(path, "w") as f:
            f.write(text)
    files = ["--config-file", config_file, "--weights", run.weights, "--images", images_file, "--output", found_file]
    run_command([f"{TOOLS}/plain_detections.py", *files])
    distiller, detections = predictor(run), 0
    for path, (boxes, scores, classes) in zip(images, torch.load(found_file)):
        instances = distiller(cv2.imread(path))["instances"].to("cpu")
        detections += len(instances)
        same = len(boxes) == len(instances) and torch.equal(classes, instances.pred_classes)
        # Bit for bit on the CPU; a GPU may sum in another order.
        same = same and torch.allclose(boxes, instances.pred_boxes.tensor, atol=1e-2)
        if not (same and torch.allclose(scores, instances.scores, atol=1e-4)):
            raise UserError(f"plain Detectron2 and the Distiller disagree on {path}")
    return f"without kd_det  loads strictly, and gives the same {detections} detections on {len(images)} val images"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/quickstart", help="folder of everything, default %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the students, default 0")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for every training")
    return parser


if __name__ == "__main__":
    run_tool(main, get_parser().parse_args())
