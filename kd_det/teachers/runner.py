"""A frozen network run on the student's batches, only as deep as its taps are read."""

from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_det.features.taps import Taps

__all__ = ["Teacher", "pixel_gradients", "with_pixel_gradients"]


class Teacher:
    """
    Runs a frozen network on the student's batches and reads its taps.

    It is not an ``nn.Module``, so nothing that walks the student's wrapper (``train()``, ``half()``, ``state_dict()``,
    optimizers, DDP) can meet the teacher; a deep copy of the wrapper shares it. It follows the images' device.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str], *, whole_backbone: bool = False):
        """
        Args:
            model: a detector with ``backbone`` and ``preprocess_image``, as :func:`build_teacher` returns it.
            taps: the places to read.
            whole_backbone: the outputs of the backbone are wanted too (to pool regions from), not only the taps.

        Raises:
            ValueError: a tap that does not exist.
        """
        self.model = model.eval().requires_grad_(False)
        self.taps = Taps(model, taps, side="teacher")
        self._whole_backbone = whole_backbone
        self._runs_whole_model = not self.taps.within(model.backbone)

    def __deepcopy__(self, memo):
        return self

    @torch.no_grad()
    def __call__(
        self, batched_inputs: List[Dict], *, input_format: str, canvas: Tuple[int, int], device: torch.device
    ) -> Tuple[Dict[str, List[Tensor]], Dict[str, Tensor]]:
        """
        Args:
            batched_inputs: the student's, with raw images (C, H, W).
            input_format: channel order of these images, e.g. "BGR".
            canvas: height and width of the batch as the student padded it; the maps at the taps cover just that.
            device: where the student is; the teacher follows it.

        Returns:
            The maps at every tap, and the outputs of the backbone (empty unless ``whole_backbone``).
        """
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        inputs = [{**x, "image": _reorder(x["image"], input_format, self.model.input_format)} for x in batched_inputs]
        outputs: Dict[str, Tensor] = {}
        if not self.taps.names and not self._whole_backbone:
            return {}, outputs
        if self._runs_whole_model:
            # A dense head is run by its own meta-architecture, which pads as it likes: Taps see what it computes.
            own_canvas = canvas
            with self.taps.recording(stop_when_complete=True):
                self.model(inputs)
        else:
            images = self._images(inputs, canvas)
            own_canvas = tuple(images.shape[-2:])
            with self.taps.recording(stop_when_complete=not self._whole_backbone):
                outputs = self.model.backbone(images)
        features = {
            name: [_crop(value, own_canvas, canvas) for value in values] for name, values in self.taps.pop().items()
        }
        return features, outputs

    def input_gradients(self, batched_inputs: List[Dict], *, input_format: str) -> List[Tensor]:
        """
        The gradient of each image's own task loss at its pixels, (C, H, W), in the images' own channel order.

        Args:
            batched_inputs: the student's, with labels.
            input_format: channel order of the images.
        """
        with torch.enable_grad():
            inputs = with_pixel_gradients(batched_inputs, next(self.model.parameters()).device)
            reordered = [{**x, "image": _reorder(x["image"], input_format, self.model.input_format)} for x in inputs]
            return pixel_gradients(self.model.task_losses(reordered), inputs)

    def _images(self, inputs: List[Dict], canvas: Tuple[int, int]) -> Tensor:
        """The normalised batch, padded to the student's canvas or, where the strides ask for more, to a multiple."""
        images = self.model.preprocess_image(inputs).tensor
        multiple = max(self.model.backbone.size_divisibility, 1)
        height, width = (max(-(-c // multiple) * multiple, s) for c, s in zip(canvas, images.shape[-2:]))
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def with_pixel_gradients(batched_inputs: List[Dict], device: torch.device) -> List[Dict]:
    """Batched inputs whose images are float leaves that keep their gradient."""
    return [
        {**x, "image": x["image"].detach().to(device, torch.float32, copy=True).requires_grad_()}
        for x in batched_inputs
    ]


def pixel_gradients(
    task_losses: Dict[str, Tensor], batched_inputs: List[Dict], *, create_graph: bool = False
) -> List[Tensor]:
    """The gradients of each image's own loss, if the task losses are means over the images."""
    images = [x["image"] for x in batched_inputs]
    total = len(images) * sum(task_losses.values())
    return list(torch.autograd.grad(total, images, create_graph=create_graph))


def _reorder(image: Tensor, found: str, wanted: str) -> Tensor:
    """
    The image's channels as the teacher wants them.

    Raises:
        ValueError: two orders that no permutation of channels joins, e.g. "BGR" and "YUV-BT.601".
    """
    if found == wanted:
        return image
    if sorted(found) != sorted(wanted):
        raise ValueError(
            f"The student's images are {found!r} (INPUT.FORMAT) and the teacher wants {wanted!r}; "
            f"only channel orders of the same colours, such as 'BGR' and 'RGB', can be matched."
        )
    return image[[found.index(channel) for channel in wanted]]


def _crop(features: Tensor, own_canvas: Tuple[int, int], canvas: Tuple[int, int]) -> Tensor:
    if features.dim() != 4 or own_canvas == canvas:
        return features
    height, width = (-(-f * c // o) for f, c, o in zip(features.shape[-2:], canvas, own_canvas))
    return features[:, :, :height, :width]
