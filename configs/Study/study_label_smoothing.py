"""SmoothedROIHeads: Faster R-CNN with smoothed labels (arXiv 1512.00567, section 7), the control of soft targets."""

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, StandardROIHeads
from torch.nn import functional as F

SMOOTHING = 0.1  # as in the paper


class SmoothedOutputLayers(FastRCNNOutputLayers):
    def losses(self, predictions, proposals):
        classes = [proposal.gt_classes for proposal in proposals]
        smoothed = F.cross_entropy(predictions[0], torch.cat(classes), label_smoothing=SMOOTHING)
        return {**super().losses(predictions, proposals), "loss_cls": smoothed}


@ROI_HEADS_REGISTRY.register()
class SmoothedROIHeads(StandardROIHeads):
    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        return {**ret, "box_predictor": SmoothedOutputLayers(cfg, ret["box_head"].output_shape)}
