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
from kd_det.features.unlabelled import UNLABELLED, PseudoLabels, split_unlabelled, without_labels
from kd_det.losses.auto_weight import measure_auto_weights
from kd_det.losses.build import DistillationLoss
from kd_det.losses.summary import distillation_summary
from kd_det.random_state import preserved_random_state
from kd_det.student import build_student
from kd_det.teachers.ensemble import AveragedTeacher, OtherTeacher, TeacherAverage, run_teacher
from kd_det.teachers.feature_teacher import FeatureTeacher
from kd_det.teachers.runner import Teacher, TeacherMaps, check_teacher, padded_images, without_sizes
from kd_det.teaching import (
    build_teachers_and_losses,
    check_teaching,
    distillation_state,
    load_distillation_state,
)

__all__ = ["Distiller"]

logger = logging.getLogger(__name__)


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
        teacher: "nn.Module | TeacherAverage | None" = None,
        losses: Sequence[DistillationLoss] = (),
        input_format: Optional[str] = None,
        teacher_dtype: torch.dtype = torch.float32,
        missing_teacher: Optional[FileNotFoundError] = None,
        other_teachers: Sequence[OtherTeacher] = (),
        pseudo_labels: Optional[PseudoLabels] = None,
    ):
        """
        Args:
            student: a detector of any meta-architecture with a ``backbone``.
            teacher: as :func:`kd_det.build_teacher` returns it; is frozen. None only without losses. Or several to be
                averaged, or the student's own average, see :mod:`kd_det.teachers`.
            losses: what is distilled; without any, training is the plain student's, bit for bit.
            input_format: channel order of the images in the batches; default: the student's ``input_format``.
            teacher_dtype: of the teacher's backbone, torch.bfloat16 or torch.float16 for less memory and time.
            missing_teacher: why there is no teacher; is raised in the first training step.
            other_teachers: further ones, each with its own losses.
            pseudo_labels: how the first teacher labels images that are marked as unlabelled; None: it does not, and on
                them only distillation losses act.

        Raises:
            ValueError: a tap that does not exist, a loss that the networks cannot serve, losses without a teacher,
                two losses of one name, images that the teacher cannot read, or a teacher that cannot label images.
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
        groups = [OtherTeacher("", teacher, losses, teacher_dtype), *other_teachers]
        for group in groups:
            for loss in group.losses:
                loss.teacher_name = group.name
                if loss.label in self.losses:
                    raise ValueError(f"Two losses are named {loss.label!r}; give one of their classes another name.")
                self.losses[loss.label] = loss
        self.input_format = input_format or getattr(student, "input_format", None)
        self.missing_teacher = missing_teacher
        self._teachers: Dict[str, Teacher | AveragedTeacher] = {}  # by the name that their losses know
        self._region_taps: Optional[RegionTaps] = None
        self._pseudo_labels = pseudo_labels
        labels = pseudo_labels is not None and pseudo_labels.from_teacher and self._wants_labels
        if not self.losses and not labels:
            return

        if self.input_format is None:
            raise ValueError("Unknown channel order of the student's images: give input_format, e.g. 'BGR'.")
        every_loss = self.losses.values()
        labelling = groups[:1] if labels and teacher is not None else []
        groups = [group for group in groups if group.losses or group in labelling]
        if labels and not groups:
            raise ValueError(
                "Unlabelled images need a teacher that labels them: set KD.TEACHER.CONFIG_FILE, or "
                "KD.UNLABELLED.RESULTS to a file of a detector's results."
            )
        for group in groups:
            self._connect(group)
        self._student_taps = Taps(student, [t for loss in every_loss for t in loss.student_taps], side="student")
        for group in groups:
            self._teachers[group.name] = self._run(group)
        if labels:
            if type(self.teacher).forward is FeatureTeacher.forward:
                raise ValueError(
                    "The teacher gives feature maps and no detections, so it cannot label unlabelled images: set "
                    "KD.UNLABELLED.RESULTS to a file of a detector's results, or KD.UNLABELLED.WEIGHT 0.0 with losses "
                    "that need no ground truth."
                )
            pseudo_labels.connect(student, self.teacher)
        if any(loss.needs_regions or loss.needs_proposals or loss.branch for loss in every_loss):
            roi_heads = getattr(student, "roi_heads", None)
            names = sorted({loss.branch for loss in every_loss if loss.branch})
            branches = [RegionBranch(roi_heads, name, side="student") for name in names]
            self._region_taps = RegionTaps(RegionHead(roi_heads, side="student"), branches)
        # The student outlives the Distiller; the teacher must not live on in a hook of it.
        handles = [handle for teacher in self._teachers.values() for handle in teacher.handles]
        weakref.finalize(self, _remove, [*self._student_taps.handles, *handles])
        self._is_described = False

    def _connect(self, group: OtherTeacher) -> None:
        """Fit losses to the student and their teacher; some choose their taps by that."""
        losses, teacher = group.losses, group.teacher
        networks = teacher.models if isinstance(teacher, TeacherAverage) else [teacher]
        if None in networks:
            raise ValueError(f"The losses {[loss.label for loss in losses]} need a teacher, and none was given.")
        for network in networks:
            check_teacher(network, self.input_format)  # before the losses look for its taps
        with preserved_random_state():  # connectors must not shift what training draws
            for loss in losses:
                check_teaching(loss, networks)
                loss.connect(self.student, networks[0])
                loss.to(self.device)

    def _run(self, group: OtherTeacher) -> "Teacher | AveragedTeacher":
        return run_teacher(
            group.teacher,
            [t for loss in group.losses for t in loss.teacher_taps],
            input_format=self.input_format,
            student=self.student,
            with_head=any(loss.needs_regions or loss.branch for loss in group.losses),
            dtype=group.dtype,
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: Optional[nn.Module] = None, teacher: Optional[nn.Module] = None
    ) -> Dict:
        """``student`` and ``teacher``: the config's, where they are built already."""
        check_kd_config(cfg.KD)
        ret = {"student": student or build_student(cfg), "input_format": cfg.INPUT.FORMAT}
        try:
            return {**ret, **build_teachers_and_losses(cfg, ret["student"], teacher)}
        except FileNotFoundError as e:
            # A detector is also built from its training's config where it only infers.
            logger.warning(f"Without its teacher this model infers, and will not train: {e}")
            return {**ret, "missing_teacher": e}

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def teachers(self) -> List[nn.Module]:
        """The frozen teachers, which are not submodules."""
        return [network for teacher in self._teachers.values() for network in teacher.networks]

    @property
    def teacher(self) -> Optional[nn.Module]:
        """The first of the teachers; None without losses."""
        return next(iter(self.teachers), None)

    def teacher_of(self, loss: DistillationLoss) -> nn.Module:
        """The teacher of a loss; of several that are averaged, the first."""
        return self._teachers[loss.teacher_name].networks[0]

    @property
    def _wants_labels(self) -> bool:
        """Whether pseudo-labels are read: losses on regions do, whose student samples its regions by them."""
        losses = self.losses.values()
        reads = any(loss.needs_labels or loss.needs_regions or loss.branch for loss in losses)
        return self._pseudo_labels.weight > 0 or reads

    def train(self, mode: bool = True):
        super().train(mode)
        self.student.train(mode)  # the student's own flag, and whatever its class does in train()
        return self

    def forward(self, batched_inputs: List[Dict]):
        """
        In training, a dict of scalars: the student's losses and the distillation losses; a ``FileNotFoundError`` if the
        config's teacher was not found. In eval, what the student returns.

        Images with a true "unlabelled" pass the student in a second forward. A distillation loss is then the mean over
        all images; the student's own losses on pseudo-labels, times their weight, are ``loss_..._pseudo``. All ranks
        must have such images in the same steps.
        """
        if not self.training:
            return self.student(batched_inputs)
        if self.missing_teacher is not None:
            raise self.missing_teacher
        labelled, unlabelled = split_unlabelled(batched_inputs)
        factors = self.factors()
        active = [loss for name, loss in self.losses.items() if factors[name]]
        pseudo_weight = self._pseudo_labels.weight if self._pseudo_labels is not None else 0.0
        if not active and not (unlabelled and pseudo_weight):
            losses = self.student(labelled)
            return {**losses, **{loss.key: self._zero(loss) for loss in self.losses.values()}}

        names = {loss.teacher_name for loss in active}
        if unlabelled and self._pseudo_labels is not None and self._pseudo_labels.from_teacher:
            names.update(list(self._teachers)[:1])  # the one that labels
        for name, teacher in self._teachers.items():
            if name in names:
                teacher.follow(self.student)
        losses, values = self._compare(self._prepare(labelled, active), active)
        if unlabelled:
            unlabelled, taught = self._label(self._prepare(unlabelled, active))
            pseudo, others = self._compare(unlabelled, active, taught)
            share = len(unlabelled) / len(batched_inputs)
            values = {loss: (1 - share) * value + share * others[loss] for loss, value in values.items()}
            if pseudo_weight:
                losses.update({f"{key}_pseudo": pseudo_weight * value for key, value in pseudo.items()})
        if any(loss.auto is not None and loss.auto.is_measuring for loss in active):
            measure_auto_weights(sum(losses.values()), values, self.student)
            factors = self.factors()
        for name, loss in self.losses.items():
            if loss.key in losses:
                raise ValueError(f"The student already has a loss {loss.key!r}; name the distillation loss otherwise.")
            if loss not in values:
                losses[loss.key] = self._zero(loss)
                continue
            losses[loss.key] = values[loss] if factors[name] == 1 else factors[name] * values[loss]
        return losses

    def _prepare(self, batched_inputs: List[Dict], active: Sequence[DistillationLoss]) -> List[Dict]:
        """The inputs as all networks take them, copied to the device once."""
        batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
        for loss in active:
            batched_inputs = loss.prepare(batched_inputs, self.device)
        return batched_inputs

    def _label(self, batched_inputs: List[Dict]) -> tuple[List[Dict], Dict[str, TeacherMaps]]:
        """Unlabelled images with pseudo-labels, where they are wanted, and what the teacher that made them computed."""
        if self._pseudo_labels is None or not self._wants_labels or all("instances" in x for x in batched_inputs):
            return batched_inputs, {}
        if not self._pseudo_labels.from_teacher:
            raise ValueError("An unlabelled image has no 'instances', and pseudo-labels are not the teacher's.")
        name, teacher = next(iter(self._teachers.items()))
        images = padded_images(self.student, batched_inputs)  # the canvas on which the student will see them
        maps = teacher(without_sizes(batched_inputs), self.device, images, detects=True)
        return self._pseudo_labels(batched_inputs, maps.detections), {name: maps}

    def _compare(
        self,
        batched_inputs: List[Dict],
        active: Sequence[DistillationLoss],
        taught: Optional[Dict[str, TeacherMaps]] = None,
    ) -> tuple[Dict[str, Tensor], Dict[DistillationLoss, Tensor]]:
        """
        The student's own losses and, without weights, the active distillation losses of a batch. ``taught``: by
        teacher, what was computed for it already.
        """
        taught = dict(taught or {})
        names = {loss.teacher_name for loss in active}
        teachers = {name: t for name, t in self._teachers.items() if name in names and name not in taught}
        regions = self._region_taps
        with contextlib.ExitStack() as contexts:
            for teacher in teachers.values():
                contexts.enter_context(teacher.running(batched_inputs))
            if active:
                contexts.enter_context(self._student_taps.recording())
                if regions is not None:
                    contexts.enter_context(regions.recording())
            are_unlabelled = any(x.get(UNLABELLED) for x in batched_inputs)
            losses = self.student(without_labels(batched_inputs) if are_unlabelled else batched_inputs)
        if not active:
            return losses, {}
        features = self._student_taps.pop()
        branch_regions = regions.branch_regions() if regions is not None else {}
        sampled = regions.pop() if regions is not None else None
        taught.update({name: teacher.pop() for name, teacher in teachers.items()})
        self._describe(features, {name: maps.features for name, maps in taught.items()})
        steps = {
            name: StepContext(
                image_sizes(batched_inputs),
                maps.canvas,
                batched_inputs=batched_inputs,
                task_losses=dict(losses),
                teacher=self._teachers[name],
                teacher_outputs=maps.outputs,
                student_head=regions.head if regions is not None else None,
                branch_regions=branch_regions,
                sampled=sampled,
            )
            for name, maps in taught.items()
        }
        for name, step in steps.items():
            if any(loss.needs_regions and loss.teacher_name == name for loss in active):
                step.region_pairs()  # for all losses, before the first
        values = {}
        for loss in active:
            theirs = _at(taught[loss.teacher_name].features, loss.teacher_taps)
            values[loss] = loss(_at(features, loss.student_taps), theirs, steps[loss.teacher_name])
        return losses, values

    @torch.no_grad()
    def calibrate(self, batches: Iterable[List[Dict]]) -> None:
        """
        Show the teacher's responses to these batched inputs to the losses that measure something (OFD's margins), which
        they otherwise do in training, on the first batches. In a distributed run every rank gives as many batches; all
        get the same result.
        """
        for batched_inputs in batches:
            for name, teacher in self._teachers.items():
                teacher.follow(self.student)
                maps = teacher(batched_inputs, self.device)
                context = StepContext(image_sizes(batched_inputs), maps.canvas, batched_inputs=batched_inputs)
                for loss in (loss for loss in self.losses.values() if loss.teacher_name == name):
                    loss.observe(_at(maps.features, loss.teacher_taps), context)

    def factors(self) -> Dict[str, float]:
        """What each loss is multiplied by in this iteration; 0 where it is off."""
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

    def _describe(self, features: Dict[str, List[Tensor]], taught: Dict[str, Dict[str, List[Tensor]]]) -> None:
        """Log once what is distilled, with the sizes of the first step's maps, and warn of frozen taps."""
        if self._is_described:
            return
        self._is_described = True
        logger.info(f"Distillation:\n{distillation_summary(self.losses.values(), features, taught)}")
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
        ret._metadata.update(distillation_state(self.losses, self._teachers))
        return ret

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """Load a student's state dict and, where its metadata holds them for their teachers, what the losses own."""
        load_distillation_state(getattr(state_dict, "_metadata", {}), self.losses, self._teachers)
        return self.student.load_state_dict(state_dict, strict, **kwargs)


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()


def image_sizes(batched_inputs: List[Dict]) -> List[tuple[int, int]]:
    return [tuple(x["image"].shape[-2:]) for x in batched_inputs]


def _at(features: Dict[str, List[Tensor]], taps: Sequence[str]) -> List[Tensor]:
    return [value for tap in taps for value in features[tap]]
