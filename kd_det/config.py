"""
Every ``KD.*`` and ``CLASSIFICATION.*`` key. A project calls :func:`add_kd_config` as it calls Detectron2's
``add_pointrend_config``.
"""

from detectron2.config import CfgNode as CN

from kd_det.backbones import add_timm_config

__all__ = ["SCHEDULE_KEYS", "add_kd_config", "add_loss_config", "check_kd_config"]

# The keys of KD that each loss may have a value of its own for; None, its default: that of KD.
SCHEDULE_KEYS = ("WARMUP_ITERS", "STOP_ITER", "DECAY", "DECAY_START")


def add_loss_config(cfg: CN, name: str, *, weight: float, taps=(), has_regions: bool = False) -> CN:
    """
    Add the node ``KD.<NAME>`` with the keys that every distillation loss has, and return it.

    Args:
        cfg: a config that :func:`add_kd_config` has been called on.
        name: the loss' ``name`` in upper case; the loss is logged as ``loss_<name>``.
        weight: default factor of the loss in the total.
        taps: default places, the same names on both sides.
        has_regions: whether the positions of its maps can be weighted, see :class:`kd_det.losses.regions.RegionsLoss`.
    """
    node = CN()
    # Factor of this loss in the total; 0 switches it off (nothing is built, nothing is run).
    node.WEIGHT = weight
    # Places read in the student: "p3", "res4", "res4.pre_activation" or a dotted module name (tools/list_taps.py).
    node.STUDENT_TAPS = tuple(taps)
    # Places read in the teacher, paired with the student's in order; empty: the same names.
    node.TEACHER_TAPS = ()
    # As KD.AUTO_WEIGHT, for this loss; None: KD's. (WEIGHT "auto" in kd_det's commands: KD's, or 0.5.)
    node.AUTO_WEIGHT = None
    # The loss' own KD.WARMUP_ITERS, KD.STOP_ITER, KD.DECAY and KD.DECAY_START; None: that of KD.
    for key in SCHEDULE_KEYS:
        node[key] = None
    if has_regions:
        # Positions that count: "all", "boxes" or a "gaussian" in each box of the ground truth, "proposals" (how many of
        # the student's sampled ones lie there), or "foreground_background".
        node.REGIONS = "all"
        # With "foreground_background", the share of the weight that lies on objects; DeFeat's is 3 / (3 + 12).
        node.FOREGROUND_SHARE = 0.2
    cfg.KD[name] = node
    return node


