from detectron2.config import LazyCall as L

from kd_det.losses import CrossKDLoss

from .base_fcos_R_50_from_R_101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

# The published cut and weights: 0.4 of the classes, 0.75 of the boxes.
model.losses = [L(CrossKDLoss)(cut=2, weight=0.4, box_weight=1.875)]
