"""
Write one page about one or more trainings, a single file that opens in any browser without a network: table, curves, AP
by class, loss sizes, step time, command, versions, config, and, where data set and weights are there, the images on
which teacher and student disagree, and their attention.

    kd-det report output --out report.html
    kd-det report teacher=out/teacher alone=out/alone distilled=out/distilled --out report.html
    kd-det report output --num 200
"""

import argparse
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from detectron2.data import Metadata
from tqdm import tqdm

from kd_det.cli.arguments import describe
from kd_det.cli.compare import add_runs
from kd_det.cli.run_folder import RunFolder, open_runs, summarize
from kd_det.cli.run_tool import run_tool
from kd_det.errors import UserError, one_line
from kd_det.visualization import ReportedRun, Row, Viewer, attention_row, detections_row, read_sample, render_report
from kd_det.visualization.detections import found_objects
from kd_det.visualization.tables import table_cells
from kd_det.weights.strict import load_strictly

MOST_PICTURES = 4  # images under a headline
FIRST_IMAGES, ATTENTION_TAPS = 2, 4  # whose detections and attention are shown
WIDTH = 480  # of drawn detections, in pixels
TEACHER_RIGHT, STUDENT_RIGHT = "The teacher finds what the student misses", "The student finds what the teacher misses"


def write_report(runs: Mapping[str, Sequence[RunFolder]], out: str, num_images: int) -> None:
    """
    Write the page, and print what it is.

    Args:
        runs: by name, one folder or those of several seeds.
        out: the file.
        num_images: on which teacher and student are compared.
    """
    reported, summaries = [], []
    for name, folders in runs.items():
        print(f"{name}: reading {', '.join(folder.path for folder in folders)}", flush=True)
        summaries.append(summarize(name, folders))
        for folder in folders:
            own = name if len(folders) == 1 else f"{name}: {os.path.basename(folder.path)}"
            reported.append(_describe(own, folder, num_images))
    curves = {name: [folder.history for folder in folders] for name, folders in runs.items()}
    page = render_report(reported, table_cells(summaries), curves)
    with open(out, "w") as file:
        file.write(page)
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser")


def _describe(name: str, run: RunFolder, num_images: int) -> ReportedRun:
    ret = ReportedRun(name, run.history, _facts(run))
    arguments = run.logged(r"Command line arguments: (.*)$")
    ret.command = run.logged(r"kd_det INFO: Command: (.*)$") or arguments
    environment = re.search(r"Environment info:\s*\n-[- ]+\n(.*?)\n-[- ]+\n", run.log, re.DOTALL)
    for line in environment[1].splitlines() if environment else ():
        key, _, value = line.partition("  ")
        ret.versions[key] = re.sub(r" @\S+", "", value.strip())
    if not run.log:
        ret.left_out.append("Command and versions are left out: the folder has no log.txt.")
    try:
        ret.config = run.networks.changed_keys()
        _add_pictures(ret, run, num_images)
    except (KeyError, OSError, ValueError) as e:  # KeyError: a backbone of a project that is not imported
        ret.left_out.append(f"Pictures are left out: {one_line(e)}")
    return ret


def _facts(run: RunFolder) -> dict[str, str]:
    times, loading = (list(run.history.values.get(key, {}).values()) for key in ("time", "data_time"))
    memory = [int(value) for value in re.findall(r"max_mem: (\d+)M", run.log)]
    ret = {"folder": run.path, "steps": str(run.steps)}
    if times:
        ret["step time"] = f"{statistics.median(times):.3f} s"
        ret["of which loading"] = f"{statistics.median(loading):.3f} s" if loading else "unknown"
        ret["training time"] = f"{run.history.hours(np.array([run.steps]))[0]:.2f} h of steps"
    ret["GPU memory"] = f"{max(memory):,} MB at most" if memory else "not logged (a CPU, or no log.txt)"
    return ret


def _add_pictures(page: ReportedRun, run: RunFolder, num_images: int) -> None:
    networks = run.networks
    if networks.is_classifier:
        raise UserError("they are drawn of detectors only.")
    if not os.path.isfile(run.weights):
        raise UserError(f"there is no {run.weights}.")
    records, metadata = networks.records()
    mapper, model = networks.mapper(), networks.build()
    load_strictly(model, run.weights, who="student")
    viewer = Viewer(model, input_format=networks.input_format)
    detections, attention, teacher = [], [], None
    name = "student" if getattr(model, "teacher", None) is not None else "detector"
    for record in records[:FIRST_IMAGES]:
        sample = read_sample(mapper, record)
        seen = viewer(sample, name)
        teacher = seen.get("teacher")
        title = os.path.basename(record["file_name"])
        detections.append(Row(title, detections_row(sample, seen, metadata, width=WIDTH).panels))
        rows = [attention_row(sample, pair, maps) for pair, maps in list(viewer.maps(seen))[:ATTENTION_TAPS]]
        if teacher is None:  # one panel a tap: side by side
            rows = [Row("attention", [replace(row.panels[0], title=row.title) for row in rows])]
        attention += [Row(f"{title}: {row.title}", row.panels) for row in rows]
    if teacher is not None and teacher.instances is not None:
        page.pictures |= _disagreements(mapper, viewer, records[:num_images], metadata)
    else:
        missing = getattr(model, "missing_teacher", None)
        reason = one_line(missing) if missing else "the run has no teacher that detects."
        page.left_out.append(f"Teacher and student are not compared image by image: {reason}")
    page.pictures |= {"Detections": detections, "Attention": attention}


def _disagreements(mapper: Callable, viewer: Viewer, records: list[dict], metadata: Metadata) -> dict[str, list[Row]]:
    """The images with the most objects that one of the two networks finds and the other misses, by headline."""
    found: dict[str, list[tuple[int, Row]]] = {TEACHER_RIGHT: [], STUDENT_RIGHT: []}
    for record in tqdm(records, "teacher and student", unit="image", disable=None):
        sample = read_sample(mapper, record)
        seen = viewer(sample)
        theirs, own = (found_objects(record, seen[who].instances) for who in ("teacher", "student"))
        for headline, missed in ((TEACHER_RIGHT, theirs & ~own), (STUDENT_RIGHT, own & ~theirs)):
            if missed.any():
                objects = f"{len(own)} object{'s' * (len(own) > 1)}"
                title = (
                    f"{os.path.basename(record['file_name'])}: of {objects}, the teacher finds {int(theirs.sum())} and "
                    f"the student {int(own.sum())}"
                )
                row = Row(title, detections_row(sample, seen, metadata, width=WIDTH).panels)
                found[headline].append((int(missed.sum()), row))
    ret = {}
    for headline, rows in found.items():
        if rows:
            rows.sort(key=lambda pair: -pair[0])
            ret[f"{headline}: {len(rows)} of {len(records)} images"] = [row for _, row in rows[:MOST_PICTURES]]
    return ret


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    add_runs(parser)
    parser.add_argument("--out", default="report.html", metavar="FILE", help="default %(default)s")
    text = "images of DATASETS.TEST that teacher and student are compared on, default %(default)s"
    parser.add_argument("--num", type=int, default=50, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    run_tool(lambda: write_report(open_runs(args.runs), args.out, args.num))
