"""Backbone pretraining: image classification with the same Distiller, losses and trainer as detection."""

from kd_det.classification.checks import check_input
from kd_det.classification.classifier import ImageClassifier, is_classifier
from kd_det.classification.data import check_classes, load_dataset, register_configured, register_image_folder
from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.classification.networks import NetworkClassifier, configure_network

__all__ = [
    "ClassificationEvaluator",
    "ImageClassifier",
    "NetworkClassifier",
    "check_classes",
    "check_input",
    "configure_network",
    "is_classifier",
    "load_dataset",
    "register_configured",
    "register_image_folder",
]
