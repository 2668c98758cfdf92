"""The project's own mapper: it reads images itself and halves them."""

import copy

import torch
from detectron2.data import detection_utils
from detectron2.structures import BoxMode


class ShopMapper:
    def __init__(self, is_train: bool = True):
        self.is_train = is_train

    def __call__(self, record):
        record = copy.deepcopy(record)
        image = detection_utils.read_image(record["file_name"], format="BGR")[::2, ::2]
        record["image"] = torch.as_tensor(image.transpose(2, 0, 1).copy())
        annotations = record.pop("annotations", [])
        if self.is_train:
            for annotation in annotations:
                box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
                annotation["bbox"], annotation["bbox_mode"] = [x / 2 for x in box], BoxMode.XYXY_ABS
                annotation.pop("segmentation", None)
            record["instances"] = detection_utils.annotations_to_instances(annotations, image.shape[:2])
        return record
