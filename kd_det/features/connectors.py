"""From the student's channels to the teacher's."""

from collections.abc import Sequence

from detectron2.layers import Conv2d, get_norm
from detectron2.utils import comm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["build_connector", "build_connectors", "connect_where_different"]


class _Connector(Conv2d):
    """Detectron2's convolution with a norm, which refuses what batch norm cannot be trained on."""

    def __init__(self, *args, norm_key: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm_key = norm_key

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"A connector needs maps (N, C, H, W); a student tap gave shape {tuple(x.shape)}.")
        values = x.shape[0] * x.shape[2] * x.shape[3]
        # The synchronised kinds count the values of all ranks.
        is_alone = type(self.norm) is nn.BatchNorm2d or comm.get_world_size() == 1
        if values == 1 and self.training and isinstance(self.norm, _BatchNorm) and is_alone:
            raise ValueError(
                f"The connector's batch norm sees one value per channel: one image, whose map at a tap is 1x1. Set "
                f"{self.norm_key} to 'GN' or '', put more or larger images into a batch, or drop the deepest tap."
            )
        return super().forward(x)


def build_connector(
    student_channels: int,
    teacher_channels: int,
    *,
    norm: str = "",
    kernel_size: int = 1,
    norm_key: str = "CONNECTOR_NORM",
) -> nn.Module:
    """
    A convolution from (N, Cs, H, W) to (N, Ct, H, W), initialised as Detectron2's (normal, variance 2 / (Ct k^2)),
    which is what OFD's code does too.

    Args:
        norm: a norm of Detectron2 behind it ("BN", "SyncBN", "GN", ...); then the convolution has no bias. "": none.
        kernel_size: odd.
        norm_key: the config key of ``norm``, for messages.

    Raises:
        ValueError: an unknown norm, or one that the channels do not fit (GN has 32 groups).
    """
    try:
        norm_layer = get_norm(norm, teacher_channels)
    except KeyError:
        raise ValueError(
            f"Unknown norm of a connector {norm!r}; Detectron2's are BN, SyncBN, FrozenBN, GN, naiveSyncBN and LN, "
            f"and '' is none."
        ) from None
    options = {"kernel_size": kernel_size, "padding": kernel_size // 2, "bias": norm == "", "norm": norm_layer}
    connector = _Connector(student_channels, teacher_channels, **options, norm_key=norm_key)
    c2_msra_fill(connector)
    return connector


def build_connectors(student_channels: Sequence[int], teacher_channels: Sequence[int], **options) -> nn.ModuleList:
    """One :func:`build_connector` for each pair of taps."""
    pairs = zip(student_channels, teacher_channels)
    return nn.ModuleList(build_connector(cs, ct, **options) for cs, ct in pairs)


def connect_where_different(
    student_channels: Sequence[int], teacher_channels: Sequence[int], **options
) -> nn.ModuleList:
    """As :func:`build_connectors`, but a pair of equal channels is compared as it is."""
    connectors = build_connectors(student_channels, teacher_channels, **options)
    pairs = zip(connectors, student_channels, teacher_channels)
    return nn.ModuleList(nn.Identity() if cs == ct else connector for connector, cs, ct in pairs)
