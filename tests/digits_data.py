import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.quickstart import register_digits
from kd_det.quickstart.offline import OfflineDatasetOptions, make_offline_dataset

OPTIONS = OfflineDatasetOptions(num_train=12, num_val=10, size=96, num_crops=20, num_val_crops=10, crop_size=32)


def register(root, prefix):
    """Register the data set at ``root`` anew under ``prefix``; returns the four names."""
    names = [f"{prefix}_{kind}_{split}" for kind in ("coco", "voc") for split in ("train", "val")]
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    register_digits(str(root), prefix)
    return names


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory):
    """A small data set, registered as tiny_coco_train, tiny_coco_val, tiny_voc_train, tiny_voc_val."""
    root = tmp_path_factory.mktemp("data") / "digits"
    assert make_offline_dataset(root, OPTIONS)
    register(root, "tiny")
    return root
