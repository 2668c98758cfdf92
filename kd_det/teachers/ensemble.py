"""
Several teachers of one student: averaged, or each with losses of its own.

Averages are weighted means: of maps at taps, of pooled features, box deltas and class logits of the shared regions. The
mean of logits is the geometric mean of the teachers' distributions (Hinton et al., arXiv 1503.02531, name it beside the
arithmetic one): it is the same at every temperature, and holds for sigmoids as for softmaxes.
"""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes
from torch import Tensor, nn

from kd_det.config import add_kd_config, check_kd_config
from kd_det.config_file import merge_options
from kd_det.errors import unknown_name
from kd_det.features.regions import RegionHead, RegionOutputs
from kd_det.features.taps import tap_shape
from kd_det.teachers.ema import EMATeacher
from kd_det.teachers.runner import Teacher, TeacherMaps

__all__ = ["AveragedTeacher", "OtherTeacher", "PlannedTeacher", "TeacherAverage", "planned_teachers", "run_teacher"]


@dataclass
class TeacherAverage:
    """Several networks as one teacher: ``Distiller(teacher=TeacherAverage([a, b]))``. Weights: by default equal."""

    models: Sequence[nn.Module]
    weights: Sequence[float] = ()
    dtypes: Sequence[torch.dtype] = ()  # of each; by default the Distiller's teacher_dtype

    def __post_init__(self):
        self.models, count = list(self.models), len(self.models)
        self.weights = list(self.weights or [1.0] * count)
        if not count or len(self.weights) != count or len(self.dtypes) not in (0, count):
            raise ValueError(f"An average of {count} teachers needs as many weights, found {self.weights}.")
        if not all(isinstance(w, (int, float)) and 0 < w < float("inf") for w in self.weights):
            raise ValueError(f"Weights of averaged teachers must be positive numbers, found {self.weights}.")
        if any(hasattr(model, "ema_decay") for model in self.models):
            raise ValueError("The student's own average teaches by losses of its own: give it a NAME and LOSSES.")


@dataclass
class OtherTeacher:
    """A further teacher, with its own losses, which are logged as ``loss_<loss>_<name>``."""

    name: str
    teacher: nn.Module | TeacherAverage
    losses: Sequence[nn.Module]  # each a kd_det.losses.DistillationLoss
    dtype: torch.dtype = torch.float32


class PlannedTeacher(NamedTuple):
    name: str  # "" for those that are averaged
    weight: float  # in the average
    cfg: CfgNode  # with this one as KD.TEACHER, and its losses as KD.LOSSES


def planned_teachers(cfg: CfgNode) -> List[PlannedTeacher]:
    """
    ``KD.TEACHER``, where it is set or alone, and the entries of ``KD.TEACHERS``, each with a config as if it were the
    only one.

    Raises:
        ValueError: an entry that is none, has an unknown key, a value of another type, or a name that does not do.
    """
    plans = [_plan(cfg, entry, f"KD.TEACHERS[{i}]") for i, entry in enumerate(cfg.KD.TEACHERS)]
    names = [plan.name for plan in plans if plan.name]
    if len(set(names)) < len(names):
        raise ValueError(f"KD.TEACHERS: two entries have one NAME, found {names}.")
    if cfg.KD.TEACHER.CONFIG_FILE or all(plan.name for plan in plans):
        plans.insert(0, PlannedTeacher("", 1.0, cfg))
    return plans


def _plan(cfg: CfgNode, entry: dict, where: str) -> PlannedTeacher:
    fresh = get_cfg()
    add_kd_config(fresh)
    own_keys = ("NAME", "WEIGHT", "LOSSES", "LOSS_OPTS")
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must have keys, such as CONFIG_FILE and WEIGHTS, found {entry!r}.")
    for key in entry:
        if key not in own_keys and key not in fresh.KD.TEACHER:
            raise ValueError(unknown_name(f"key of {where}", key, [*fresh.KD.TEACHER, *own_keys]))
    name, losses = entry.get("NAME", ""), entry.get("LOSSES", ())
    if bool(losses) != bool(name) or not (isinstance(name, str) and re.fullmatch(r"\w*", name)):
        raise ValueError(
            f"{where}: a teacher with LOSSES of its own needs a NAME of letters, digits and underscores, and one "
            f"without LOSSES is averaged and has none; found NAME {name!r} and LOSSES {losses!r}."
        )
    unused = [key for key in (("WEIGHT",) if losses else ("LOSS_OPTS",)) if key in entry]
    if unused:
        raise ValueError(f"{where}.WEIGHT is of an average, LOSS_OPTS of LOSSES; {unused[0]} would not be used here.")
    own = cfg.clone()
    own.defrost()
    own.KD.TEACHERS, own.KD.TEACHER = [], fresh.KD.TEACHER
    options = [x for key in entry if key not in own_keys for x in (f"KD.TEACHER.{key}", entry[key])]
    if losses:
        own.KD.LOSSES, own.KD.INHERIT = (), ()
        options += ["KD.LOSSES", losses]
    merge_options(own, options, where=where)
    loss_opts = list(entry.get("LOSS_OPTS", ()))
    if not all(str(key).startswith("KD.") for key in loss_opts[::2]):
        raise ValueError(f"{where}.LOSS_OPTS holds keys of losses with their values, such as KD.NST.WEIGHT, 5.0.")
    merge_options(own, loss_opts, where=f"{where}.LOSS_OPTS")
    check_kd_config(own.KD, f"{where}: KD")
    return PlannedTeacher(name, entry.get("WEIGHT", 1.0), own)


