from detectron2.config import LazyCall as L

from kd_det.losses import OverhaulLoss

from .base_fcos_R_50_from_R_101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.losses = [L(OverhaulLoss)(student_taps=["res3.pre_activation", "res4.pre_activation", "res5.pre_activation"])]
