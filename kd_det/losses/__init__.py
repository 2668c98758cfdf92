"""Distillation losses: the functions, and the registered modules that own their connectors and margins."""

from kd_det.losses.attention_transfer import (
    AttentionTransferLoss,
    attention_map,
    attention_transfer_loss,
    gradient_attention_loss,
)
from kd_det.losses.binary_soft_target import binary_soft_target_loss
from kd_det.losses.bounded_regression import BoundedRegressionLoss, bounded_regression_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, DistillationLoss, build_losses, loss_class
from kd_det.losses.cross_kd import CrossKDLoss, align_scale, quality_focal_loss
from kd_det.losses.cwd import CWDLoss, cwd_loss
from kd_det.losses.dense_soft_target import (
    DenseSoftTargetLoss,
    RPNSoftTargetLoss,
    confidence_weights,
    dense_box_loss,
    dense_class_loss,
)
from kd_det.losses.dist import DISTLoss, dist_loss
from kd_det.losses.dkd import DKDLoss, dkd_loss
from kd_det.losses.feature_distillation import FeatureDistillationLoss, feature_distillation_loss
from kd_det.losses.fgd import FGDLoss, fgd_loss
from kd_det.losses.fsp import FSPLoss, fsp_loss, fsp_matrix
from kd_det.losses.hint import HintLoss, hint_loss
from kd_det.losses.margin import margin_from_norm, margin_relu
from kd_det.losses.mgd import MGDLoss, mgd_loss
from kd_det.losses.nst import NSTLoss, nst_loss
from kd_det.losses.overhaul import OverhaulLoss, overhaul_loss, partial_l2_loss
from kd_det.losses.pkd import PKDLoss, pkd_loss
from kd_det.losses.region_branches import KeypointSoftTargetLoss, MaskSoftTargetLoss, keypoint_soft_target_loss
from kd_det.losses.review import ReviewKDLoss, hierarchical_context_loss
from kd_det.losses.similarity import SimilarityLoss, similarity_preserving_loss
from kd_det.losses.soft_target import SoftTargetLoss, soft_target_loss

__all__ = [
    "DISTILLATION_LOSS_REGISTRY",
    "AttentionTransferLoss",
    "BoundedRegressionLoss",
    "CWDLoss",
    "CrossKDLoss",
    "DISTLoss",
    "DKDLoss",
    "DenseSoftTargetLoss",
    "DistillationLoss",
    "FGDLoss",
    "FSPLoss",
    "FeatureDistillationLoss",
    "HintLoss",
    "KeypointSoftTargetLoss",
    "MGDLoss",
    "MaskSoftTargetLoss",
    "NSTLoss",
    "OverhaulLoss",
    "PKDLoss",
    "RPNSoftTargetLoss",
    "ReviewKDLoss",
    "SimilarityLoss",
    "SoftTargetLoss",
    "align_scale",
    "attention_map",
    "attention_transfer_loss",
    "binary_soft_target_loss",
    "bounded_regression_loss",
    "build_losses",
    "confidence_weights",
    "cwd_loss",
    "dense_box_loss",
    "dense_class_loss",
    "dist_loss",
    "dkd_loss",
    "feature_distillation_loss",
    "fgd_loss",
    "fsp_loss",
    "fsp_matrix",
    "gradient_attention_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "keypoint_soft_target_loss",
    "loss_class",
    "margin_from_norm",
    "margin_relu",
    "mgd_loss",
    "nst_loss",
    "overhaul_loss",
    "partial_l2_loss",
    "pkd_loss",
    "quality_focal_loss",
    "similarity_preserving_loss",
    "soft_target_loss",
]
