"""
Distillation from nothing, on the CPU, in minutes: make a data set, train a teacher, a student alone and the same
student with NST and soft targets from the teacher, and compare them. What is already there is reused.

    kd-det quickstart
    kd-det quickstart --seeds 0 1 2 --output output/quickstart
"""

import argparse
import os
import shlex
import time

from kd_det.cli.arguments import argument_parser, describe, load_config, parse_arguments
from kd_det.cli.report import write_report
from kd_det.cli.run_folder import RunFolder
from kd_det.cli.run_tool import run_tool
from kd_det.config_file import CONFIGS
from kd_det.quickstart import register_digits
from kd_det.quickstart.report import check_plain, num_parameters
from kd_det.study import Run, run_command
from kd_det.study.picture import draw_runs
from kd_det.visualization import comparison_table, seeds_table

TEACHER, STUDENT = (
    os.path.relpath(CONFIGS / "Quickstart" / f"{name}.yaml") for name in ("teacher_R_50_FPN", "student_R_18_FPN")
)
NAMES, PICTURED_IMAGES = ("teacher", "alone", "distilled"), 50  # of the runs, and of the data set, in the report
# Small enough for a CPU: a digit is 10 to 40 pixels high.
DATASET = "--num-train 2500 --num-val 300 --size 96 --light".split()


def _quickstart(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    dataset = os.path.join(args.output, "datasets", "digits")
    os.environ["DETECTRON2_DATASETS"] = os.path.dirname(dataset)  # for the commands below
    print(f"export DETECTRON2_DATASETS={shlex.quote(os.path.dirname(dataset))}", flush=True)
    run_command(["-m", "kd_det", "digits", "--output", dataset, *DATASET])
    register_digits(dataset, prefix="quickstart")

    teacher, pairs = plan(args, dataset)
    for run in [teacher, *(run for pair in pairs.values() for run in pair)]:
        run.complete()

    compared = [teacher, *pairs[args.seeds[0]]]
    table = comparison_table([(run.name, num_parameters(run.cfg), run.metrics()) for run in compared])
    if len(pairs) > 1:
        ap = {seed: tuple(run.metrics()["bbox/AP"] for run in pair) for seed, pair in pairs.items()}
        table += "\n\n" + seeds_table(("alone", "distilled"), ap)
    table_file, picture, page = (os.path.join(args.output, f) for f in ("table.md", "detections.png", "report.html"))
    with open(table_file, "w") as f:
        f.write(table + "\n")
    draw_runs(picture, "quickstart_voc_val", compared)  # boxes alone, which is what the runs detect
    agreement = check_plain(args.output, "quickstart_coco_val", compared[-1])
    write_report({name: [RunFolder(run.output_dir)] for name, run in zip(NAMES, compared)}, page, PICTURED_IMAGES)
    print(f"\n{table}\n\ntable       {table_file}\npicture     {picture}\nreport      {page}")
    print(f"checkpoint  {compared[-1].weights}")
    print(f"{agreement}\n{time.perf_counter() - start:.0f} s in all")


def plan(args: argparse.Namespace, dataset: str) -> tuple[Run, dict[int, tuple[Run, Run]]]:
    """The teacher's run, and by seed the student's without and with the teacher."""
    data = os.path.join(dataset, "dataset.json")

    def run(name: str, config_file: str, folder: str, seed: int, *arguments: str, inputs=()) -> Run:
        arguments = ["--config-file", config_file, *arguments, "SEED", str(seed), *args.opts]
        output_dir = ["OUTPUT_DIR", os.path.join(args.output, folder)]
        cfg = load_config(parse_arguments(argument_parser(), [*arguments, *output_dir]))
        return Run(name, ["train", *arguments], cfg, [data, *inputs])

    teacher = run("teacher R-50-FPN", TEACHER, "teacher", 0)
    # The default losses by name: without names they are chosen when the networks are built.
    from_teacher = ["--teacher", TEACHER, "--teacher-weights", teacher.weights, "--losses", "NST,SoftTarget"]
    name, inputs = "student R-18-FPN, NST + soft targets", [teacher.weights]
    pairs = {}
    for seed in args.seeds:
        alone = run("student R-18-FPN alone", STUDENT, f"alone_seed{seed}", seed)
        pairs[seed] = alone, run(name, STUDENT, f"distilled_seed{seed}", seed, *from_teacher, inputs=inputs)
    return teacher, pairs


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    parser.add_argument("--output", default="output/quickstart", help="folder of everything, default %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the students, default 0")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for every training")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_quickstart, get_parser().parse_args(argv))
