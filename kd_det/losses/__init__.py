"""Distillation losses: the functions, and the registered modules that own their connectors and margins."""

from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, DistillationLoss, build_losses, loss_class

__all__ = ["DISTILLATION_LOSS_REGISTRY", "DistillationLoss", "build_losses", "loss_class"]
