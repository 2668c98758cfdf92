from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from kd_det.config import SCHEDULE_KEYS
from kd_det.errors import IMPORT_HINT, unknown_name
from kd_det.features.taps import tap_shape
from kd_det.losses.auto_weight import AutoWeight
from kd_det.losses.schedule import Schedule

__all__ = ["DISTILLATION_LOSS_REGISTRY", "NO_IMAGES", "DistillationLoss", "build_losses", "loss_class", "tap_channels"]

DISTILLATION_LOSS_REGISTRY = Registry("DISTILLATION_LOSS")
DISTILLATION_LOSS_REGISTRY.__doc__ = """
Registry of distillation losses: subclasses of :class:`DistillationLoss`.

A registered class is built by ``cls(cfg, student, teacher)``: its ``from_config(cls, cfg, student, teacher)`` sees
both models (to read channels, class counts, norm layers) and returns the arguments of ``__init__``, which sees none.
It is called by ``loss(student, teacher, context)``, see :meth:`DistillationLoss.forward`.
"""


# An empty batch: a loss function called with it only checks its options.
NO_IMAGES = torch.empty(0, 1, 1, 1)


class DistillationLoss(nn.Module):
    """
    Base class: where a loss reads, how much it weighs, when it acts. A subclass sets ``name``, implements
    :meth:`forward`, owns whatever it trains (connectors) or remembers (margins), and is decorated with
    ``@DISTILLATION_LOSS_REGISTRY.register()``.

    Attributes:
        name: the loss is logged as ``loss_<name>`` and configured by ``KD.<NAME>``.
        needs_taps: whether it compares maps at taps, and so needs at least one. A loss on regions needs none.
        needs_regions: whether it reads ``context.region_pairs()``; both networks must then have ROI heads.
        needs_proposals: whether it reads the student's sampled regions alone, ``context.sampled``; the student must
            then have ROI heads.
        branch: "mask" or "keypoint" if it reads ``context.branch_pair(branch)``; both networks must then have the head.
        compares_classes: whether it compares class by class; both networks must then have the same classes.
        needs_labels: whether it reads the labels or the ground truth of the batch; on a detector's unlabelled images
            these are pseudo-labels.
        needs_one_teacher: whether it reads the teacher's network itself, not only its maps and its predictions for
            regions; it cannot be taught by an average of several then.
        teacher_name: of a further teacher (the loss is logged as ``loss_<name>_<teacher_name>``); set by the Distiller.
    """

    name: str
    needs_taps = True
    needs_regions = False
    needs_proposals = False
    branch: Optional[str] = None
    compares_classes = False
    needs_labels = False
    needs_one_teacher = False
    teacher_name = ""

    def __init__(
        self,
        *,
        student_taps: Sequence[str] = (),
        teacher_taps: Optional[Sequence[str]] = None,
        weight: float = 1.0,
        warmup_iters: int = 0,
        stop_iter: int = -1,
        decay: str = "",
        decay_start: int = 0,
        auto_weight: float = 0.0,
        auto_weight_batches: int = 20,
    ):
        """
        Args:
            student_taps: places read in the student.
            teacher_taps: places read in the teacher, paired in order. None or empty: the student's names.
            weight: the factor of this loss in the total, not negative.
            warmup_iters, stop_iter, decay, decay_start: see :class:`kd_det.losses.schedule.Schedule`.
            auto_weight: > 0: the weight sets itself so that the loss' gradient is this part of the task's;
                ``weight`` then only tells whether the loss is on.
            auto_weight_batches: the training batches on which it does, see
                :func:`kd_det.losses.auto_weight.measure_auto_weights`.

        Raises:
            ValueError: numbers of taps that differ, or a weight or iteration out of range, or an unknown decay.
        """
        super().__init__()
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps or student_taps)
        if not all(isinstance(tap, str) for tap in self.student_taps + self.teacher_taps):
            raise ValueError(
                f"{type(self).__name__}: taps are names of places, found {self.student_taps} and {self.teacher_taps}."
            )
        if len(self.student_taps) != len(self.teacher_taps):
            raise ValueError(
                f"{type(self).__name__}: {len(self.student_taps)} student taps {self.student_taps} are paired with "
                f"{len(self.teacher_taps)} teacher taps {self.teacher_taps}; the numbers must be equal."
            )
        if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"{type(self).__name__}: weight must be a finite number >= 0, found {weight}.")
        self.weight = weight
        try:
            self.schedule = Schedule(warmup_iters, stop_iter, decay, decay_start)
            self.auto = AutoWeight(auto_weight, auto_weight_batches) if auto_weight else None
        except ValueError as e:
            raise ValueError(f"{type(self).__name__}, keys of KD.{self.name.upper()} or of KD: {e}") from None

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> Dict:
        """The arguments that every loss has, from ``KD.<NAME>``. Subclasses add theirs."""
        node = cfg.KD[cls.name.upper()]
        schedule = {key.lower(): cfg.KD[key] if node[key] is None else node[key] for key in SCHEDULE_KEYS}
        if schedule["decay"] and schedule["stop_iter"] == -1:
            schedule["stop_iter"] = cfg.SOLVER.MAX_ITER
        return {
            "student_taps": node.STUDENT_TAPS,
            "teacher_taps": node.TEACHER_TAPS,
            "weight": node.WEIGHT,
            **schedule,
            "auto_weight": cfg.KD.AUTO_WEIGHT if node.AUTO_WEIGHT is None else node.AUTO_WEIGHT,
            "auto_weight_batches": cfg.KD.AUTO_WEIGHT_BATCHES,
        }

    @property
    def label(self) -> str:
        """Its name among the losses of a Distiller."""
        return f"{self.name}_{self.teacher_name}" if self.teacher_name else self.name

    @property
    def key(self) -> str:
        return f"loss_{self.label}"

    def config_key(self, key: str) -> str:
        """What messages call one of its config keys, for a further teacher's loss with the place where it stands."""
        where = f" (in LOSS_OPTS of the teacher {self.teacher_name!r} in KD.TEACHERS)" if self.teacher_name else ""
        return f"KD.{self.name.upper()}.{key}{where}"

    def factor(self, iteration: int) -> float:
        """The factor of this loss in the total at an iteration."""
        return self.weight * self.schedule.factor(iteration)

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """
        Called once by the Distiller, with both networks: builds what depends on them and was not given to
        ``__init__`` (connectors), and refuses networks that the loss cannot work with. Subclasses extend it.

        Raises:
            ValueError: the loss needs taps and has none, or taps on regions.
        """
        if self.needs_taps and not self.needs_regions and not self.branch and not self.student_taps:
            raise ValueError(
                f"{type(self).__name__} compares maps and has no taps: name at least one place in "
                f"{self.config_key('STUDENT_TAPS')}, such as 'p3'."
            )
        per_region = [
            tap for tap in dict.fromkeys(self.student_taps + self.teacher_taps) if tap.startswith("roi_heads.")
        ]
        if per_region:
            raise ValueError(
                f"{type(self).__name__}: each network runs {', '.join(per_region)} on regions of its own, which do not "
                f"correspond. Losses that read no taps, such as SoftTarget, compare both networks on the same regions."
            )

    def prepare(self, batched_inputs: List[Dict], device: torch.device) -> List[Dict]:
        """The student's inputs of a step in which the loss acts, before the student sees them."""
        return batched_inputs

    def observe(self, teacher: List[Tensor], context) -> None:
        """Take in the teacher's maps of a batch without training; see :meth:`kd_det.Distiller.calibrate`."""

    def upgrade_state(self, state: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """A state dict of this loss that an older version saved, with the entries of this version."""
        return state

    def pairs(
        self, student: List[Tensor], teacher: List[Tensor], context
    ) -> List[Tuple[Tensor, Tensor, Optional[Tensor]]]:
        """
        The maps to compare with the mask of their valid positions at the student's size (None: all).

        Raises:
            ValueError: the networks ran the tapped modules different numbers of times (other numbers of levels).
        """
        if len(student) != len(teacher):
            raise ValueError(
                f"{type(self).__name__}: the student taps {self.student_taps} gave {len(student)} maps and the teacher "
                f"taps {self.teacher_taps} gave {len(teacher)}; the networks' numbers of levels differ."
            )
        return [(s, t, context.valid(s) if s.dim() == 4 else None) for s, t in zip(student, teacher)]

    def forward(self, student: List[Tensor], teacher: List[Tensor], context) -> Tensor:
        """
        Args:
            student: the maps at ``student_taps``, in order, each (N, Cs, Hs, Ws), with their graph. A tap on a module
                that runs several times an image gives one map a call.
            teacher: the maps at ``teacher_taps``, each (N, Ct, Ht, Wt), without a graph.
            context (kd_det.features.context.StepContext): which positions hold image, the ground truth, and the
                sampled regions.

        Returns:
            A scalar, without the factor ``weight``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(student, teacher, context)")


def tap_channels(loss: DistillationLoss, student: nn.Module, teacher: nn.Module) -> Tuple[List[int], List[int]]:
    """The student's and the teacher's channels at a loss' taps."""
    return (
        [tap_shape(student, tap, side="student").channels for tap in loss.student_taps],
        [tap_shape(teacher, tap, side="teacher").channels for tap in loss.teacher_taps],
    )


# What papers and docs/measured.md call a loss whose class has another name.
ABBREVIATIONS = {"ofd": "Overhaul", "sp": "Similarity", "fitnets": "Hint", "kd": "SoftTarget"}


def loss_class(name: str):
    """
    The registered class of a loss, by class name ("NSTLoss") or without its ending ("NST").

    Raises:
        ValueError: no such loss; names the registered ones.
    """
    registered = dict(iter(DISTILLATION_LOSS_REGISTRY))
    for candidate in (name, f"{name}Loss"):
        if candidate in registered:
            return registered[candidate]
    short = sorted(name.removesuffix("Loss") for name in registered)
    known_as = {loss.name: key.removesuffix("Loss") for key, loss in registered.items()} | ABBREVIATIONS
    if (alias := str(name).lower()) in known_as:
        raise ValueError(f"Unknown distillation loss {name!r}: its name here is {known_as[alias]!r}.")
    raise ValueError(f"{unknown_name('distillation loss', name, short, most=len(short))} {IMPORT_HINT}")


def build_losses(cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> List[DistillationLoss]:
    """
    The losses of ``KD.LOSSES`` whose weight is not 0.

    Raises:
        ValueError: see :func:`enabled_loss_classes`; or a config key of a loss that its ``from_config`` does not read.
    """
    return [_build_loss(cls, cfg, student, teacher) for cls in enabled_loss_classes(cfg)]


def _build_loss(cls: type, cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> "DistillationLoss":
    name = cls.name.upper()
    node = _WatchedNode(cfg.KD[name])
    watched = cfg.clone()
    dict.__setitem__(watched.KD, name, node)
    loss = cls(watched, student, teacher)
    unread = sorted(set(cfg.KD[name]) - node.read)
    if unread:
        raise ValueError(
            f"{cls.__name__} does not read {', '.join(f'KD.{name}.{key}' for key in unread)}, so the value would be "
            f"ignored: its from_config(cls, cfg, student, teacher) must hand it to __init__."
        )
    return loss


class _Names(set):
    def __deepcopy__(self, memo):
        return self  # reading a clone of the config is reading


class _WatchedNode(CfgNode):
    """A node that remembers which of its keys were read; iterating reads them all."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__["read"] = _Names()

    def __getitem__(self, key: str):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default=None):
        return self[key] if key in self else default

    def __iter__(self):
        self.read.update(self.keys())
        return super().__iter__()

    def items(self):
        return [(key, self[key]) for key in self.keys()]


def enabled_loss_classes(cfg: CfgNode) -> List[type]:
    """
    The classes that ``KD.LOSSES`` names and whose ``KD.<NAME>.WEIGHT`` is not 0.

    Raises:
        ValueError: an unknown or repeated name, or a loss without its config node.
    """
    classes = [loss_class(name) for name in cfg.KD.LOSSES]
    for cls in classes:
        if classes.count(cls) > 1:
            raise ValueError(f"KD.LOSSES names {cls.__name__} more than once: {tuple(cfg.KD.LOSSES)}.")
        if cls.name.upper() not in cfg.KD:
            raise ValueError(
                f"{cls.__name__} is configured by KD.{cls.name.upper()}, which the config lacks: "
                f"call the loss' add_..._config(cfg) after add_kd_config(cfg)."
            )
    return [cls for cls in classes if cfg.KD[cls.name.upper()].WEIGHT != 0]
