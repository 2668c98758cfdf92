"""The networks, and the weights that they start from."""

from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from kd_det.cli.checks.run import PlannedRun, naming
from kd_det.cli.teacher import choose_losses
from kd_det.config_file import merge_options
from kd_det.distiller import Distiller
from kd_det.engine.teacher_evaluation import TeacherDetector
from kd_det.errors import IMPORT_HINT, UserError, unknown_name
from kd_det.random_state import preserved_random_state
from kd_det.student import build_student
from kd_det.teachers import build_teacher
from kd_det.weights.backbone_file import check_normalisation
from kd_det.weights.strict import check_initial_weights, load_strictly


def check_model(run: PlannedRun) -> None:
    """Build the run's networks once, on the CPU: taps, losses and the teacher's weights are checked by that."""
    cfg = run.cfg
    registered = [name for name, _ in META_ARCH_REGISTRY]
    if cfg.MODEL.META_ARCHITECTURE not in registered:
        message = unknown_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, registered)
        raise UserError(f"{message} {IMPORT_HINT}")
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    if len(mean) != len(std) or not mean:
        raise UserError(f"MODEL.PIXEL_MEAN and PIXEL_STD need a number a channel, found {mean} and {std}")
    if not all(value > 0 for value in std):
        raise UserError(f"MODEL.PIXEL_STD must be positive, found {std}")
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    with preserved_random_state(), naming("the model of this config"):
        if not run.args.teacher or run.args.eval_only:
            run.model = build_model(on_cpu)
            missing = getattr(run.model, "missing_teacher", None)
            if missing is not None and run.trains:
                raise missing
            return
        networks = {"student": build_student(on_cpu), "teacher": build_teacher(on_cpu)}
        chosen = choose_losses(cfg, **networks, opts=run.args.opts)
        run.args.opts = [*run.args.opts, *chosen]
        run.cfg = cfg.clone()
        run.cfg.defrost()
        for either in (on_cpu, run.cfg):
            merge_options(either, chosen, where="--teacher")
        run.cfg.freeze()
        run.model = Distiller(on_cpu, **networks)


def check_teacher_evaluation(run: PlannedRun) -> None:
    """``KD.TEACHER.EVALUATE``: whether there is something to evaluate, and to evaluate on."""
    teacher = getattr(run.model, "teacher", None)
    if teacher is None or not run.trains or not run.cfg.KD.TEACHER.EVALUATE:
        return
    if not run.test_sets:
        raise UserError("KD.TEACHER.EVALUATE needs data sets to evaluate on, and DATASETS.TEST is empty")
    classes = run.datasets[run.test_sets[0]].thing_classes if run.datasets else ()
    known = {"classes": classes, "class_map": run.cfg.KD.TEACHER.CLASS_MAP}
    TeacherDetector(run.student, teacher, input_format=run.cfg.INPUT.FORMAT, **known)


def check_norms(run: PlannedRun) -> None:
    on_cpu = not run.cfg.MODEL.DEVICE.startswith("cuda")
    if on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in run.model.modules()):
        raise UserError("the norm 'SyncBN' runs on GPUs only; on the CPU take 'naiveSyncBN'")


def check_weights(run: PlannedRun) -> None:
    path, who = run.cfg.MODEL.WEIGHTS, "student (MODEL.WEIGHTS)"
    if not path or (run.args.resume and not run.trains):
        return
    check = check_initial_weights if run.trains else load_strictly
    check_normalisation(check(run.student, path, who=who), run.cfg)
