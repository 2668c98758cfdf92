"""From the student's channels to the teacher's."""

from collections.abc import Sequence

from detectron2.layers import Conv2d, get_norm
from torch import nn

__all__ = ["build_connectors", "connect_where_different"]


def build_connectors(
    student_channels: Sequence[int], teacher_channels: Sequence[int], *, norm: str = ""
) -> nn.ModuleList:
    """
    One 1x1 convolution a pair of taps, initialised as the overhaul paper's code does (normal, variance 2 / Ct).

    Args:
        student_channels: Cs of each student map.
        teacher_channels: Ct of each teacher map.
        norm: a norm of Detectron2 behind it ("BN", "SyncBN", "GN", ...); then the convolution has no bias. "": none.

    Returns:
        Modules from (N, Cs, H, W) to (N, Ct, H, W).

    Raises:
        ValueError: an unknown norm, or one that the channels do not fit (GN has 32 groups).
    """
    connectors = nn.ModuleList()
    for cs, ct in zip(student_channels, teacher_channels):
        try:
            connector = Conv2d(cs, ct, kernel_size=1, bias=norm == "", norm=get_norm(norm, ct))
        except KeyError:
            raise ValueError(
                f"Unknown norm of a connector {norm!r}; Detectron2's are BN, SyncBN, FrozenBN, GN, naiveSyncBN and LN, "
                f"and '' is none."
            ) from None
        nn.init.normal_(connector.weight, std=(2 / ct) ** 0.5)
        if connector.bias is not None:
            nn.init.zeros_(connector.bias)
        connectors.append(connector)
    return connectors


def connect_where_different(
    student_channels: Sequence[int], teacher_channels: Sequence[int], *, norm: str = ""
) -> nn.ModuleList:
    """As :func:`build_connectors`, but a pair of equal channels is compared as it is."""
    connectors = build_connectors(student_channels, teacher_channels, norm=norm)
    pairs = zip(connectors, student_channels, teacher_channels)
    return nn.ModuleList(nn.Identity() if cs == ct else connector for connector, cs, ct in pairs)
