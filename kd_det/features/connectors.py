"""From the student's channels to the teacher's."""

from collections.abc import Sequence

from detectron2.layers import Conv2d, get_norm
from torch import nn

__all__ = ["build_connector", "build_connectors", "connect_where_different"]


def build_connector(student_channels: int, teacher_channels: int, *, norm: str = "", kernel_size: int = 1) -> nn.Module:
    """
    A convolution, initialised as the overhaul paper's code does (normal, variance 2 / Ct).

    Args:
        student_channels, teacher_channels: Cs and Ct.
        norm: a norm of Detectron2 behind it ("BN", "SyncBN", "GN", ...); then the convolution has no bias. "": none.
        kernel_size: odd; the map keeps its size.

    Returns:
        A module from (N, Cs, H, W) to (N, Ct, H, W).

    Raises:
        ValueError: an unknown norm, or one that the channels do not fit (GN has 32 groups).
    """
    try:
        connector = Conv2d(
            student_channels,
            teacher_channels,
            kernel_size=kernel_size,
            padding=kernel_size // 2,
            bias=norm == "",
            norm=get_norm(norm, teacher_channels),
        )
    except KeyError:
        raise ValueError(
            f"Unknown norm of a connector {norm!r}; Detectron2's are BN, SyncBN, FrozenBN, GN, naiveSyncBN and LN, "
            f"and '' is none."
        ) from None
    nn.init.normal_(connector.weight, std=(2 / teacher_channels) ** 0.5)
    if connector.bias is not None:
        nn.init.zeros_(connector.bias)
    return connector


def build_connectors(
    student_channels: Sequence[int], teacher_channels: Sequence[int], *, norm: str = ""
) -> nn.ModuleList:
    """One 1x1 :func:`build_connector` a pair of taps."""
    pairs = zip(student_channels, teacher_channels)
    return nn.ModuleList(build_connector(cs, ct, norm=norm) for cs, ct in pairs)


def connect_where_different(
    student_channels: Sequence[int], teacher_channels: Sequence[int], *, norm: str = ""
) -> nn.ModuleList:
    """As :func:`build_connectors`, but a pair of equal channels is compared as it is."""
    connectors = build_connectors(student_channels, teacher_channels, norm=norm)
    pairs = zip(connectors, student_channels, teacher_channels)
    return nn.ModuleList(nn.Identity() if cs == ct else connector for connector, cs, ct in pairs)
