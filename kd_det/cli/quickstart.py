"""
Distillation from nothing, on the CPU, in minutes: make a data set, train a teacher, a student alone, the same student
with the teacher, and the student alone for as long as that took; and compare them. What is already there is reused.

    kd-det quickstart
    kd-det quickstart --seeds 0 1 2 --output output/quickstart
"""

import argparse
import os
import shlex
import statistics
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
from kd_det.study.results import Record, results_table
from kd_det.visualization import comparison_table

TEACHER, STUDENT = (os.path.relpath(CONFIGS / "Quickstart" / f"{name}.yaml") for name in ("teacher", "student"))
NAMES = ("teacher", "alone", "alone, same time", "distilled")
PICTURED_IMAGES = 50  # of the data set, in the report
# Small enough for a CPU: a digit is 10 to 40 pixels high.
DATASET = "--num-train 2500 --num-val 300 --size 96 --light".split()
# What --teacher turns on, by name: without names it is chosen when the networks are built.
RECIPE = ["--losses", "PKD"], ["KD.INHERIT", "('fpn','proposal_generator','roi_heads')"]


def _quickstart(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    dataset = os.path.join(args.output, "datasets", "digits")
    os.environ["DETECTRON2_DATASETS"] = os.path.dirname(dataset)  # for the commands below
    print(f"export DETECTRON2_DATASETS={shlex.quote(os.path.dirname(dataset))}", flush=True)
    run_command(["-m", "kd_det", "digits", "--output", dataset, *DATASET])
    register_digits(dataset, prefix="quickstart")

    planned = Plan(args, dataset)
    planned.teacher.complete()
    runs = {seed: planned.complete(seed) for seed in args.seeds}
    compared = runs[args.seeds[0]]
    table = comparison_table([(run.name, num_parameters(run.cfg), run.metrics()) for run in compared])
    if len(runs) > 1:
        records = [Record.of(name, run) for i, name in enumerate(NAMES) for run in {r[i] for r in runs.values()}]
        table += "\n\n" + results_table(records)
    table_file, picture, page = (os.path.join(args.output, f) for f in ("table.md", "detections.png", "report.html"))
    with open(table_file, "w") as f:
        f.write(table + "\n")
    draw_runs(picture, "quickstart_coco_val", compared)
    agreement = check_plain(args.output, "quickstart_coco_val", compared[-1])
    write_report({name: [RunFolder(run.output_dir)] for name, run in zip(NAMES, compared)}, page, PICTURED_IMAGES)
    print(f"\n{table}\n\n{what_it_shows(runs)}\n")
    print(f"table       {table_file}\npicture     {picture}\nreport      {page}")
    print(f"checkpoint  {compared[-1].weights}")
    print(f"{agreement}\n{time.perf_counter() - start:.0f} s in all")


class Plan:
    """The runs of the quickstart; each seed's begin with the one teacher."""

    def __init__(self, args: argparse.Namespace, dataset: str):
        self.args, self.data = args, os.path.join(dataset, "dataset.json")
        self.teacher = self._run("teacher", TEACHER, "teacher", 0)

    def alone(self, seed: int) -> Run:
        return self._run("student alone", STUDENT, f"alone_seed{seed}", seed)

    def distilled(self, seed: int) -> Run:
        losses, inherit = RECIPE
        teacher = ["--teacher", TEACHER, "--teacher-weights", self.teacher.weights, *losses]
        return self._run("student distilled", STUDENT, f"distilled_seed{seed}", seed, *teacher, last=inherit)

    def as_long(self, seed: int) -> Run:
        """The student alone with as many steps as it does in the time of the distilled one, which are finished."""
        alone, distilled = self.alone(seed), self.distilled(seed)
        times = [run.metrics().get("time", 1.0) for run in (alone, distilled)]  # a run of three steps tells none
        solver, factor = alone.cfg.SOLVER, max(times[1] / times[0], 1)
        steps, iterations = tuple(round(step * factor) for step in solver.STEPS), round(solver.MAX_ITER * factor)
        longer = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", str(steps)]
        return self._run("student alone, same time", STUDENT, f"as_long_seed{seed}", seed, last=longer)

    def complete(self, seed: int) -> tuple[Run, Run, Run, Run]:
        """Train what is missing of the students; returns all runs in the order of NAMES."""
        alone, distilled = self.alone(seed), self.distilled(seed)
        alone.complete()
        distilled.complete()
        as_long = self.as_long(seed)
        as_long.complete()
        return self.teacher, alone, as_long, distilled

    def _run(self, name: str, config_file: str, folder: str, seed: int, *teacher: str, last=()) -> Run:
        arguments = ["--config-file", config_file, *teacher, "SEED", str(seed), *self.args.opts, *last]
        output_dir = ["OUTPUT_DIR", os.path.join(self.args.output, folder)]
        cfg = load_config(parse_arguments(argument_parser(), [*arguments, *output_dir]))
        return Run(name, ["train", *arguments], cfg, [self.data, *([self.teacher.weights] if teacher else [])])


def what_it_shows(runs: dict[int, tuple[Run, ...]]) -> str:
    """The table in words."""
    scores = zip(*([run.metrics()["bbox/AP"] for run in of_seed] for of_seed in runs.values()))
    teacher, alone, as_long, distilled = (statistics.mean(of_run) for of_run in scores)
    parts = [f"The teacher has {teacher - alone:.1f} AP more than the student alone."]
    if teacher > alone:
        share = 100 * (distilled - alone) / (teacher - alone)
        parts.append(f"Distilled, the student makes up {share:.0f}% of that ({distilled - alone:+.1f} AP);")
    parts.append(f"training alone for the same time gives {as_long - alone:+.1f} AP.")
    seeds = "One seed" if len(runs) == 1 else f"{len(runs)} seeds"
    parts.append(f"{seeds} of drawn digits, {runs[next(iter(runs))][1].cfg.SOLVER.MAX_ITER} steps: a check that all")
    parts.append("works, not what a method is worth on your data.")
    return " ".join(parts)


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    parser.add_argument("--output", default="output/quickstart", help="folder of everything, default %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the students, default 0")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for every training")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_quickstart, get_parser().parse_args(argv))
