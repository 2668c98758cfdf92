"""What is read of a network: taps and their table, connectors, and which positions and regions count."""

from kd_det.features.connectors import build_connector, build_connectors, connect_where_different
from kd_det.features.taps import Taps, tap_names, tap_shape

__all__ = ["Taps", "build_connector", "build_connectors", "connect_where_different", "tap_names", "tap_shape"]
