"""What losses share whose positions can be weighted by where the objects are."""

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from kd_det.errors import unknown_name
from kd_det.features.position_weights import REGIONS
from kd_det.losses.build import DistillationLoss

__all__ = ["RegionsLoss"]


class RegionsLoss(DistillationLoss):
    """
    Base of losses on maps with an option for the positions that count, see
    :func:`kd_det.features.position_weights.position_weights`. In each image the weights are scaled to a mean of 1, so
    that the loss' own weight does not depend on how many objects there are. An image without objects does not count
    with "boxes" and "gaussian", and is background alone with "foreground_background".
    """

    @configurable
    def __init__(self, *, regions: str = "all", foreground_share: float = 0.2, **kwargs):
        """
        Args:
            regions: "all" valid positions alike; "boxes", "gaussian" or "foreground_background" of the ground truth;
                "proposals": each position by how many of the regions cover it that the student's ROI heads sampled in
                this step, which costs no forward and no wait.
            foreground_share: with "foreground_background", the share of an image's weight that lies on its objects.
            kwargs: see :class:`DistillationLoss`.

        Raises:
            ValueError: unknown regions, or a share that is not in 0 to 1.
        """
        super().__init__(**kwargs)
        if regions not in REGIONS:
            raise ValueError(unknown_name(self.config_key("REGIONS"), regions, REGIONS))
        if not isinstance(foreground_share, (int, float)) or not 0 <= foreground_share <= 1:
            raise ValueError(f"{self.config_key('FOREGROUND_SHARE')} must be in 0 to 1, found {foreground_share}.")
        self.regions, self.foreground_share = regions, foreground_share
        self.needs_proposals = regions == "proposals"
        self.needs_labels = regions not in ("all", "proposals")

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> dict:
        node = cfg.KD[cls.name.upper()]
        ret = super().from_config(cfg, student, teacher)
        return {**ret, "regions": node.REGIONS, "foreground_share": node.FOREGROUND_SHARE}

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        super().connect(student, teacher)
        # Students of the pretraining stage alone have this attribute; their images have a label at most, and no boxes.
        if self.regions != "all" and hasattr(student, "needs_labels"):
            raise ValueError(
                f"{self.config_key('REGIONS')} is {self.regions!r}, and {type(student).__name__} has images without "
                f"boxes: it is distilled at 'all' positions."
            )

    def weights_at(self, features: Tensor, context) -> Tensor | None:
        """The weights of the positions of a map (N, C, H, W), float (N, 1, H, W); None where all count alike."""
        if self.regions == "all":
            return None
        return context.position_weights(features, self.regions, self.foreground_share)
