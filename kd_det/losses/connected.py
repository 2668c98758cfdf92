"""What losses with a connector at each tap share."""

from collections.abc import Sequence

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

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
        self,
        *,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        connector_norm: str = "",
        **kwargs,
    ):
        """
        Args:
            student_channels, teacher_channels: one number a tap; None: read from the networks by the Distiller.
            connector_norm: a norm of Detectron2 behind each 1x1 convolution; "": none.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        self.connector_norm = connector_norm
        self._is_built = student_channels is not None and teacher_channels is not None
        if self._is_built:
            self.build(student_channels, teacher_channels)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> dict:
        node = cfg.KD[cls.name.upper()]
        return {**super().from_config(cfg, student, teacher), "connector_norm": node.CONNECTOR_NORM}

    @property
    def connector_options(self) -> dict:
        """What every connector is built with."""
        return {"norm": self.connector_norm, "norm_key": f"KD.{self.name.upper()}.CONNECTOR_NORM"}

    def build(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        """Build every module whose size depends on the channels at the taps. Subclasses extend it."""
        build = build_connectors if self.connects_equal_channels else connect_where_different
        self.connectors = build(student_channels, teacher_channels, **self.connector_options)

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        super().connect(student, teacher)
        if not self._is_built:
            self.build(*tap_channels(self, student, teacher))
            self._is_built = True

    def connected_pairs(
        self, student: list[Tensor], teacher: list[Tensor], context
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """:meth:`pairs`, with the student's maps behind their connectors."""
        pairs = zip(self.connectors, self.pairs(student, teacher, context))
        return [(connector(s), t, valid) for connector, (s, t, valid) in pairs]
