"""A network looked at: what it detects in an image, and its feature maps without the padding."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from torch import Tensor, nn

from kd_det.features.context import valid_sizes
from kd_det.features.taps import Taps

__all__ = ["Sample", "Seen", "View", "read_sample"]


@dataclass(frozen=True)
class Sample:
    """
    One image.

    Attributes:
        image: (H, W, 3) uint8, BGR.
        inputs: what a detector takes, with the image at the size and in the channel order of ``INPUT``.
        record: its dataset dict; has "annotations" where they are known.
    """

    image: np.ndarray
    inputs: dict
    record: dict


def read_sample(mapper: Callable[[dict], dict], record: dict) -> Sample:
    """
    Read the image of a dataset dict, by the mapper with which a detector is tested, such as Detectron2's
    ``DatasetMapper(cfg, is_train=False)``; that one needs only its "file_name".
    """
    image = read_image(record["file_name"], "BGR")
    inputs = mapper(copy.deepcopy(record))
    return Sample(image, {**inputs, "height": image.shape[0], "width": image.shape[1]}, record)


@dataclass(frozen=True)
class Seen:
    """
    What a network computed for one image.

    Attributes:
        instances: on the CPU, in the image's own size; None for a network that detects nothing.
        maps: by tap, float32 (C, h, w) on the CPU, one for each time its module ran.
    """

    instances: Instances | None
    maps: dict[str, list[Tensor]]


class View:
    """Runs a network on one image at a time. Its hooks stay on the network and do nothing between calls."""

    def __init__(self, model: nn.Module, taps: Iterable[str], *, input_format: str, side: str):
        """
        Args:
            model: a plain detector, or a network with a ``backbone`` that gives only maps; in eval mode when it runs.
            taps: the places to read; none: only detections.
            input_format: channel order of the images it will be given.
            side: what messages call the network, e.g. "student".

        Raises:
            ValueError: a tap that does not exist.
        """
        self.model, self.side = model, side
        self.taps = Taps(model, taps, side=side)
        wanted = getattr(model, "input_format", None) or input_format
        self._order = [input_format.index(channel) for channel in wanted] if wanted != input_format else ...
        self._canvas = (0, 0)
        # Before hooks by which the network pads or resizes its images: the maps cover what it was given.
        model.backbone.register_forward_pre_hook(self._enter_backbone, prepend=True)

    @torch.no_grad()
    def __call__(self, sample: Sample, device: torch.device) -> Seen:
        """
        Raises:
            ValueError: a tap whose module gives no map (1, C, h, w) of the image, or does not keep it in inference.
        """
        image = sample.inputs["image"][self._order].to(device)
        with self.taps.recording():
            outputs = self.model.to(device)([{**sample.inputs, "image": image}])
        found = outputs[0].get("instances") if isinstance(outputs, list) else None
        try:
            maps = self.taps.pop()
        except RuntimeError as e:  # the module did not run, or its output was overwritten
            raise ValueError(f"The {self.side} in inference: {e}") from e
        for tap, values in maps.items():
            if any(value.dim() != 4 or len(value) != 1 for value in values):
                shapes = ", ".join(str(tuple(value.shape)) for value in values[:3])
                raise ValueError(f"{self.side} tap {tap!r} gives {shapes}, expected maps (1, C, h, w) of the image")
        cropped = {tap: [self._crop(value, image.shape[-2:]) for value in values] for tap, values in maps.items()}
        return Seen(None if found is None else found.to("cpu"), cropped)

    def _enter_backbone(self, module: nn.Module, args: tuple) -> None:
        self._canvas = tuple(args[0].shape[-2:])

    def _crop(self, value: Tensor, image_size: tuple[int, int]) -> Tensor:
        ((height, width),) = valid_sizes([tuple(image_size)], self._canvas, tuple(value.shape[-2:]))
        return value[0, :, :height, :width].float().cpu()