def add_kd_config(cfg: CN) -> None:
    """
    Add the nodes ``KD``, ``CLASSIFICATION`` and ``MODEL.TIMM`` to a Detectron2 config, in place. No existing key is
    changed.
    """
    add_timm_config(cfg)
    _add_classification_config(cfg)
    cfg.KD = CN()

    # Modules or .py files (beside the config) of a project, imported before the config is read: they register data
    # sets, losses and architectures, and their functions add_..._config(cfg) add keys. Read by kd_det's commands.
    cfg.KD.IMPORTS = []
    # Class names in DISTILLATION_LOSS_REGISTRY, e.g. ("NSTLoss", "SoftTargetLoss"). Empty: plain training.
    cfg.KD.LOSSES = ()
    # Iterations of linear warm-up of every distillation loss (0: none).
    cfg.KD.WARMUP_ITERS = 0
    # Iteration from which every distillation loss is off (-1: never).
    cfg.KD.STOP_ITER = -1
    # "linear" or "cosine": every distillation loss falls to 0 at KD.STOP_ITER, or at SOLVER.MAX_ITER if that is -1.
    cfg.KD.DECAY = ""
    # Iteration from which it falls.
    cfg.KD.DECAY_START = 0
    # Weights that set themselves: the gradient of each loss becomes this part of the gradient of the student's own
    # losses at the parameters that both train, and a WEIGHT of 0 still switches it off. 0.0: weights are as configured.
    cfg.KD.AUTO_WEIGHT = 0.0
    # Training batches on which such weights are measured; then they stay. One more backward pass a loss and batch.
    cfg.KD.AUTO_WEIGHT_BATCHES = 20
    # Parts of the student that start from the teacher's weights where shapes agree, e.g. ("fpn", "proposal_generator",
    # "roi_heads"); MODEL.WEIGHTS is loaded on top.
    cfg.KD.INHERIT = ()
    # A loss that is not finite: "stop" the run, or "skip" the step and count it. Either way the batch is written to
    # OUTPUT_DIR/non_finite. Read by kd_det.engine.Trainer.
    cfg.KD.NON_FINITE = "stop"
    # Precision of SOLVER.AMP on a GPU: "float16", with scaled gradients, or "bfloat16"; the CPU takes bfloat16.
    cfg.KD.AMP_PRECISION = "float16"
    # Decay of the average (EMA) of the student's weights that is evaluated and, at the end, saved as model_ema.pth; 0:
    # no average is kept. Read by kd_det.engine.Trainer.
    cfg.KD.EMA_DECAY = 0.0
    # With TEST.EVAL_PERIOD: the number of the evaluation by which model_best.pth is kept, e.g. "segm/AP"; empty: its
    # first, a detector's box AP or a classifier's top-1. Read by kd_det.engine.Trainer, as the next key.
    cfg.KD.BEST_METRIC = ""
    # Where a run is logged beside metrics.json and TensorBoard: "wandb", "mlflow"; pip install kd_det[wandb].
    cfg.KD.WRITERS = ()
    # Learning rate, momentum and weight decay after --resume: the "checkpoint"'s, or those of the "config".
    cfg.KD.RESUME_SOLVER = "checkpoint"

    cfg.KD.STUDENT = CN()
    # The student's own meta-architecture, as MODEL.META_ARCHITECTURE would name it without distillation.
    cfg.KD.STUDENT.META_ARCHITECTURE = "GeneralizedRCNN"

    cfg.KD.TEACHER = CN()
    # The teacher: a config file (yaml, or a LazyConfig, .py, which is run), a model-zoo name such as
    # "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", "torchvision://NAME", "timm://NAME", or "hf://NAME" of a detector
    # of transformers (of the Hugging Face hub, or a folder). "ema": the student's own average (mean teacher, arXiv
    # 1703.01780), which needs no weights.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # The teacher's weights. Empty: the zoo entry's checkpoint, the library's own, or those that its config file names.
    cfg.KD.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs merged into the teacher's config, e.g. ["MODEL.ROI_HEADS.NUM_CLASSES", 10], of a LazyConfig
    # ["model.roi_heads.num_classes", 10].
    cfg.KD.TEACHER.OPTS = []
    # Names of the teacher's classes, in order. Empty: those of its config's data sets, where Detectron2 knows them.
    cfg.KD.TEACHER.CLASSES = []
    # Classes that student and teacher name differently, as [student's, teacher's] pairs, each a name or a number, e.g.
    # [["sofa", "couch"]]. The others are those of the same name; where names are not known, all are, in order.
    cfg.KD.TEACHER.CLASS_MAP = []
    # Whether training first evaluates the teacher on DATASETS.TEST, and logs it as "teacher/bbox/AP" and the like.
    cfg.KD.TEACHER.EVALUATE = False
    # Precision of the teacher's backbone: "float32" (under SOLVER.AMP, as the student's), "bfloat16" or "float16" for
    # half the memory and, on a GPU, less time. The losses are computed in float32 in any case.
    cfg.KD.TEACHER.DTYPE = "float32"
    # Decay of the average that CONFIG_FILE "ema" is.
    cfg.KD.TEACHER.EMA_DECAY = 0.999
    # More teachers, each a dict with keys of KD.TEACHER. With these alone, or a WEIGHT (1.0), it is averaged with
    # KD.TEACHER (at weight 1.0; it may be left empty). With a NAME and LOSSES it teaches by these, logged as
    # loss_nst_<name>, with the losses' options but for its own LOSS_OPTS, such as ["KD.NST.WEIGHT", 5.0].
    cfg.KD.TEACHERS = []

    cfg.KD.UNLABELLED = CN()
    # Images without annotations for each labelled one, beside SOLVER.IMS_PER_BATCH; 0.0: none. On them the distillation
    # losses act and, on pseudo-labels, the student's own losses.
    cfg.KD.UNLABELLED.RATIO = 0.0
    # Their data sets: registered names, whose annotations are not used, or [name, folder] or [name, file], the file a
    # COCO json or a path a line, from its folder or from a third entry.
    cfg.KD.UNLABELLED.DATASETS = []
    # Pseudo-labels are what the first teacher detects or, with a file of COCO results, what any detector did.
    cfg.KD.UNLABELLED.RESULTS = ""
    # Detections with a lower score are no pseudo-labels.
    cfg.KD.UNLABELLED.THRESHOLD = 0.7
    # Weight of the student's own losses on pseudo-labels (loss_..._pseudo); 0.0: distillation losses alone act.
    cfg.KD.UNLABELLED.WEIGHT = 1.0

    # NST, neuron selectivity transfer (arXiv 1707.01219); the weight is lambda / 2 of Eq. 6.
    node = add_loss_config(cfg, "NST", weight=20.0, taps=("p2", "p3", "p4", "p5"), has_regions=True)
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

    # Soft targets on the logits of the mask head, pixel by pixel, on the student's foreground regions.
    node = add_loss_config(cfg, "MASK_SOFT_TARGET", weight=1.0)
    # T of the sigmoids; 1 in pixel-wise distillation (arXiv 1903.04197).
    node.TEMPERATURE = 1.0

    # Soft targets on the heatmaps of the keypoint head, on the student's foreground regions.
    node = add_loss_config(cfg, "KEYPOINT_SOFT_TARGET", weight=1.0)
    # T of the softmaxes over a heatmap's positions; 1 in DWPose (arXiv 2307.15880).
    node.TEMPERATURE = 1.0

    # Teacher-bounded box regression (Chen et al., NIPS 2017) on the student's sampled foreground regions; the weight is
    # the paper's nu.
    node = add_loss_config(cfg, "BOUNDED_REGRESSION", weight=0.5)
    # m of Eq. 4: a student better than the teacher by this squared error is left alone.
    node.MARGIN = 0.0

    # AT, attention transfer (arXiv 1612.03928), activation-based; the weight is beta / 2 of Eq. 2.
    node = add_loss_config(cfg, "AT", weight=1.0, taps=("p2", "p3", "p4", "p5"), has_regions=True)
    # F: "sum" (sum_c |A_c|), "sum_pow" (sum_c |A_c|^P) or "max_pow" (max_c |A_c|^P).
    node.MAPPING = "sum_pow"
    # p of the mapping.
    node.P = 2
    # "image": summed over positions, as Eq. 2; "element": their mean, as published code, smaller by H W.
    node.REDUCTION = "image"

    # OFD, overhaul of feature distillation (arXiv 1904.01866). A position sums hundreds of channels; the published
    # weights come to 5e-3 (ImageNet) and 1e-2 (segmentation) at the deepest stage. Without res2, which Detectron2
    # freezes by default (MODEL.BACKBONE.FREEZE_AT): a frozen student stage learns nothing from a loss on it.
    taps = tuple(f"{stage}.pre_activation" for stage in ("res3", "res4", "res5"))
    node = add_loss_config(cfg, "OVERHAUL", weight=1e-3, taps=taps, has_regions=True)
    # Margins of the ReLU: "calibrated" (negative responses to the first training images), "running" (to all images so
    # far) or "norm" (closed form from the last norm's weight and bias, refused where it does not hold).
    node.MARGIN = "calibrated"
    # Training images, of all GPUs, that "calibrated" is measured on.
    node.CALIBRATION_IMAGES = 64
    # Norm behind each 1x1 connector: "BN", or "SyncBN" with few images a GPU.
    node.CONNECTOR_NORM = "BN"
    # "position": an image's sum divided by its number of positions; "sum": the published one, of all GPUs' images.
    node.REDUCTION = "position"

    # SP, similarity-preserving (arXiv 1907.09682); the weight is gamma of Eq. 4. The loss is at most 4 / (number of
    # samples).
    node = add_loss_config(cfg, "SIMILARITY", weight=100.0, taps=("p5",))
    # "regions": of the student's sampled proposals (taps are not read); "images": of all ranks, at the taps.
    node.SAMPLES = "regions"
    # With "regions", how many are compared, of the images of all ranks together; foreground first.
    node.MAX_REGIONS = 512
    # With "images", each map is average-pooled to GRID x GRID.
    node.GRID = 8

    # Hints (FitNets, arXiv 1412.6550). p2 costs three times as much as the other levels together; without it, hints
    # gave nothing to a detector of small objects (docs/study.md).
    node = add_loss_config(cfg, "HINT", weight=1.0, taps=("p2", "p3", "p4", "p5"), has_regions=True)
    # Norm behind each 1x1 connector; "": none.
    node.CONNECTOR_NORM = ""

    # FD, feature distillation of foundation models (arXiv 2205.14141). Without taps: res3 to res5 of both backbones, or
    # the deepest level of each where the teacher has other strides. The weight is the published one, for AdamW.
    node = add_loss_config(cfg, "FD", weight=1.0, has_regions=True)
    # beta of the smooth L1 distance.
    node.BETA = 2.0
    # As KD.HINT.CONNECTOR_NORM.
    node.CONNECTOR_NORM = ""

    # PKD (arXiv 2207.02039): channels standardised over images and positions. Weight and levels are MMRazor's for
    # Faster R-CNN, R-101 to R-50.
    node = add_loss_config(cfg, "PKD", weight=6.0, taps=("p2", "p3", "p4", "p5"), has_regions=True)
    # Norm behind the 1x1 connectors, which are there only where the networks' channels differ; "": none.
    node.CONNECTOR_NORM = ""

    # CWD, channel-wise distillation (arXiv 2011.13256). Weight and levels are MMRazor's for Faster R-CNN, R-101 to
    #
    node = add_loss_config(cfg, "CWD", weight=10.0, taps=("p2", "p3", "p4", "p5", "p6"), has_regions=True)
    # T: each channel's softmax over positions is taken at features / T.
    node.TEMPERATURE = 1.0
    # As KD.PKD.CONNECTOR_NORM.
    node.CONNECTOR_NORM = ""

    # FGD (arXiv 2111.11837): focal on the ground truth's boxes, and global. Levels, and the four weights below, are the
    # published ones for Faster R-CNN, with gradients clipped at norm 35. One-stage detectors take all five levels.
    node = add_loss_config(cfg, "FGD", weight=1.0, taps=("p2", "p3", "p4", "p5"))
    # T of the attentions' softmax.
    node.TEMPERATURE = 0.5
    # alpha, beta, gamma and lambda: weights of the foreground, the background, the attentions and the
    # global relation. RetinaNet takes 1e-3, 5e-4, 5e-4 and 5e-6.
    node.ALPHA = 5e-5
    node.BETA = 2.5e-5
    node.GAMMA = 5e-5
    node.RELATION = 5e-7
    # As KD.PKD.CONNECTOR_NORM.
    node.CONNECTOR_NORM = ""

    # MGD (arXiv 2205.01529); the weight is alpha, published as 5e-7 for Faster R-CNN at these levels, and as 2e-5 for
    # RetinaNet at all five, with gradients clipped at norm 35.
    node = add_loss_config(cfg, "MGD", weight=5e-7, taps=("p2", "p3", "p4", "p5"), has_regions=True)
    # lambda, the share of positions that are hidden: 0.45 for Faster R-CNN, 0.65 for RetinaNet.
    node.MASK_RATIO = 0.45
    # As KD.PKD.CONNECTOR_NORM.
    node.CONNECTOR_NORM = ""

    # ReviewKD (arXiv 2104.09044); weight and levels are the published ones for Faster R-CNN, R-101 to R-18.
    node = add_loss_config(cfg, "REVIEW_KD", weight=1.2, taps=("p2", "p3", "p4", "p5", "p6"))
    # Channels of the fused maps.
    node.MID_CHANNELS = 256
    # Norm behind each convolution of the fusion; "": none.
    node.CONNECTOR_NORM = "BN"

    # DKD, decoupled soft targets (arXiv 2203.08679) on the student's sampled regions. Weight and options are the
    # published ones for Faster R-CNN.
    node = add_loss_config(cfg, "DKD", weight=1.0)
    # alpha and beta of Eq. 7, weights of the label's part and of the other classes'. Classifiers take 1, and 0.5 to 8.
    node.ALPHA = 1.0
    node.BETA = 0.25
    # T of the softmaxes; classifiers take 1 to 4.
    node.TEMPERATURE = 1.0

    # DIST (arXiv 2205.10536): correlation of predictions within and across samples. Weight and options are the defaults
    # of the published code, for classifiers and segmentation; there is no published one for sampled regions.
    node = add_loss_config(cfg, "DIST", weight=1.0)
    # beta and gamma of Eq. 10, weights of the correlation over classes and over samples.
    node.BETA = 1.0
    node.GAMMA = 1.0
    # T of the softmaxes.
    node.TEMPERATURE = 1.0

    # What the heads of RetinaNet or FCOS predict, where the teacher is confident; the weight and the options are ours.
    # It chooses its taps itself, as do the next two losses.
    node = add_loss_config(cfg, "DENSE_SOFT_TARGET", weight=1.0)
    # T of the classes' sigmoids.
    node.TEMPERATURE = 1.0
    # Each anchor counts by the teacher's score to this power; 0: all alike, 1: as in arXiv 2111.00674.
    node.CONFIDENCE_POWER = 2.0
    # Weight of the boxes beside the classes; 0: none are compared. FCOS' centerness has weight 1.
    node.BOX_WEIGHT = 1.0
    # Distance of the boxes: "giou", or "l1" of the head's own deltas.
    node.BOX_LOSS = "giou"

    # The same of two RPNs with equal anchors, their objectness and their deltas; the keys mean the same.
    node = add_loss_config(cfg, "RPN_SOFT_TARGET", weight=1.0)
    node.TEMPERATURE = 1.0
    node.CONFIDENCE_POWER = 2.0
    node.BOX_WEIGHT = 1.0
    # Detectron2's RPN learns by L1 itself.
    node.BOX_LOSS = "l1"

    # CrossKD (arXiv 2306.11369) of RetinaNet or FCOS: the student's features through the teacher's head. The weights
    # are the published ones for RetinaNet; FCOS takes WEIGHT 0.4, BOX_WEIGHT 1.875 (0.75 in all) and CUT 2.
    node = add_loss_config(cfg, "CROSS_KD", weight=1.0)
    # Convolutions of the student's head that its features have passed; the published heads have four.
    node.CUT = 3
    # As KD.DENSE_SOFT_TARGET's; published with the power 1, and another divisor.
    node.CONFIDENCE_POWER = 2.0
    node.BOX_WEIGHT = 1.0

    # FSP, flow of solution procedure (Yim et al., CVPR 2017); the weight is lambda of Eq. 2, for which the paper gives
    # no number: this one is ours. Taps are read two by two, each pair is one flow.
    node = add_loss_config(cfg, "FSP", weight=1e-5, taps=("res2", "res3", "res3", "res4", "res4", "res5"))
    # Norm behind the 1x1 connectors, which are there only where the networks' channels differ; "": none.
    node.CONNECTOR_NORM = ""

    # Gradient-based AT (arXiv 1612.03928, section 3.2), for classifiers; the weight is beta / 2 of Eq. 4 times the
    # square of the pixel std, because gradients are per grey value. It reads no taps.
    add_loss_config(cfg, "GRADIENT_AT", weight=1e4)


