"""The names of a data set's classes."""

import logging
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["class_names"]

logger = logging.getLogger(__name__)


def class_names(datasets: Sequence[str]) -> list[str]:
    """
    The names of the first data set's classes. It is read where its names are registered by reading, as COCO's loader
    does; none where it has none, or is not on this machine.
    """
    for name in datasets[:1]:
        if name in DatasetCatalog and not MetadataCatalog.get(name).get("thing_classes"):
            try:
                DatasetCatalog.get(name)
            except (OSError, AssertionError, KeyError, ValueError) as e:
                logger.warning(f"Data set {name!r} cannot be read, so the names of its classes are not known: {e}")
        return list(MetadataCatalog.get(name).get("thing_classes") or ())
    return []
