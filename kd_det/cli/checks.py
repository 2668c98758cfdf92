"""What is wrong with a run, found before anything is written and before any image is trained on."""

import argparse
import contextlib
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import build as detectron2_build
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver import build_lr_scheduler
from PIL import Image
from torch import nn

from kd_det.classification.checks import check_input
from kd_det.classification.data import check_classes
from kd_det.classification.trainer import is_classifier
from kd_det.cli.class_lists import check_class_lists
from kd_det.data import check_dataset, check_voc_evaluation
from kd_det.engine.step import NON_FINITE
from kd_det.engine.stopping import restartable
from kd_det.engine.trainer import EVALUATORS
from kd_det.errors import UserError, unknown_name
from kd_det.random_state import preserved_random_state
from kd_det.weights.backbone_file import check_normalisation
from kd_det.weights.strict import check_initial_weights, load_strictly

__all__ = ["check_run"]


@restartable()
def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Check everything that can be known before training: solver values, the output folder, the networks with their
    taps, losses and teacher's weights (they are built once on the CPU), the initial weights, the data sets.

    Under torchrun, only the first process of each machine checks.

    Args:
        cfg: the config of the run.
        args: its command line, see :func:`kd_det.engine.argument_parser`.

    Raises:
        ValueError, OSError: with one line for the user.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    _check_output_dir(cfg.OUTPUT_DIR)
    if args.eval_only:
        _check_evaluation(cfg, args.resume)
    else:
        _check_solver(cfg, int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines)))
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and args.num_gpus > gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, and this machine has {gpus}")
    model = _check_model(cfg)
    if not cfg.MODEL.DEVICE.startswith("cuda") and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise UserError("the norm 'SyncBN' runs on GPUs only; on the CPU take 'naiveSyncBN'")
    if cfg.MODEL.WEIGHTS and not (args.eval_only and args.resume):
        check = load_strictly if args.eval_only else check_initial_weights
        content = check(getattr(model, "student", model), cfg.MODEL.WEIGHTS, who="student (MODEL.WEIGHTS)")
        check_normalisation(content, cfg)
    training_sets = [] if args.eval_only else list(cfg.DATASETS.TRAIN)
    if is_classifier(cfg):
        check_input(cfg)
        check_classes(cfg, training_sets + list(cfg.DATASETS.TEST))
        return
    _check_input(cfg, is_train=not args.eval_only)
    classes = {}
    for name in dict.fromkeys(training_sets + list(cfg.DATASETS.TEST)):
        read_whole = name in training_sets or MetadataCatalog.get(name).get("evaluator_type") == "coco"
        summary = check_dataset(name, _annotation_keys(cfg) if read_whole else {})
        classes[name] = summary.thing_classes
        if name in training_sets and not summary.num_instances:
            raise UserError(f"data set '{name}' has {summary.num_images} images and no annotation to train on")
    check_class_lists(cfg, classes)
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in EVALUATORS:
            raise UserError(f"data set '{name}': {unknown_name('evaluator_type', kind, EVALUATORS)}")
        if kind == "pascal_voc":
            check_voc_evaluation(name)


def _annotation_keys(cfg: CfgNode) -> dict[str, str]:
    """What annotations must hold, and which key of the config asks for it."""
    wanted = {"segmentation": "MASK_ON", "keypoints": "KEYPOINT_ON"}
    return {key: f"MODEL.{option}" for key, option in wanted.items() if cfg.MODEL[option]}


def _check_evaluation(cfg: CfgNode, resume: bool) -> None:
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate on")
    if not cfg.MODEL.WEIGHTS and not (resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        raise UserError("MODEL.WEIGHTS is empty: there is nothing to evaluate")


def _check_output_dir(path: str) -> None:
    if not path:
        raise UserError("OUTPUT_DIR is empty; expected a folder for checkpoints and logs")
    if "://" in path:
        return
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UserError(f"OUTPUT_DIR {path!r}: {existing!r} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"OUTPUT_DIR {path!r}: no permission to write to {existing!r}")


def _check_solver(cfg: CfgNode, num_processes: int) -> None:
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: there is nothing to train on")
    for key, least in (("MAX_ITER", 1), ("IMS_PER_BATCH", 1), ("CHECKPOINT_PERIOD", 1)):
        if cfg.SOLVER[key] < least:
            raise UserError(f"SOLVER.{key} must be at least {least}, found {cfg.SOLVER[key]}")
    if not 0 < cfg.SOLVER.BASE_LR < float("inf"):
        raise UserError(f"SOLVER.BASE_LR must be a positive number, found {cfg.SOLVER.BASE_LR}")
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_processes
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} (images of all processes together) must be divisible by "
            f"the number of processes, {reference}"
        )
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise UserError(f"DATALOADER.NUM_WORKERS must not be negative, found {cfg.DATALOADER.NUM_WORKERS}")
    if cfg.SEED >= 2**31:
        raise UserError(f"SEED must be less than 2^31 (negative: none), found {cfg.SEED}")
    if cfg.get("KD", {}).get("NON_FINITE", "stop") not in NON_FINITE:
        raise UserError(f"KD.NON_FINITE must be one of {', '.join(NON_FINITE)}, found {cfg.KD.NON_FINITE!r}")
    with _naming("the solver (SOLVER.*)", ValueError):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        build_lr_scheduler(cfg, optimizer)


def _check_model(cfg: CfgNode) -> nn.Module:
    registered = [name for name, _ in META_ARCH_REGISTRY]
    if cfg.MODEL.META_ARCHITECTURE not in registered:
        raise UserError(unknown_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, registered))
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD) or not len(cfg.MODEL.PIXEL_MEAN):
        raise UserError(
            f"MODEL.PIXEL_MEAN and PIXEL_STD need a number a channel, found {list(cfg.MODEL.PIXEL_MEAN)} and "
            f"{list(cfg.MODEL.PIXEL_STD)}"
        )
    if not all(std > 0 for std in cfg.MODEL.PIXEL_STD):
        raise UserError(f"MODEL.PIXEL_STD must be positive, found {list(cfg.MODEL.PIXEL_STD)}")
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    with preserved_random_state(), _naming("the model of this config"):
        model = build_model(on_cpu)
    if getattr(model, "missing_teacher", None) is not None:
        raise model.missing_teacher
    return model


def _check_input(cfg: CfgNode, *, is_train: bool) -> None:
    """Runs what the config does to an image, on a blank one."""
    with _naming(f"an image in INPUT.FORMAT {cfg.INPUT.FORMAT!r}", ValueError):
        image = convert_PIL_to_numpy(Image.new("RGB", (64, 48)), cfg.INPUT.FORMAT)
    with preserved_random_state(), _naming("the input (INPUT.*)", ValueError):
        for augmentation in DatasetMapper.from_config(cfg, is_train)["augmentations"]:
            augmentation(T.AugInput(image.astype("uint8")))
    if is_train:
        with preserved_random_state(), _naming("the train loader (DATALOADER.*)", ValueError):
            detectron2_build._train_loader_from_config(cfg, mapper=lambda x: x, dataset=[{"annotations": []}])


@contextlib.contextmanager
def _naming(what: str, *errors: type[Exception]):
    """Detectron2's builders raise all of these for a name or a number that cannot be; says where to look for it."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ZeroDivisionError, *errors) as e:
        raise UserError(f"{what} cannot be built: {type(e).__name__}: {e}") from e
