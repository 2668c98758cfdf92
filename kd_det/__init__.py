"""
Knowledge distillation for Detectron2.

Importing this registers the ``Distiller`` and ``ImageClassifier`` meta-architectures and the losses in their
registries. It changes no default of Detectron2, registers no data set and reads no file.
"""

import sys

# ``python -m kd_det`` imports this before its __main__, and a process that a command spawned before anything else: they
# are as quiet as kd-det. Whoever imports kd_det keeps the filters of warnings that they have.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__ or "".join(sys.argv[:1]).startswith("kd-det "):
    import kd_det_command  # noqa: F401

import kd_det.classification.gradient_attention  # noqa: F401  registers GradientAttentionLoss
import kd_det.classification.networks  # noqa: F401  registers ImageClassifier and NetworkClassifier
from kd_det.config import add_kd_config, add_loss_config
from kd_det.distiller import Distiller
from kd_det.features.taps import Taps
from kd_det.losses import DISTILLATION_LOSS_REGISTRY, DistillationLoss
from kd_det.student import build_student, student_cfg
from kd_det.teachers import build_teacher, build_teacher_architecture

__version__ = "0.1.0"

__all__ = [
    "DISTILLATION_LOSS_REGISTRY",
    "DistillationLoss",
    "Distiller",
    "Taps",
    "add_kd_config",
    "add_loss_config",
    "build_student",
    "build_teacher",
    "build_teacher_architecture",
    "distill",
    "student_cfg",
]


def distill(
    student,
    *,
    teacher: str = "",
    output: str = "",
    losses=(),
    opts=(),
    teacher_weights: str = "",
    imports=(),
    num_gpus: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> dict:
    """
    ``kd-det train`` in one line, ``distill("student.yaml", teacher="teacher.yaml", output="out")``: the same checks,
    training, files and log. With one GPU or none it trains in this process, whose random state and logging it restores.

    Args:
        student: file of a detector's config, or of one that names its teacher itself.
        teacher, teacher_weights, imports, num_gpus, resume, overwrite: as the command's options.
        output: OUTPUT_DIR; empty: the config's.
        losses: names of losses; empty: the default ones.
        opts: config keys and their values, as a dict or as ``["KEY", value, ...]``.

    Returns:
        The results of the last evaluation, as ``{"bbox": {"AP": ...}}``; empty where nothing was evaluated.

    Raises:
        ValueError, OSError: what the command would print as its error (``UserError`` is a ValueError).
        FloatingPointError: a loss is not finite.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with everything saved.
        RuntimeError: one of several processes failed; it has printed why.
    """
    # The command line needs OpenCV, and what only a training needs.
    from kd_det.cli.distill import run_command_line

    pairs = [x for pair in opts.items() for x in pair] if hasattr(opts, "items") else list(opts)
    argv = ["--config-file", student, "--num-gpus", num_gpus]
    argv += ["--teacher", teacher] if teacher else []
    argv += ["--teacher-weights", teacher_weights] if teacher_weights else []
    argv += ["--losses", ",".join(losses)] if losses else []
    argv += [x for module in imports for x in ("--import", module)]
    argv += ["--resume"] * resume + ["--overwrite"] * overwrite
    return run_command_line([str(x) for x in argv + (["OUTPUT_DIR", output] if output else []) + pairs])
