"""
Train several configs, each with several seeds, several at a time, and compare them: a table, curves, and a picture of
ground truth and detections. Runs that are finished are not repeated, interrupted ones are resumed; a finished run of
another config, or older than what it starts from, is moved to FOLDER.old and trained again.

    kd-det study alone.yaml distilled.yaml --seeds 0 1 2 --output output/study
    kd-det study configs/Study/digits.yaml --jobs 2
    kd-det study configs/Study/digits.yaml --rows alone "NST*" --seeds 0

A study file (yaml) has "rows": {GROUP: {NAME: ARGUMENTS of kd-det train, or "pretrain" and those of kd-det pretrain}},
and may have "seeds", "seeds_of": {NAME: [SEED, ...]}, "output", "results" (a JSON file that keeps what runs gave; from
it tables and curves are made, beside it) and "pictured" (names of rows). A row may start from what another wrote:
KD.TEACHER.WEIGHTS or MODEL.WEIGHTS OUTPUT/NAME/seed_SEED/model_final.pth. Gains are over the row "alone", also as part
of the gap to the row "teacher".
"""

import argparse
import fnmatch
import os
import re
import shlex
from dataclasses import dataclass, field, fields

import yaml

from kd_det.classification.trainer import is_classifier
from kd_det.cli.arguments import argument_parser, describe, load_config, parse_arguments, refuse
from kd_det.cli.run_tool import run_tool
from kd_det.cli.teacher import UNDECIDED
from kd_det.errors import UserError, unknown_name
from kd_det.losses.build import enabled_loss_classes
from kd_det.study.parallel import complete_all
from kd_det.study.picture import draw_runs
from kd_det.study.results import Record, Results, results_table
from kd_det.study.runs import Run
from kd_det.visualization import draw_curves


@dataclass
class Study:
    """What a study file says; ``rows``: arguments by group and name."""

    rows: dict[str, dict[str, str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output: str = "output/study"
    results: str = ""
    pictured: list[str] = field(default_factory=list)
    seeds_of: dict[str, list[int]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [name for group in self.rows.values() for name in group]


def read_study(path: str) -> Study:
    """A study file; ``UserError`` for what is none."""
    with open(path) as file:
        try:
            found = yaml.safe_load(file)
        except yaml.YAMLError as e:
            raise UserError(f"{path} is no yaml: {e}") from e
    for key in found:
        if key not in (keys := [field.name for field in fields(Study)]):
            raise UserError(f"{path}: {unknown_name('key of a study', key, keys)}")
    groups = found.get("rows")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) and group for group in groups.values()):
        raise UserError(f"{path}: expected rows: {{GROUP: {{NAME: ARGUMENTS}}}}, found {groups!r}")
    study = Study(**found)
    names = study.names()
    for name, arguments in ((name, group[name]) for group in groups.values() for name in group):
        if not isinstance(arguments, str) or not arguments.strip():
            raise UserError(f"{path}: expected the arguments of row {name} as a text, found {arguments!r}")
    for seeds in (study.seeds, *study.seeds_of.values()):
        if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
            raise UserError(f"{path}: expected seeds as a list of whole numbers, found {seeds!r}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two rows are named {', '.join(repeated)}")
    for name in [*study.pictured, *study.seeds_of]:
        if name not in names:
            raise UserError(f"{path}: {unknown_name('row', name, names)}")
    return study


def planned(study: Study) -> dict[str, list[Run]]:
    """The runs of each row by seed. Not checked yet; ``ValueError`` for a config that cannot be read."""
    return {
        name: [_run(study, name, arguments, seed) for seed in study.seeds_of.get(name, study.seeds)]
        for group in study.rows.values()
        for name, arguments in group.items()
    }


def _run(study: Study, name: str, arguments: str, seed: int) -> Run:
    words = shlex.split(arguments)
    command = words.pop(0) if words[0] == "pretrain" else "train"
    words += ["SEED", str(seed)]
    folder = os.path.join(study.output, name.replace("/", "_").replace(" ", "_"), f"seed_{seed}")
    parser = argument_parser()
    parser.error = refuse
    try:
        cfg = load_config(parse_arguments(parser, [*words, "OUTPUT_DIR", folder]))
        if cfg.KD.LOSSES == UNDECIDED:
            raise UserError("--teacher needs --losses here, e.g. --losses PKD")
        if cfg.MODEL.META_ARCHITECTURE == "Distiller":
            enabled_loss_classes(cfg)  # unknown names
    except (ValueError, OSError) as e:
        raise UserError(f"row {name}: {e}") from e
    task = "classification" if is_classifier(cfg) else "bbox"
    run = Run(f"{name}, seed {seed}", [command, *words], cfg, task=task)
    run.inputs = [w for w in (cfg.KD.TEACHER.WEIGHTS, cfg.MODEL.WEIGHTS) if w and "://" not in w]
    return run


def _study(args: argparse.Namespace) -> None:
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, found {args.jobs}")
    study = _given(args)
    names = study.names()
    rows = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows or ["*"])]
    if not rows:
        raise UserError(f"--rows {' '.join(args.rows)} fits no row; the rows are {', '.join(names)}")
    plan = planned(study)
    wanted = [run for name in rows for run in plan[name] if args.seeds is None or run.cfg.SEED in args.seeds]
    results = Results(study.results or os.path.join(study.output, "results.json"))
    row_of = {run: name for name, runs in plan.items() for run in runs}
    if not args.only_show:
        missing = _with_inputs([run for run in wanted if not results.find(row_of[run], run)], list(row_of))
        print(f"{len(wanted)} runs, {len(missing)} of them to do, {args.jobs} at a time", flush=True)
        complete_all(missing, jobs=args.jobs, finished=lambda run: _keep(results, row_of[run], run, names))
    show(study, plan, results)