def check_kd_config(node: CN, name: str = "KD") -> None:
    """
    Refuse the one wrong type that yacs lets through.

    Args:
        node: ``cfg.KD``.
        name: what messages call it.

    Raises:
        ValueError: a key whose value is None; names it.
    """
    for key, value in node.items():
        if isinstance(value, CN):
            check_kd_config(value, f"{name}.{key}")
        elif value is None and (name == "KD" or key not in (*SCHEDULE_KEYS, "AUTO_WEIGHT")):
            raise ValueError(f"{name}.{key} is None, and needs a value.")


def _add_classification_config(cfg: CN) -> None:
    """The keys of the pretraining stage."""
    cfg.CLASSIFICATION = node = CN()
    # K of ImageClassifier's head; must be the data set's. BackboneOnly has none.
    node.NUM_CLASSES = 1000
    # The backbone's output that is pooled and classified; MODEL.RESNETS.OUT_FEATURES must hold it.
    node.IN_FEATURE = "res5"
    # Share of the target that is spread evenly over the classes (arXiv 1512.00567, section 7).
    node.LABEL_SMOOTHING = 0.0
    # Side to which a network resizes its batches first; 0: it takes them as they come. For teachers.
    node.INPUT_SIZE = 0
    # NetworkClassifier only: "torchvision://NAME" or "timm://NAME".
    node.NETWORK = ""
    # As KD.EMA_DECAY, for this stage alone; 0: KD's.
    node.EMA_DECAY = 0.0

    # Folders to register as data sets, as [name, folder] pairs; a folder holds one folder of images a class.
    node.IMAGE_FOLDERS = []
    # Images without labels to register as data sets, for BackboneOnly: [name, folder], with images at any depth, or
    # [name, file]: a COCO json or a path a line, from the file's folder, or from a third entry.
    node.UNLABELLED = []
    # An image that cannot be read: "stop" the run, or "skip" it with a warning and a count.
    node.CORRUPT_IMAGES = "stop"
    # Images a step in evaluation, on each GPU.
    node.TEST_BATCH_SIZE = 64
    # Batches that each of DATALOADER.NUM_WORKERS prepares ahead.
    node.PREFETCH_FACTOR = 2
    # Whether the workers outlive an evaluation.
    node.PERSISTENT_WORKERS = True

    node.PROBE = probe = CN()
    # A data set with labels: from its images, without augmentation, k-NN and a linear probe learn to classify those of
    # DATASETS.TEST by BackboneOnly's pooled features.
    probe.TRAIN = ""
    # At most so many of its images, evenly spread over it.
    probe.MAX_IMAGES = 50000
    # k of k-NN.
    probe.NEIGHBOURS = 20

    node.AUG = aug = CN()
    # Side of the random resized crop, and its share of the image's area and its aspect ratio.
    aug.TRAIN_SIZE = 224
    aug.SCALE = (0.08, 1.0)
    aug.RATIO = (3 / 4, 4 / 3)
    # Probability of a horizontal flip.
    aug.FLIP = 0.5
    # Strength of brightness, contrast, saturation and hue jitter; hue at most 0.5.
    aug.COLOR_JITTER = (0.0, 0.0, 0.0, 0.0)
    # Operations of RandAugment (arXiv 1909.13719), 0: none; and their magnitude, 0 to 30.
    aug.RAND_AUGMENT_OPS = 0
    aug.RAND_AUGMENT_MAGNITUDE = 9
    # Alpha of mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899), 0: off; with both on, each batch takes one.
    aug.MIXUP = 0.0
    aug.CUTMIX = 0.0
    # In evaluation: the shorter side after resizing, and the side of the centre crop.
    aug.TEST_RESIZE = 256
    aug.TEST_SIZE = 224
