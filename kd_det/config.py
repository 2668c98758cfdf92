"""Every ``KD.*`` key. A project of your own calls :func:`add_kd_config` as it calls Detectron2's ``add_pointrend_config``."""

from detectron2.config import CfgNode as CN

__all__ = ["add_kd_config", "add_loss_config"]


def add_loss_config(cfg: CN, name: str, *, weight: float, taps=()) -> CN:
    """
    Add the node ``KD.<NAME>`` with the keys that every distillation loss has, and return it.

    Args:
        cfg: a config that :func:`add_kd_config` has been called on.
        name: the loss' ``name`` in upper case; the loss is logged as ``loss_<name>``.
        weight: default factor of the loss in the total.
        taps: default places, the same names on both sides.
    """
    node = CN()
    # Factor of this loss in the total; 0 switches it off (nothing is built, nothing is run).
    node.WEIGHT = weight
    # Places read in the student: "p3", "res4", "res4.pre_activation" or a dotted module name (tools/list_taps.py).
    node.STUDENT_TAPS = tuple(taps)
    # Places read in the teacher, paired with the student's in order; empty: the same names.
    node.TEACHER_TAPS = ()
    # Iterations of linear warm-up of the factor; None: KD.WARMUP_ITERS.
    node.WARMUP_ITERS = None
    # Iteration from which the loss is off (-1: never); None: KD.STOP_ITER.
    node.STOP_ITER = None
    cfg.KD[name] = node
    return node


def add_kd_config(cfg: CN) -> None:
    """Add the ``KD`` node to a Detectron2 config, in place. No existing key is changed."""
    cfg.KD = CN()

    # Class names in DISTILLATION_LOSS_REGISTRY, e.g. ("NSTLoss", "SoftTargetLoss"). Empty: plain training of the student.
    cfg.KD.LOSSES = ()
    # Iterations of linear warm-up of every distillation loss (0: none).
    cfg.KD.WARMUP_ITERS = 0
    # Iteration from which every distillation loss is off (-1: never).
    cfg.KD.STOP_ITER = -1

    cfg.KD.STUDENT = CN()
    # The student's own meta-architecture, as MODEL.META_ARCHITECTURE would name it without distillation.
    cfg.KD.STUDENT.META_ARCHITECTURE = "GeneralizedRCNN"

    cfg.KD.TEACHER = CN()
    # The teacher's config: a file, or a model-zoo name such as "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml".
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # The teacher's weights. Empty: the zoo entry's checkpoint, or MODEL.WEIGHTS of the teacher's config file.
    cfg.KD.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs merged into the teacher's config, e.g. ["MODEL.ROI_HEADS.NUM_CLASSES", 10].
    cfg.KD.TEACHER.OPTS = []

    # NST, neuron selectivity transfer (arXiv 1707.01219); the weight is lambda / 2 of Eq. 6.
    node = add_loss_config(cfg, "NST", weight=20.0, taps=("p2", "p3", "p4", "p5"))
    # "linear", "poly" ((x.y + OFFSET)^DEGREE) or "gaussian".
    node.KERNEL = "poly"
    # d of the polynomial kernel.
    node.DEGREE = 2
    # c of the polynomial kernel.
    node.OFFSET = 0.0

    # Soft targets (arXiv 1503.02531) on the class logits of the student's sampled proposals.
    node = add_loss_config(cfg, "SOFT_TARGET", weight=1.0)
    # T: both softmaxes are taken at logits / T, and the loss is multiplied by T^2.
    node.TEMPERATURE = 2.0
