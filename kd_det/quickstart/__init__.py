"""The quickstart's data set: handwritten digits drawn on photographs, in COCO, Pascal VOC and ImageFolder format."""

from kd_det.quickstart.register import register_digits

__all__ = ["register_digits"]
