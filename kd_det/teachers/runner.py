"""A frozen network run on the student's batches, before the student's own layers and only as deep as it is read."""

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_det.features.context import normalised_images
from kd_det.features.regions import RegionHead
from kd_det.features.taps import Taps

__all__ = ["Teacher", "TeacherMaps", "check_teacher", "padded_images", "without_sizes"]


class TeacherMaps(NamedTuple):
    """What a teacher computed for a batch."""

    features: Dict[str, List[Tensor]]  # the maps at every tap, one for each time its module ran; they cover the canvas
    outputs: Dict[str, Tensor]  # of the backbone, on the teacher's own padding
    canvas: Tuple[int, int]  # height and width of the student's padded batch
    detections: Optional[List[Dict]] = None  # what the network returns in eval


def check_teacher(model: nn.Module, input_format: Optional[str]) -> None:
    """
    Raise a ``ValueError`` if a network has no backbone, no normalisation or no channel order, or wants images of other
    colours than the student's.
    """
    name = type(model).__name__
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise ValueError(f"The teacher {name} has no backbone to read; wrap it: kd_det.teachers.FeatureTeacher.")
    if not (hasattr(model, "preprocess_image") or hasattr(model, "pixel_mean") and hasattr(model, "pixel_std")):
        raise ValueError(f"The teacher {name} has neither preprocess_image nor pixel_mean and pixel_std.")
    wanted = getattr(model, "input_format", None)
    if wanted is None:
        raise ValueError("Unknown channel order of the teacher's images: set its input_format, e.g. 'BGR'.")
    if input_format is not None and sorted(input_format) != sorted(wanted):
        raise ValueError(
            f"The student's images are {input_format!r} (INPUT.FORMAT) and the teacher wants {wanted!r}; only channel "
            f"orders of the same colours, such as 'BGR' and 'RGB', can be matched."
        )


