"""
Backbone pretraining: image classification with the same Distiller, losses and trainer as detection.

``import kd_det`` imports the meta-architectures (classifier.py, networks.py), which register themselves; the rest of
the stage (data, trainer) is imported where it is used.
"""
