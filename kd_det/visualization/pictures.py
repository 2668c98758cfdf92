"""What a student learned of an image, in rows of panels: detections, and what its losses read at each pair of taps."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from detectron2.data import Metadata
from torch import Tensor, nn

from kd_det.features.position_weights import pad_boxes, position_weights
from kd_det.features.taps import tap_module, tap_names
from kd_det.losses import OverhaulLoss, margin_relu
from kd_det.losses.regions import RegionsLoss
from kd_det.visualization.detections import annotated_objects, draw_detections, draw_ground_truth
from kd_det.visualization.maps import (
    channel_response,
    counted_positions,
    difference,
    relative_attention,
    selectivity,
)
from kd_det.visualization.panels import Chart, Panel, Row, shared_limit
from kd_det.visualization.view import Sample, Seen, View

__all__ = ["Viewer", "attention_row", "detections_row", "margins_row", "selective_channels_row", "weights_row"]

MOST_SELECTIVE = 5  # channels in a row
_ATTENTION, _DIFFERENCE = "attention / its mean", "difference of attentions"


class Viewer:
    """
    A Distiller, or a plain detector, looked at: student and teacher (of several, the first) on one image, and their
    maps pair by pair.
    """

    def __init__(self, model: nn.Module, *, input_format: str, pairs: Sequence[tuple[str, str]] = ()):
        """
        Args:
            model: in eval mode when an image is looked at.
            input_format: channel order of the samples' inputs.
            pairs: of a student's and a teacher's tap; none: those in the backbone that the losses read, or its levels.

        Raises:
            ValueError: a tap that does not exist.
        """
        student, teacher = getattr(model, "student", model), getattr(model, "teacher", None)
        losses = model.losses.values() if teacher is not None else ()
        self.model, self.losses = model, [loss for loss in losses if model.teacher_of(loss) is teacher]
        used = dict.fromkeys(pair for loss in self.losses for pair in zip(loss.student_taps, loss.teacher_taps))
        inside = set(student.backbone.modules())
        used = [pair for pair in used if tap_module(student, pair[0]) in inside]
        levels = [name for name in student.backbone.output_shape() if teacher is None or name in tap_names(teacher)]
        self.pairs = list(pairs) or used or [(name, name) for name in levels]
        own, theirs = zip(*self.pairs) if self.pairs else ((), ())
        self._student = View(student, own, input_format=input_format, side="student")
        self._teacher = View(teacher, theirs, input_format=input_format, side="teacher") if teacher else None

    def __call__(self, sample: Sample, student: str = "student") -> dict[str, Seen]:
        """What the networks see, the teacher first; ``student`` is what the student is called."""
        device = next(self.model.parameters()).device
        ret = {"teacher": self._teacher(sample, device)} if self._teacher else {}
        return {**ret, student: self._student(sample, device)}

    def maps(self, seen: Mapping[str, Seen]) -> Iterator[tuple[tuple[str, str], dict[str, Tensor]]]:
        """Each pair of taps with the maps of all networks there, once for each time that all of them ran the module."""
        for pair in self.pairs:
            values = {name: one.maps[pair[name == "teacher"]] for name, one in seen.items()}
            yield from ((pair, dict(zip(values, maps))) for maps in zip(*values.values()))

    def rows(self, sample: Sample, seen: Mapping[str, Seen]) -> Iterator[tuple[str, list[Row]]]:
        """
        Everything to be seen at each pair of taps, with the student's tap.

        Args:
            seen: by the name of the network, the teacher first where there is one, the student as it is now last.
        """
        for pair, maps in self.maps(seen):
            rows = [attention_row(sample, pair, maps)]
            shown = dict.fromkeys(["teacher", list(maps)[-1]])
            rows += [selective_channels_row(sample, pair[n == "teacher"], n, maps[n]) for n in shown if n in maps]
            for loss in self.losses:
                pairs = list(zip(loss.student_taps, loss.teacher_taps))
                if isinstance(loss, OverhaulLoss) and pair in pairs:
                    rows.append(margins_row(sample, loss, pairs.index(pair), maps))
                # "proposals" are those of a training step.
                if getattr(loss, "regions", "all") not in ("all", "proposals") and pair in pairs:
                    rows.append(weights_row(sample, loss, pair, maps))
            yield pair[0], rows


def detections_row(
    sample: Sample, seen: Mapping[str, Seen], metadata: Metadata, *, min_score: float = 0.5, width: int = 720
) -> Row:
    """What each network detects, after the ground truth where it is known, of the kind that the last one detects."""
    panels = []
    if "annotations" in sample.record:
        like = next((one.instances for one in reversed(seen.values()) if one.instances is not None), None)
        drawn = draw_ground_truth(sample.image, sample.record, metadata, width=width, like=like)
        panels.append(Panel("ground truth", drawn))
    for name, one in seen.items():
        if one.instances is not None:
            drawn = draw_detections(sample.image, one.instances, metadata, width=width, min_score=min_score)
            panels.append(Panel(name, drawn))
    return Row(f"detections with a score of {min_score:g} or more", panels or [Panel("image", sample.image)])


def attention_row(sample: Sample, pair: tuple[str, str], maps: Mapping[str, Tensor]) -> Row:
    """
    The attention of each network on one scale, and the differences of the last one, the student as it is now, to the
    others.

    Args:
        pair: of taps, for the title.
        maps: by the name of the network, (C, h, w).
    """
    attention = {name: relative_attention(value) for name, value in maps.items()}
    limit = shared_limit(list(attention.values()))
    panels = [Panel(name, sample.image, value, limit, _ATTENTION) for name, value in attention.items()]
    *others, last = attention
    changes = {name: difference(attention[last], attention[name]) for name in others}
    if changes:
        limit = shared_limit(list(changes.values()))
    for name, change in changes.items():
        panels.append(Panel(f"{last} minus {name}", sample.image, change, limit, _DIFFERENCE, is_difference=True))
    return Row(f"attention at {_place(pair)}", panels)


def selective_channels_row(sample: Sample, tap: str, name: str, features: Tensor) -> Row:
    """The channels of one network that single out the fewest positions, see :func:`selectivity`."""
    peaks = selectivity(features)
    panels = []
    for channel in peaks.argsort(descending=True)[:MOST_SELECTIVE].tolist():
        values, title = channel_response(features, channel), f"channel {channel}, selectivity {peaks[channel]:.1f}"
        panels.append(Panel(title, sample.image, values, shared_limit([values]), "response / its mean"))
    return Row(f"most selective channels of the {name} at {tap}", panels)


@torch.no_grad()
def margins_row(sample: Sample, loss: OverhaulLoss, level: int, maps: Mapping[str, Tensor]) -> Row:
    """
    OFD's margins, and the share of channels in which partial L2 counts a position of each student, whose maps go
    through the connector as it is now.
    """
    connector, margin = loss.connectors[level], loss.margins[level].value
    target = margin_relu(maps["teacher"][None].to(margin.device), margin)[0]
    title = "margins" if margin.any() else "margins, not measured yet"
    panels: list = [Chart(title, margin.cpu(), "channels in the order of their margin")]
    for name, features in maps.items():
        if name != "teacher":
            counted = counted_positions(connector(features[None].to(margin.device))[0], target)
            panels.append(Panel(f"counted, {name}", sample.image, counted.cpu(), 1.0, "share of channels"))
    return Row(f"OFD at {loss.student_taps[level]}", panels)


def weights_row(sample: Sample, loss: RegionsLoss, pair: tuple[str, str], maps: Mapping[str, Tensor]) -> Row:
    """How much each position counts in a loss with ``REGIONS``, by the ground truth; without any, none does."""
    size = tuple(min(sides) for sides in zip(*(value.shape[1:] for value in maps.values())))
    boxes, _ = annotated_objects(sample.record)
    boxes, share = pad_boxes([boxes.tensor], torch.device("cpu")), loss.foreground_share
    weights = position_weights(loss.regions, boxes, sample.image.shape[:2], size, foreground_share=share)[0, 0]
    values = weights / weights.mean().clamp(min=1e-30)
    panel = Panel(f"regions: {loss.regions}", sample.image, values, shared_limit([values]), "weight / its mean")
    return Row(f"weights of the {loss.name.upper()} loss at {_place(pair)}", [panel])


def _place(pair: tuple[str, str]) -> str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} (the teacher's {pair[1]})"