def _given(args: argparse.Namespace) -> Study:
    """The study of the command line: a file of one, or configs."""
    if len(args.files) == 1:
        with open(args.files[0]) as file:
            is_study = re.search("^rows:", file.read(), re.MULTILINE)
        if is_study:
            if args.opts or args.imports:
                raise UserError("--opts and --import are for configs; in a study file they stand in the rows")
            study = read_study(args.files[0])
            study.output = args.output or study.output
            return study
    names = [os.path.splitext(os.path.basename(path))[0] for path in args.files]
    imports = [word for module in args.imports for word in ("--import", module)]
    rows = {name: shlex.join([*imports, "--config-file", path, *args.opts]) for name, path in zip(names, args.files)}
    if len(rows) < len(names):
        raise UserError(f"configs of the same name: {', '.join(args.files)}; name the rows in a study file")
    return Study({"configs": rows}, args.seeds or [0, 1, 2], args.output or "output/study", pictured=names[:4])


def _with_inputs(runs: list[Run], every: list[Run]) -> list[Run]:
    """These runs and those that make what they start from and is not there, in the order of ``every``."""
    made = {run.weights: run for run in every}
    needed, found = list(runs), set()
    while needed:
        run = needed.pop()
        found.add(run)
        needed += [made[path] for path in run.inputs if path in made and made[path] not in found]
    return [run for run in every if run in found]


def _keep(results: Results, row: str, run: Run, names: list[str]) -> None:
    if not results.find(row, run):
        results.add(Record.of(row, run), names)


def show(study: Study, plan: dict[str, list[Run]], results: Results) -> None:
    """Write the tables, the curves and the picture of what is finished beside the results, and print the first."""
    kept = {(name, run.cfg.SEED): run for name, runs in plan.items() for run in runs}
    records = [record for record in results.records if (record.row, record.seed) in kept]
    if not records:
        return print("nothing is finished")
    if stale := [r for r in records if not results.find(r.row, kept[r.row, r.seed])]:
        print(f"{len(stale)} results are of another config, or of other defaults, than now: {stale[0].row}, ...")
    base = os.path.splitext(results.path)[0]
    os.makedirs(os.path.dirname(os.path.abspath(base)), exist_ok=True)
    table, pictured = f"{base}.md", f"{base}_detections.png"
    tables = study_tables(study, records)
    with open(table, "w") as file:
        file.write(tables)
    names = study.pictured or study.names()[:4]
    histories = {name: [r.history() for r in records if r.row == name] for name in names}
    curves = draw_curves(base, {k: v for k, v in histories.items() if v})
    firsts = [plan[name][0] for name in names if os.path.isfile(plan[name][0].weights)]
    firsts = [run for run in firsts if run.task == "bbox"]
    print(f"\n{tables}\n{results.path}, {table}, {', '.join(curves)}", end="\n" if not firsts else f", {pictured}\n")
    if firsts:
        draw_runs(pictured, firsts[0].cfg.DATASETS.TEST[0], firsts)


def study_tables(study: Study, records: list[Record]) -> str:
    """A table for each group of rows, in Markdown; teacher and student alone stand in each that has their metric."""
    ret = []
    for group, rows in study.rows.items():
        names = {"teacher", "alone", *rows}
        found = [record for record in records if record.row in names]
        if own := [record for record in found if record.row in rows]:
            metric = "bbox/AP" if "bbox/AP" in own[0].scores else next(iter(own[0].scores))
            found = [record for record in found if metric in record.scores]
            ret.append(f"**{group}**\n\n{results_table(found, metric=metric)}\n")
    return "\n".join(ret)


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a study file, or configs")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these, also as patterns: 'NST*'")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these; of configs, default 0 1 2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, default %(default)s")
    parser.add_argument("--output", metavar="FOLDER", help="default: the study's, or output/study")
    parser.add_argument("--only-show", action="store_true", help="run nothing, draw what is finished")
    text = "a module or .py file that registers the data sets of configs; may be repeated"
    parser.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help=text)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for every config")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_study, get_parser().parse_args(argv))
