"""Gradient-based AT as a loss of a training step: arXiv 1612.03928, section 3.2."""

from detectron2.config import configurable

from kd_det.losses.attention_transfer import gradient_attention_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, DistillationLoss

__all__ = ["GradientAttentionLoss"]


@DISTILLATION_LOSS_REGISTRY.register()
class GradientAttentionLoss(DistillationLoss):
    """
    :func:`gradient_attention_loss` between the gradients of both networks' task losses at the pixels, for the same
    labels. Pixels, not normalised inputs, because each network normalises in its own way; a grey value is the unit of
    both, which makes the gradients of networks that were trained with a std near 58 that much smaller than the paper's
    (on normalised inputs) and this loss smaller by its square.

    Both networks must be ``ImageClassifier``: ROIAlign has no second derivative, so a detector is refused.
    """

    name = "gradient_at"
    needs_input_gradients = True

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return super().from_config(cfg, student, teacher)

    def forward(self, student, teacher, context):
        pairs = list(zip(*context.input_gradients()))
        return sum(gradient_attention_loss(s[None], t[None]) for s, t in pairs) / len(pairs)
