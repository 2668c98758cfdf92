from detectron2.config import LazyCall as L

from kd_det.losses import NSTLoss

from .base_fcos_R_50_from_R_101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.losses = [L(NSTLoss)(student_taps=["p3", "p4", "p5", "p6", "p7"], weight=20.0)]