def run_teacher(
    teacher: nn.Module | TeacherAverage, taps: Sequence[str], *, dtype: torch.dtype, **options
) -> "Teacher | AveragedTeacher":
    """What runs a teacher on the student's batches; for arguments see :class:`Teacher`."""
    if isinstance(teacher, TeacherAverage):
        dtypes = teacher.dtypes or [dtype] * len(teacher.models)
        members = [Teacher(m, taps, dtype=d, **options) for m, d in zip(teacher.models, dtypes)]
        return AveragedTeacher(members, teacher.weights)
    cls = EMATeacher if hasattr(teacher, "ema_decay") else Teacher
    return cls(teacher, taps, dtype=dtype, **options)


class AveragedTeacher:
    """Several teachers behind the interface of :class:`Teacher`; what they compute is averaged."""

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]):
        """
        Raises:
            ValueError: networks that differ in channels or stride at a tap, in classes, stages or kind of regression.
        """
        self.members = list(members)
        self.weights = [weight / sum(weights) for weight in weights]
        self.networks = [network for member in members for network in member.networks]
        _check_alike(self.networks, members[0].taps.names)
        self.head = AveragedHead([m.head for m in members], self.weights) if members[0].head is not None else None
        self.handles = [handle for member in members for handle in member.handles]
        identity = [(member.fingerprint, weight) for member, weight in zip(members, self.weights)]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    def __deepcopy__(self, memo):
        return self

    @property
    def model(self) -> nn.Module:
        raise ValueError(
            "A loss reads the teacher's network itself, and several are averaged: give it a teacher of its own, by "
            "NAME and LOSSES in an entry of KD.TEACHERS."
        )

    @contextlib.contextmanager
    def running(self, batched_inputs: List[Dict]):
        """See :meth:`Teacher.running`."""
        with contextlib.ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.running(batched_inputs))
            yield

    def pop(self) -> TeacherMaps:
        return self._mean([member.pop() for member in self.members])

    def __call__(
        self,
        batched_inputs: List[Dict],
        device: torch.device,
        images: Optional[Tensor] = None,
        *,
        detects: bool = False,
    ) -> TeacherMaps:
        """See :meth:`Teacher.__call__`; the detections are the first teacher's."""
        taught = [m(batched_inputs, device, images, detects=detects and not i) for i, m in enumerate(self.members)]
        return self._mean(taught)

    def follow(self, student: nn.Module) -> None:
        """See :meth:`Teacher.follow`."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """See :meth:`Teacher.load_state_dict`."""

    def _mean(self, taught: List[TeacherMaps]) -> TeacherMaps:
        """The mean maps; the outputs are those of every backbone, as :class:`AveragedHead` reads them."""
        features = {
            name: [_mean(calls, self.weights, name) for calls in zip(*(t.features[name] for t in taught), strict=True)]
            for name in taught[0].features
        }
        return TeacherMaps(features, [t.outputs for t in taught], taught[0].canvas, taught[0].detections)


class AveragedHead(RegionHead):
    """The mean of what several box heads predict, each from the outputs of its own backbone; the first one's units."""

    def __init__(self, heads: Sequence[RegionHead], weights: Sequence[float]):
        super().__init__(heads[0].roi_heads, side="teacher")
        found = [(head.num_classes, head.num_stages, head.is_class_agnostic) for head in heads]
        if len(set(found)) > 1:
            raise ValueError(
                f"Averaged teachers must agree in their classes, the stages of their box heads, and whether boxes are "
                f"class-agnostic; found {found}. Give one of them losses of its own (NAME and LOSSES in KD.TEACHERS)."
            )
        self._members, self._mean_weights = list(heads), list(weights)

    def __call__(self, features: List[Dict[str, Tensor]], boxes: List[Boxes], stage: int) -> RegionOutputs:
        found = [head(outputs, boxes, stage) for head, outputs in zip(self._members, features)]
        for head, outputs in zip(self._members, found):
            factors = [own / w for own, w in zip(self.delta_weights(stage), head.delta_weights(stage))]
            if set(factors) != {1.0}:  # RegionOutputs are new ones, read by nobody else
                scaled = [deltas * f for deltas, f in zip(outputs.deltas.unflatten(1, (-1, 4)).unbind(2), factors)]
                outputs.deltas = torch.stack(scaled, dim=2).flatten(1)
        fields = ("features", "logits", "deltas")
        return RegionOutputs(*(_mean([getattr(o, f) for o in found], self._mean_weights, f) for f in fields))


def _mean(values: Sequence[Tensor], weights: Sequence[float], what: str) -> Tensor:
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) > 1:
        raise ValueError(f"Averaged teachers must agree in shape; {what!r} is {' and '.join(map(str, shapes))}.")
    return sum(weight * value for weight, value in zip(weights, values))


def _check_alike(networks: Sequence[nn.Module], taps: Sequence[str]) -> None:
    for tap in taps:
        found = [_shape(network, tap) for network in networks]
        if len(set(found)) > 1:
            raise ValueError(
                f"Averaged teachers must agree at {tap!r}: they have (channels, stride) {found}. Give one of them "
                f"losses of its own (NAME and LOSSES in KD.TEACHERS), or name another tap."
            )


def _shape(network: nn.Module, tap: str) -> Tuple[Optional[int], Optional[int]]:
    try:
        shape = tap_shape(network, tap, side="teacher")
    except ValueError:  # a module that declares no channels
        return None, None
    return shape.channels, shape.stride
