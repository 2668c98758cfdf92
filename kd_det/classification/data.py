"""Image classification data sets in Detectron2's catalogs: ImageFolder and ImageNet layouts, through torchvision."""

import os
from typing import Dict, List, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets import ImageFolder, ImageNet

from kd_det.data.checks import DatasetError
from kd_det.errors import unknown_name

__all__ = ["check_classes", "load_dataset", "register_builtin", "register_configured", "register_image_folder"]


def register_image_folder(name: str, root: str, **metadata) -> None:
    """
    Register a folder that holds one folder of images a class. Read when first used: a list of
    ``{"file_name", "label"}``; the classes' names, sorted, are ``classes`` in the metadata.

    Args:
        name: as in ``DATASETS.TRAIN``.
        root: e.g. "imagenet/train". With the metadata file of torchvision's ImageNet class beside it ("meta.bin"),
            classes get their English names.
        metadata: further entries; ``make_command`` is the command that the message for missing files names.
    """
    DatasetCatalog.register(name, lambda: _load(name, root))
    MetadataCatalog.get(name).set(evaluator_type="classification", root=root, **metadata)


def register_configured(cfg: CfgNode) -> None:
    """
    Register ``CLASSIFICATION.IMAGE_FOLDERS``; again with the same folder is no error.

    Raises:
        ValueError: entries that are not [name, folder] pairs, or a name that is taken.
    """
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
        problem = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else " ".join(str(e).split())
        remedy = f"; make it with: {meta.make_command}" if meta.get("make_command") else ""
        raise DatasetError(
            f"data set {name!r}: expected a folder of one folder of images a class at {root!r}; {problem}{remedy}"
        ) from None
    meta.classes = classes
    return [{"file_name": path, "label": label} for path, label in dataset.samples]


def load_dataset(names: Sequence[str]) -> List[Dict]:
    """
    The images of registered data sets together.

    Raises:
        DatasetError: one that is not registered, not for classification or not there, or other classes in one than in
            another.
    """
    dicts = []
    for name in names:
        if name not in DatasetCatalog:
            raise DatasetError(unknown_name("data set", name, DatasetCatalog.list()))
        if MetadataCatalog.get(name).get("evaluator_type") != "classification":
            known = [
                n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("evaluator_type") == "classification"
            ]
            raise DatasetError(f"data set {name!r} is not for classification; those are: {', '.join(known)}")
        dicts += DatasetCatalog.get(name)
        classes = [MetadataCatalog.get(n).classes for n in (names[0], name)]
        if classes[0] != classes[1]:
            differing = sorted(set(classes[0]) ^ set(classes[1]))
            raise DatasetError(
                f"data sets {names[0]!r} and {name!r} have other classes: {len(classes[0])} and {len(classes[1])}, "
                f"only in one of them: {', '.join(differing[:5])}"
            )
    return dicts


def check_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """
    Read the folders of registered data sets and compare their classes with the head.

    Raises:
        DatasetError: see :func:`load_dataset`; labels that the head has no class for.
    """
    load_dataset(names)
    found = len(MetadataCatalog.get(names[0]).classes) if names else cfg.CLASSIFICATION.NUM_CLASSES
    if found != cfg.CLASSIFICATION.NUM_CLASSES:
        raise DatasetError(
            f"data set {names[0]!r} has {found} classes (labels 0..{found - 1}) and CLASSIFICATION.NUM_CLASSES is "
            f"{cfg.CLASSIFICATION.NUM_CLASSES}"
        )


def register_builtin() -> None:
    """
    Register ``imagenet_{train,val}`` and ``digits_crops_{train,val}`` below ``$DETECTRON2_DATASETS`` (default:
    "datasets"), where these names are free.
    """
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    make_command = f"python tools/make_offline_dataset.py --output {os.path.join(root, 'digits')}"
    for split in ("train", "val"):
        crops = os.path.join(root, "digits", "classification", split)
        for name, folder, metadata in (
            (f"digits_crops_{split}", crops, {"make_command": make_command}),
            (f"imagenet_{split}", os.path.join(root, "imagenet", split), {}),
        ):
            if name not in DatasetCatalog:
                register_image_folder(name, folder, **metadata)
