"""
Data sets of the pretraining stage in Detectron2's catalogs: ImageFolder and ImageNet layouts, through torchvision, and
images without labels.
"""

import os
from typing import Dict, List, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets import ImageFolder, ImageNet

from kd_det.data.unlabelled import registered_unlabelled
from kd_det.errors import DatasetError, one_line, unknown_name

__all__ = [
    "check_classes",
    "load_dataset",
    "load_images",
    "register_builtin",
    "register_configured",
    "register_image_folder",
]


def register_image_folder(name: str, root: str, **metadata) -> None:
    """
    Register a folder that holds one folder of images a class. Read when first used: a list of
    ``{"file_name", "label"}``; the classes' names, sorted, are ``classes`` in the metadata. Beside the metadata file of
    torchvision's ImageNet class ("meta.bin"), folders train and val get classes with English names.

    Args:
        metadata: further entries; ``make_command`` is the command that the message for missing files names.
    """
    DatasetCatalog.register(name, lambda: _load(name, root))
    MetadataCatalog.get(name).set(evaluator_type="classification", root=root, **metadata)


def register_configured(cfg: CfgNode) -> None:
    """
    Register ``CLASSIFICATION.IMAGE_FOLDERS`` and ``UNLABELLED``; again with the same files is no error, but a
    ``ValueError`` are entries that are not [name, folder] pairs, and a name that is taken.
    """
    registered_unlabelled(cfg.CLASSIFICATION.UNLABELLED, "CLASSIFICATION.UNLABELLED")
    for entry in cfg.CLASSIFICATION.IMAGE_FOLDERS:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise ValueError(f"CLASSIFICATION.IMAGE_FOLDERS holds [name, folder] pairs, found {entry!r}.")
        name, root = entry
        if name not in DatasetCatalog:
            register_image_folder(name, root)
        elif MetadataCatalog.get(name).get("root") != root:
            raise ValueError(f"CLASSIFICATION.IMAGE_FOLDERS: the data set name {name!r} is taken.")


def _load(name: str, root: str) -> List[Dict]:
    meta = MetadataCatalog.get(name)
    parent, split = os.path.split(os.path.normpath(root))
    try:
        if split in ("train", "val") and os.path.isfile(os.path.join(parent, "meta.bin")):
            dataset = ImageNet(parent, split)
            classes = [", ".join(names) for names in dataset.classes]
        else:
            dataset = ImageFolder(root)
            classes = dataset.classes
    except (OSError, RuntimeError) as e:  # no folder, no class folder, an empty class folder, a broken meta.bin
        remedy = f"; make it with: {meta.make_command}" if meta.get("make_command") else ""
        raise DatasetError(
            f"data set {name!r}: expected a folder of one folder of images a class at {root!r}; {one_line(e)}{remedy} "
            f"(images without classes belong to CLASSIFICATION.UNLABELLED)"
        ) from None
    meta.classes = classes
    return [{"file_name": path, "label": label} for path, label in dataset.samples]


def load_dataset(names: Sequence[str]) -> List[Dict]:
    """
    The images of registered data sets together, or a :class:`DatasetError` for one that is not registered, not for
    classification or not there, and for other classes in one than in another.
    """
    dicts = []
    for name in names:
        if name not in DatasetCatalog:
            raise DatasetError(unknown_name("data set", name, DatasetCatalog.list()))
        known = [n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("evaluator_type") == "classification"]
        if name not in known:
            raise DatasetError(f"data set {name!r} is not for classification; those are: {', '.join(known)}")
        dicts += DatasetCatalog.get(name)
        first, own = (MetadataCatalog.get(n).classes for n in (names[0], name))
        if first != own:
            raise DatasetError(
                f"data sets {names[0]!r} and {name!r} have other classes: {len(first)} and {len(own)}, only in one of "
                f"them: {', '.join(sorted(set(first) ^ set(own))[:5])}"
            )
    return dicts


def load_images(names: Sequence[str]) -> List[Dict]:
    """
    The images of registered data sets of any kind together, without their labels or annotations: a list of
    ``{"file_name"}``. A :class:`DatasetError` for one that is not registered or not there, and for none.
    """
    unknown = [name for name in names if name not in DatasetCatalog]
    if unknown:
        raise DatasetError(unknown_name("data set", unknown[0], DatasetCatalog.list()))
    dicts = [{"file_name": x["file_name"]} for name in names for x in DatasetCatalog.get(name)]
    if not dicts:
        raise DatasetError(f"the data sets {', '.join(names)} hold no image")
    return dicts


def check_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """As :func:`load_dataset`, and a :class:`DatasetError` for other classes than the head's."""
    load_dataset(names)
    expected = cfg.CLASSIFICATION.NUM_CLASSES
    found = len(MetadataCatalog.get(names[0]).classes) if names else expected
    if found != expected:
        raise DatasetError(
            f"data set {names[0]!r} has {found} classes (labels 0..{found - 1}) and CLASSIFICATION.NUM_CLASSES is "
            f"{expected}"
        )


def register_builtin() -> None:
    """
    Register ``imagenet_{train,val}`` and ``digits_crops_{train,val}`` below ``$DETECTRON2_DATASETS`` (default:
    "datasets"), where these names are free.
    """
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    digits = os.path.join(root, "digits")
    make_digits = {"make_command": f"python tools/make_offline_dataset.py --output {digits}"}
    for split in ("train", "val"):
        for name, folder, metadata in (
            (f"digits_crops_{split}", os.path.join(digits, "classification", split), make_digits),
            (f"imagenet_{split}", os.path.join(root, "imagenet", split), {}),
        ):
            if name not in DatasetCatalog:
                register_image_folder(name, folder, **metadata)