class Teacher:
    """
    Runs a frozen network on the student's batches and reads its taps.

    It is not an ``nn.Module``, so nothing that walks the student's wrapper (``train()``, ``half()``, ``state_dict()``,
    optimizers, DDP) can meet the teacher; a deep copy of the wrapper shares it. It follows the images' device.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str],
        *,
        student: nn.Module,
        input_format: str,
        with_head: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        """
        Args:
            model: as :func:`build_teacher` returns it.
            taps: the places to read.
            student: when its backbone is called, the teacher runs first.
            input_format: channel order of the images in these batches.
            with_head: regions will be given to the teacher's box head, ``head``.
            dtype: of the teacher's backbone. What lies behind the backbone stays in float32.

        Raises:
            ValueError: a tap that does not exist, or see :func:`check_teacher`.
        """
        check_teacher(model, input_format)
        self.model = model.eval().requires_grad_(False)
        self.fingerprint = _fingerprint(model)
        self.taps = Taps(model, taps, side="teacher")
        self.head = RegionHead(getattr(model, "roi_heads", None), side="teacher") if with_head else None
        is_same_order = input_format == model.input_format
        self._order = None if is_same_order else [input_format.index(channel) for channel in model.input_format]
        self._shares_images = is_same_order and _normalise_alike(student, model)
        self._dtype = dtype
        model.backbone.to(dtype)
        self._heads = self._dense_heads()
        self._pending: Optional[List[Dict]] = None
        self._maps: Optional[TeacherMaps] = None
        self._canvas: Optional[Tuple[int, int]] = None  # what the maps must cover; None: the teacher's own padding
        self._outputs: Dict[str, Tensor] = {}
        # Hooks that stay, switched by what is pending: attaching them anew would make compiled networks compile anew.
        # Before those of the networks themselves, which may resize their images.
        self.handles = [
            *self.taps.handles,
            student.backbone.register_forward_pre_hook(self._before_student, prepend=True),
            model.backbone.register_forward_pre_hook(self._enter_backbone, prepend=True),
            model.backbone.register_forward_hook(self._leave_backbone),
        ]

    def __deepcopy__(self, memo):
        return self

    @contextlib.contextmanager
    def running(self, batched_inputs: List[Dict]):
        """A context: the student's forward on these inputs runs the teacher first, and :meth:`pop` gives its maps."""
        self._pending, self._maps = batched_inputs, None
        try:
            yield
        except BaseException:
            self._maps = None
            raise
        finally:
            self._pending = None

    def pop(self) -> TeacherMaps:
        """
        Raises:
            RuntimeError: the student's backbone did not run inside :meth:`running`.
        """
        maps, self._maps = self._maps, None
        if maps is None:
            raise RuntimeError("the student's forward did not call its backbone, so the teacher was not run")
        return maps

    @torch.no_grad()
    def __call__(
        self,
        batched_inputs: List[Dict],
        device: torch.device,
        images: Optional[Tensor] = None,
        *,
        detects: bool = False,
    ) -> TeacherMaps:
        """
        The maps of the student's inputs, with raw images (C, H, W), on a device, where the teacher moves; with
        ``detects`` also the detections, for which the whole network runs: in the size of the file's image where the
        inputs have "height" and "width", as in Detectron2, else in that of the input. Without the student's normalised
        and padded batch of images, they are on the teacher's own padding.
        """
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        self._canvas = tuple(images.shape[-2:]) if images is not None else None
        try:
            if not self.taps.names and self.head is None and not detects:
                return TeacherMaps({}, {}, self._canvas or (0, 0))
            stops = self._heads == [] and self.head is None and not detects
            if not detects:
                batched_inputs = without_sizes(batched_inputs)  # what a whole network finds for the taps is not read
            # A dtype of its own is not to be cast to that of the student's autocast.
            casts = self._dtype == torch.float32
            autocast = contextlib.nullcontext() if casts else torch.autocast(device.type, enabled=False)
            # RetinaNet's inference overwrites what its head gave, so taps there take a forward of their own.
            with autocast:
                detections = self.model(self.inputs(batched_inputs)) if detects and self._heads else None
            with self.taps.recording(stop_when_complete=stops), autocast:
                if self._heads is None or detects and not self._heads:
                    detections = self.model(self.inputs(batched_inputs))
                else:
                    if images is None or not self._shares_images:
                        images = padded_images(self.model, self.inputs(batched_inputs))
                    outputs = self.model.backbone(images)
                    for head, levels in self._heads:
                        head([outputs[level] for level in levels])
            features = {
                name: [_crop(value, self._padded, self._covered) for value in values]
                for name, values in self.taps.pop().items()
            }
            return TeacherMaps(features, self._outputs, self._covered, detections)
        finally:
            self._outputs, self._canvas = {}, None

    @property
    def networks(self) -> List[nn.Module]:
        return [self.model]

    def follow(self, student: nn.Module) -> None:
        """Called before the forward of a training batch, for a teacher whose weights follow the student's."""

    def state_dict(self) -> Dict:
        """What of the teacher a checkpoint must keep; of one that is frozen, nothing."""
        return {}

    def load_state_dict(self, state: Dict) -> None:
        """Restore what :meth:`state_dict` gave; an empty one starts anew."""

    def inputs(self, batched_inputs: List[Dict]) -> List[Dict]:
        """The student's inputs with the channels of their images in the teacher's order."""
        if self._order is None:
            return batched_inputs
        return [{**x, "image": x["image"][self._order]} for x in batched_inputs]

    def _before_student(self, module: nn.Module, args: Tuple[Tensor]) -> None:
        if self._pending is not None:
            batched_inputs, self._pending = self._pending, None
            self._maps = self(batched_inputs, args[0].device, images=args[0])

    def _dense_heads(self) -> Optional[List[Tuple[nn.Module, List[str]]]]:
        """The heads, with their levels, that must run behind the backbone to fill the taps; None: the whole model."""
        candidates = []
        if hasattr(self.model, "head_in_features"):  # RetinaNet, FCOS
            candidates.append((self.model.head, self.model.head_in_features))
        proposals = getattr(self.model, "proposal_generator", None)
        if hasattr(proposals, "rpn_head"):
            candidates.append((proposals.rpn_head, proposals.in_features))
        heads, outside = [], self.taps.outside(self.model.backbone)
        for head, levels in candidates:
            remaining = self.taps.outside(self.model.backbone, *(module for module, _ in heads), head)
            if len(remaining) < len(outside):
                heads.append((head, levels))
                outside = remaining
        return None if outside else heads

    def _enter_backbone(self, module: nn.Module, args: Tuple[Tensor]) -> Tuple[Tensor]:
        """Pads the batch to the student's canvas or, where the network needs more, to its multiple or square."""
        images = args[0]
        own = tuple(images.shape[-2:])
        self._covered = self._canvas or own
        # Detectron2 main's plain vision transformers want squares, or multiples under this spelling.
        constraints = getattr(module, "padding_constraints", {})
        square = constraints.get("square_size", 0)
        multiple = max(getattr(module, "size_divisibility", 1), constraints.get("size_divisiblity", 1), 1)
        height, width = (-(-max(c, s, square) // multiple) * multiple for c, s in zip(self._covered, own))
        self._padded = (height, width)
        if self._padded != own:
            images = F.pad(images, (0, width - own[1], 0, height - own[0]))
        return (images if self._dtype == torch.float32 else images.to(self._dtype), *args[1:])

    def _leave_backbone(self, module: nn.Module, args, outputs):
        if self._dtype != torch.float32:
            outputs = {name: value.float() for name, value in outputs.items()}
        self._outputs = outputs
        return outputs


def without_sizes(batched_inputs: List[Dict]) -> List[Dict]:
    """Inputs without the size of the file's image, to which Detectron2 would scale boxes and masks."""
    return [{k: v for k, v in x.items() if k not in ("height", "width")} for x in batched_inputs]


def padded_images(model: nn.Module, inputs: List[Dict]) -> Tensor:
    """A model's normalised and padded batch of raw images in its channel order."""
    if hasattr(model, "preprocess_image"):
        return model.preprocess_image(inputs).tensor
    # v0.6's ProposalNetwork and SemanticSegmentor normalise inside their forward.
    return normalised_images(model, inputs).tensor


def _normalise_alike(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the student's normalised batch is what the teacher would make of the same images, but for padding."""
    preprocess = getattr(type(teacher), "preprocess_image", None)
    if preprocess is None or getattr(type(student), "preprocess_image", None) is not preprocess:
        return False
    buffers = [(getattr(student, key, None), getattr(teacher, key, None)) for key in ("pixel_mean", "pixel_std")]
    if not all(isinstance(buffer, Tensor) for pair in buffers for buffer in pair):
        return False
    return all(torch.equal(own.to(theirs), theirs) for own, theirs in buffers)


def _fingerprint(model: nn.Module) -> str:
    """Tells one trained network from another, by the names, shapes and some numbers of its weights."""
    state = model.state_dict()
    digest = hashlib.sha256(repr([(name, tuple(value.shape)) for name, value in state.items()]).encode())
    samples = [value.flatten()[:: max(1, value.numel() // 16)].float() for value in state.values()]
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def _crop(features: Tensor, own_canvas: Tuple[int, int], canvas: Tuple[int, int]) -> Tensor:
    if features.dim() != 4 or own_canvas == canvas:
        return features
    height, width = (-(-f * c // o) for f, c, o in zip(features.shape[-2:], canvas, own_canvas))
    return features[:, :, :height, :width]
