"""What losses with a connector at each tap share."""

from collections.abc import Sequence

from detectron2.config import CfgNode, configurable
from torch import nn

from kd_det.features.connectors import build_connectors, connect_where_different
from kd_det.losses.build import DistillationLoss, tap_channels

__all__ = ["ConnectedLoss"]


class ConnectedLoss(DistillationLoss):
    """
    Base of losses that compare channel with channel, behind a connector from the student's to the teacher's.

    Attributes:
        connects_equal_channels: whether there is a connector even where the numbers of channels agree.
    """

    connects_equal_channels = False

    @configurable
    def __init__(
        self, *, student_channels: Sequence[int], teacher_channels: Sequence[int], connector_norm: str = "", **kwargs
    ):
        """
        Args:
            student_channels, teacher_channels: one number a tap.
            connector_norm: a norm of Detectron2 behind each 1x1 convolution; "": none.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        build = build_connectors if self.connects_equal_channels else connect_where_different
        self.connectors = build(student_channels, teacher_channels, norm=connector_norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> dict:
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD[cls.name.upper()]
        return {**ret, **tap_channels(ret, student, teacher), "connector_norm": node.CONNECTOR_NORM}
