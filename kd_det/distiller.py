"""The meta-architecture that trains a student on its own and distillation losses, and in eval is the student."""

import contextlib
import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.compat import has_event_storage
from kd_det.config import check_kd_config
from kd_det.features.context import StepContext
from kd_det.features.region_branches import RegionBranch
from kd_det.features.regions import RegionHead, RegionTaps
from kd_det.features.taps import Taps
from kd_det.losses.build import DistillationLoss, build_losses, enabled_loss_classes
from kd_det.random_state import preserved_random_state
from kd_det.student import build_student
from kd_det.teachers.build import build_teacher, teacher_dtype
from kd_det.teachers.runner import Teacher, check_teacher
from kd_det.weights.inherit import inherit_weights

__all__ = ["Distiller"]

logger = logging.getLogger(__name__)

# Where a checkpoint keeps what the losses own, and which teacher that belongs to: beside the weights, in the metadata
# that torch attaches to a state dict and that plain models ignore.
_STATE_KEY = "kd_det.losses"
_TEACHER_KEY = "kd_det.teacher"


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """
    A student detector, untouched, that is also taught.

    In training, ``forward`` returns the student's own loss dict with one more key per distillation loss
    (``loss_nst``, ...), already multiplied by its weight and schedule. In eval it is the student's forward.

    To code that walks a model, the Distiller is the student with one more module, ``losses``: its children, parameters
    and buffers are the student's under the student's names, so a weight's name in a checkpoint is the path of its
    module, and an optimizer that goes by names finds them. ``state_dict`` is exactly the student's; what the losses
    train or remember is in the metadata of that state dict. The teacher is outside the module tree.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Optional[nn.Module] = None,
        losses: Sequence[DistillationLoss] = (),
        input_format: Optional[str] = None,
        teacher_dtype: torch.dtype = torch.float32,
        missing_teacher: Optional[FileNotFoundError] = None,
    ):
        """
        Args:
            student: a detector of any meta-architecture with a ``backbone``.
            teacher: as :func:`kd_det.build_teacher` returns it; is frozen. None only without losses.
            losses: what is distilled; without any, training is the plain student's, bit for bit.
            input_format: channel order of the images in the batches; default: the student's ``input_format``.
            teacher_dtype: of the teacher's backbone, torch.bfloat16 or torch.float16 for less memory and time.
            missing_teacher: why there is no teacher; is raised in the first training step.

        Raises:
            ValueError: a tap that does not exist, a loss that the networks cannot serve, losses without a teacher,
                two losses of one name, or images that the teacher cannot read.
        """
        super().__init__()
        if "losses" in student._modules:
            raise ValueError(f"The student {type(student).__name__} has a module named 'losses', a name of Distiller.")
        # The student itself is no submodule: its parts are, under their own names.
        object.__setattr__(self, "student", student)
        self._parameters, self._buffers = student._parameters, student._buffers
        self._non_persistent_buffers_set = student._non_persistent_buffers_set
        self._modules.update(student._modules)
        self.losses = nn.ModuleDict()
        for loss in losses:
            if loss.name in self.losses:
                raise ValueError(f"Two losses are named {loss.name!r}; give one of their classes another name.")
            self.losses[loss.name] = loss
        self.input_format = input_format or getattr(student, "input_format", None)
        self.missing_teacher = missing_teacher
        self._teacher: Optional[Teacher] = None
        self._region_taps: Optional[RegionTaps] = None
        if not self.losses:
            return

        if teacher is None:
            raise ValueError(f"The losses {list(self.losses)} need a teacher, and none was given.")
        if self.input_format is None:
            raise ValueError("Unknown channel order of the student's images: give input_format, e.g. 'BGR'.")
        branches = sorted({loss.branch for loss in losses if loss.branch})
        needs_regions = bool(branches) or any(loss.needs_regions for loss in losses)
        check_teacher(teacher, self.input_format)  # before the losses look for its taps
        with preserved_random_state():  # connectors must not shift what training draws
            for loss in losses:
                loss.connect(student, teacher)
                loss.to(self.device)
        self._student_taps = Taps(student, [t for loss in losses for t in loss.student_taps], side="student")
        self._teacher = Teacher(
            teacher,
            [t for loss in losses for t in loss.teacher_taps],
            input_format=self.input_format,
            student=student,
            with_head=needs_regions,
            dtype=teacher_dtype,
        )
        if needs_regions or any(loss.needs_proposals for loss in losses):
            roi_heads = getattr(student, "roi_heads", None)
            branches = [RegionBranch(roi_heads, name, side="student") for name in branches]
            self._region_taps = RegionTaps(RegionHead(roi_heads, side="student"), branches)
        # The student outlives the Distiller; the teacher must not live on in a hook of it.
        weakref.finalize(self, _remove, [*self._student_taps.handles, *self._teacher.handles])
        self._warned_of_frozen_taps = False

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: Optional[nn.Module] = None, teacher: Optional[nn.Module] = None
    ) -> Dict:
        """``student`` and ``teacher``: the config's, where they are built already."""
        check_kd_config(cfg.KD)
        ret = {"student": student or build_student(cfg), "input_format": cfg.INPUT.FORMAT}
        if enabled_loss_classes(cfg) or cfg.KD.INHERIT:
            # What distillation draws at random must not shift what training draws after it.
            with preserved_random_state():
                try:
                    teacher = teacher or build_teacher(cfg)
                except FileNotFoundError as e:
                    # A detector is also built from its training's config where it only infers.
                    logger.warning(f"Without its teacher this model infers, and will not train: {e}")
                    return {**ret, "missing_teacher": e}
                inherit_weights(ret["student"], teacher, cfg.KD.INHERIT)
                ret.update(teacher=teacher, losses=build_losses(cfg, ret["student"], teacher))
                ret["teacher_dtype"] = teacher_dtype(cfg)
        return ret

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def teacher(self) -> Optional[nn.Module]:
        """The frozen teacher, which is not a submodule; None without losses."""
        return self._teacher.model if self._teacher is not None else None

    def train(self, mode: bool = True):
        super().train(mode)
        self.student.train(mode)  # the student's own flag, and whatever its class does in train()
        return self

    def forward(self, batched_inputs: List[Dict]):
        """
        In training, a dict of scalars: the student's losses and the distillation losses; a ``FileNotFoundError`` if the
        config's teacher was not found. In eval, what the student returns.
        """
        if not self.training:
            return self.student(batched_inputs)
        if self.missing_teacher is not None:
            raise self.missing_teacher
        factors = self._factors()
        active = [loss for name, loss in self.losses.items() if factors[name]]
        if not active:
            losses = self.student(batched_inputs)
            return {**losses, **{loss.key: self._zero(loss) for loss in self.losses.values()}}

        # Copied once, for both networks.
        batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
        for loss in active:
            batched_inputs = loss.prepare(batched_inputs, self.device)
        regions = self._region_taps
        recording_regions = regions.recording() if regions is not None else contextlib.nullcontext()
        with self._teacher.running(batched_inputs), self._student_taps.recording(), recording_regions:
            losses = self.student(batched_inputs)
        features, taught = self._student_taps.pop(), self._teacher.pop()
        self._warn_of_frozen_taps(features)
        context = StepContext(
            image_sizes(batched_inputs),
            taught.canvas,
            batched_inputs=batched_inputs,
            task_losses=dict(losses),
            teacher=self._teacher,
            teacher_outputs=taught.outputs,
            student_head=regions.head if regions is not None else None,
            branch_regions=regions.branch_regions() if regions is not None else {},
            sampled=regions.pop() if regions is not None else None,
        )
        if any(loss.needs_regions for loss in active):
            context.region_pairs()  # for all losses, before the first
        for name, loss in self.losses.items():
            if loss.key in losses:
                raise ValueError(f"The student already has a loss {loss.key!r}; name the distillation loss otherwise.")
            if not factors[name]:
                losses[loss.key] = self._zero(loss)
                continue
            own, theirs = _at(features, loss.student_taps), _at(taught.features, loss.teacher_taps)
            value = loss(own, theirs, context)
            losses[loss.key] = value if factors[name] == 1 else factors[name] * value
        return losses

    @torch.no_grad()
    def calibrate(self, batches: Iterable[List[Dict]]) -> None:
        """
        Show the teacher's responses to these batched inputs to the losses that measure something (OFD's margins), which
        they otherwise do in training, on the first batches. In a distributed run every rank gives as many batches; all
        get the same result.
        """
        for batched_inputs in batches:
            maps = self._teacher(batched_inputs, self.device)
            context = StepContext(image_sizes(batched_inputs), maps.canvas, batched_inputs=batched_inputs)
            for loss in self.losses.values():
                loss.observe(_at(maps.features, loss.teacher_taps), context)

    def _factors(self) -> Dict[str, float]:
        scheduled = not all(loss.schedule.is_constant for loss in self.losses.values())
        if scheduled and not has_event_storage():
            raise RuntimeError(
                "Warm-up, decay and stop of distillation losses follow the iteration of Detectron2's EventStorage: "
                "run the training step inside `with EventStorage(start_iter) as storage:` and call storage.step()."
            )
        iteration = get_event_storage().iter if scheduled else 0
        return {name: loss.factor(iteration) for name, loss in self.losses.items()}

    def _zero(self, loss: nn.Module) -> Tensor:
        """A loss that is off: 0 on the student's device, from which DDP finds a gradient for every connector."""
        return sum((p.view(-1)[:0].sum() for p in loss.parameters()), torch.zeros((), device=self.device))

    def _warn_of_frozen_taps(self, features: Dict[str, List[Tensor]]) -> None:
        if self._warned_of_frozen_taps:
            return
        self._warned_of_frozen_taps = True
        frozen = [name for name, maps in features.items() if not any(m.requires_grad for m in maps)]
        if frozen:
            logger.warning(
                f"The student taps {frozen} carry no gradient (a frozen stage, MODEL.BACKBONE.FREEZE_AT, or reentrant "
                f"activation checkpointing): losses there teach nothing but their connectors."
            )

    # A checkpoint is the student's.

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The student's state dict; what the losses own is in its metadata."""
        ret = self.student.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        state = self.losses.state_dict()
        if state:
            ret._metadata[_STATE_KEY] = dict(state)
            ret._metadata[_TEACHER_KEY] = self._teacher.fingerprint
        return ret

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """Load a student's state dict and, where its metadata holds them for this teacher, what the losses own."""
        metadata = getattr(state_dict, "_metadata", {})
        state = metadata.get(_STATE_KEY, {})
        if self.losses.state_dict():
            made_with = metadata.get(_TEACHER_KEY)  # checkpoints of kd_det 0.1.0 do not have it
            if state and made_with not in (None, self._teacher.fingerprint):
                logger.warning("The weights were distilled from another teacher: connectors and margins start anew.")
                state = {}
            self._load_losses(state)
        return self.student.load_state_dict(state_dict, strict, **kwargs)

    def _load_losses(self, state: Dict[str, Tensor]) -> None:
        """Restore each loss whose whole state is there in its shapes."""
        for name, loss in self.losses.items():
            own = {key: tuple(value.shape) for key, value in loss.state_dict().items()}
            saved = {key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")}
            saved = loss.upgrade_state(saved) if saved else saved
            if own and {key: tuple(value.shape) for key, value in saved.items()} == own:
                loss.load_state_dict(saved)
            elif own:
                logger.info(f"The weights hold no state for {loss.key}: its connectors and margins start anew.")


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()


def image_sizes(batched_inputs: List[Dict]) -> List[tuple[int, int]]:
    return [tuple(x["image"].shape[-2:]) for x in batched_inputs]


def _at(features: Dict[str, List[Tensor]], taps: Sequence[str]) -> List[Tensor]:
    return [value for tap in taps for value in features[tap]]
