"""Every ``CLASSIFICATION.*`` key."""

from detectron2.config import CfgNode as CN

__all__ = ["add_classification_config"]


def add_classification_config(cfg: CN) -> None:
    """Add the nodes of the pretraining stage to a Detectron2 config, in place. ``add_kd_config`` calls it."""
    cfg.CLASSIFICATION = node = CN()
    # K of ImageClassifier's head; must be the data set's.
    node.NUM_CLASSES = 1000
    # The backbone's output that is pooled and classified; MODEL.RESNETS.OUT_FEATURES must hold it.
    node.IN_FEATURE = "res5"
    # Share of the target that is spread evenly over the classes (arXiv 1512.00567, section 7).
    node.LABEL_SMOOTHING = 0.0
    # Side to which a network resizes its batches first; 0: it takes them as they come. For teachers.
    node.INPUT_SIZE = 0
    # NetworkClassifier only: "torchvision://NAME" or "timm://NAME".
    node.NETWORK = ""
    # Decay of the average of the weights that is evaluated and exported; 0: no average is kept.
    node.EMA_DECAY = 0.0

    # Folders to register as data sets, as [name, folder] pairs; a folder holds one folder of images a class.
    node.IMAGE_FOLDERS = []
    # An image that cannot be read: "stop" the run, or "skip" it with a warning and a count.
    node.CORRUPT_IMAGES = "stop"
    # Images a step in evaluation, on each GPU.
    node.TEST_BATCH_SIZE = 64
    # Batches that each of DATALOADER.NUM_WORKERS prepares ahead.
    node.PREFETCH_FACTOR = 2
    # Whether the workers outlive an evaluation.
    node.PERSISTENT_WORKERS = True

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
