"""The meta-architecture that trains a student on its own and distillation losses, and in eval is the student."""

import contextlib
import functools
import logging
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.compat import has_event_storage
from kd_det.config import check_kd_config
from kd_det.features.context import StepContext
from kd_det.features.regions import RegionHead, RegionTaps
from kd_det.features.taps import Taps
from kd_det.losses.build import DistillationLoss, build_losses, enabled_loss_classes
from kd_det.random_state import preserved_random_state
from kd_det.student import build_student
from kd_det.teachers.build import build_teacher
from kd_det.teachers.runner import Teacher, pixel_gradients, with_pixel_gradients
from kd_det.weights.inherit import inherit_weights

__all__ = ["Distiller"]

logger = logging.getLogger(__name__)

# Where a checkpoint keeps what the losses own: beside the weights, in the metadata that torch attaches to a state dict.
_STATE_KEY = "kd_det.losses"


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """
    A student detector, untouched, that is also taught.

    In training, ``forward`` returns the student's own loss dict with one more key per distillation loss
    (``loss_nst``, ...), already multiplied by its weight and schedule. In eval it is the student's forward.
    ``state_dict`` is exactly the student's: a checkpoint of a Distiller is a checkpoint of the plain student. What the
    losses train or remember travels in the metadata of that state dict, which plain models ignore.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Optional[nn.Module] = None,
        losses: Sequence[DistillationLoss] = (),
        input_format: Optional[str] = None,
        calibration_batches: Optional[Callable[[int], Iterable[List[Dict]]]] = None,
    ):
        """
        Args:
            student: a detector of any meta-architecture with a ``backbone``.
            teacher: a trained detector with ``backbone``, ``preprocess_image`` and ``input_format``, such as
                :func:`kd_det.build_teacher` returns. It is frozen and kept outside the module tree. None only
                without losses.
            losses: what is distilled; without any, training is the plain student's, bit for bit.
            input_format: channel order of the images in the batches; default: the student's ``input_format``.
            calibration_batches: called with a number of images before the first step, if a loss wants to observe the
                teacher on some (calibrated margins); gives this rank's share of them. Default: the first batch.

        Raises:
            ValueError: a tap that does not exist, a loss that the networks cannot serve, losses without a teacher,
                or two losses of one name.
        """
        super().__init__()
        self.student = student
        self.losses = nn.ModuleDict()
        for loss in losses:
            if loss.name in self.losses:
                raise ValueError(f"Two losses are named {loss.name!r}; give one of their classes another name.")
            self.losses[loss.name] = loss
        self.input_format = input_format or getattr(student, "input_format", None)
        self._calibration_batches = calibration_batches
        self._teacher: Optional[Teacher] = None
        self._region_taps: Optional[RegionTaps] = None
        self._teacher_head: Optional[RegionHead] = None
        if not self.losses:
            return

        if teacher is None:
            raise ValueError(f"The losses {list(self.losses)} need a teacher, and none was given.")
        for network, which in ((self, "the images'"), (teacher, "the teacher's")):
            if network.input_format is None:
                raise ValueError(f"Unknown {which} channel order: give input_format, e.g. 'BGR'.")
        needs_regions = any(loss.needs_regions for loss in losses)
        self._student_taps = Taps(student, [t for loss in losses for t in loss.student_taps], side="student")
        self._teacher = Teacher(
            teacher, [t for loss in losses for t in loss.teacher_taps], whole_backbone=needs_regions
        )
        if needs_regions:
            self._region_taps = RegionTaps(RegionHead(getattr(student, "roi_heads", None), side="student"))
            self._teacher_head = RegionHead(getattr(teacher, "roi_heads", None), side="teacher")
        for loss in losses:
            if loss.needs_input_gradients:
                _check_task_losses(loss, student=student, teacher=teacher)
        self._warned_of_frozen_taps = False

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: Optional[nn.Module] = None, teacher: Optional[nn.Module] = None
    ) -> Dict:
        """``student`` and ``teacher``: the config's, where they are built already."""
        check_kd_config(cfg.KD)
        student = student or build_student(cfg)
        ret = {"student": student, "input_format": cfg.INPUT.FORMAT}
        if enabled_loss_classes(cfg) or cfg.KD.INHERIT:
            # What distillation draws at random must not shift what training draws after it.
            with preserved_random_state():
                ret["teacher"] = teacher or build_teacher(cfg)
                inherit_weights(student, ret["teacher"], cfg.KD.INHERIT)
                ret["losses"] = build_losses(cfg, student, ret["teacher"])
            batches = getattr(student, "first_training_batches", first_training_batches)
            ret["calibration_batches"] = functools.partial(batches, cfg)
        return ret

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def backbone(self) -> nn.Module:
        return self.student.backbone

    @property
    def teacher(self) -> Optional[nn.Module]:
        """The frozen teacher, which is not a submodule; None without losses."""
        return self._teacher.model if self._teacher is not None else None

    def forward(self, batched_inputs: List[Dict]):
        """
        Args:
            batched_inputs: as the student takes them.

        Returns:
            In training, a dict of scalars: the student's losses and the distillation losses. In eval, what the
            student returns.

        Raises:
            FloatingPointError: a distillation loss is not finite; names it.
        """
        if not self.training:
            return self.student(batched_inputs)
        factors = self._factors()
        if not any(factors.values()):
            losses = self.student(batched_inputs)
            return {**losses, **{self.losses[name].key: _zero(self.losses[name]) for name in factors}}

        wanted = max(loss.images_to_observe() for loss in self.losses.values())
        if wanted:
            has_source = self._calibration_batches is not None
            with preserved_random_state():
                self.calibrate(self._calibration_batches(wanted) if has_source else [batched_inputs])

        if any(loss.needs_input_gradients and factors[name] for name, loss in self.losses.items()):
            batched_inputs = with_pixel_gradients(batched_inputs, self.device)
        losses, features, canvas, stages = self._run_student(batched_inputs)
        teacher_features, teacher_outputs = self.run_teacher(batched_inputs, canvas)
        self._warn_of_frozen_taps(features)
        context = StepContext(
            image_sizes(batched_inputs),
            canvas,
            instances=[x["instances"] for x in batched_inputs] if "instances" in batched_inputs[0] else None,
            student_head=self._region_taps.head if self._region_taps is not None else None,
            student_stages=stages,
            teacher_head=self._teacher_head,
            teacher_outputs=teacher_outputs,
            input_gradients=functools.partial(self._input_gradients, dict(losses), batched_inputs),
        )
        for name, loss in self.losses.items():
            if loss.key in losses:
                raise ValueError(f"The student already has a loss {loss.key!r}; name the distillation loss otherwise.")
            if factors[name] == 0:
                losses[loss.key] = _zero(loss)
                continue
            value = loss(_at(features, loss.student_taps), _at(teacher_features, loss.teacher_taps), context)
            losses[loss.key] = factors[name] * value
        self._check_finite({loss.key: losses[loss.key] for loss in self.losses.values()})
        return losses

    @torch.no_grad()
    def calibrate(self, batches: Iterable[List[Dict]]) -> None:
        """
        Show the teacher's responses to the losses that calibrate themselves on some images (margins). Done before
        the first training step, on the training set's first images; call it to choose the images yourself.

        Args:
            batches: batched inputs. In a distributed run every rank brings as many; all get the same result.
        """
        observers = [loss for loss in self.losses.values() if loss.images_to_observe()]
        images = 0
        for batched_inputs in batches:
            sizes = image_sizes(batched_inputs)
            divisibility = max(self.student.backbone.size_divisibility, 1)
            canvas = tuple(-(-max(side) // divisibility) * divisibility for side in zip(*sizes))
            features, _ = self.run_teacher(batched_inputs, canvas)
            context = StepContext(sizes, canvas)
            for loss in observers:
                loss.observe(_at(features, loss.teacher_taps), context)
            images += len(sizes)
        logger.info(f"Calibrated {[loss.key for loss in observers]} on {images} images of this rank.")

    def _input_gradients(self, task_losses: Dict[str, Tensor], batched_inputs):
        student = pixel_gradients(task_losses, batched_inputs, create_graph=True)
        return student, self._teacher.input_gradients(batched_inputs, input_format=self.input_format)

    def run_teacher(self, batched_inputs, canvas: Tuple[int, int]):
        """The teacher's maps at its taps and, for losses on regions, the outputs of its backbone; see ``Teacher``."""
        return self._teacher(batched_inputs, input_format=self.input_format, canvas=canvas, device=self.device)

    def _factors(self) -> Dict[str, float]:
        if not self.losses:
            return {}
        scheduled = any(loss.warmup_iters or loss.stop_iter >= 0 for loss in self.losses.values())
        if scheduled and not has_event_storage():
            raise RuntimeError(
                "Warm-up and stop of distillation losses follow the iteration of Detectron2's EventStorage: "
                "run the training step inside `with EventStorage(start_iter) as storage:` and call storage.step()."
            )
        iteration = get_event_storage().iter if scheduled else 0
        return {name: loss.factor(iteration) for name, loss in self.losses.items()}

    def _run_student(self, batched_inputs) -> Tuple[Dict, Dict, Tuple[int, int], Optional[List]]:
        canvas = []
        handle = self.student.backbone.register_forward_pre_hook(lambda _, args: canvas.append(args[0].shape[-2:]))
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._student_taps.recording())
                if self._region_taps is not None:
                    stack.enter_context(self._region_taps.recording())
                losses = self.student(batched_inputs)
        finally:
            handle.remove()
        stages = self._region_taps.pop() if self._region_taps is not None else None
        return losses, self._student_taps.pop(), tuple(canvas[0]), stages

    def _warn_of_frozen_taps(self, features: Dict[str, List[Tensor]]):
        if self._warned_of_frozen_taps:
            return
        self._warned_of_frozen_taps = True
        frozen = [name for name, maps in features.items() if not any(m.requires_grad for m in maps)]
        if frozen:
            logger.warning(
                f"The student taps {frozen} carry no gradient (a frozen stage, MODEL.BACKBONE.FREEZE_AT, or reentrant "
                f"activation checkpointing): losses there teach nothing but their connectors."
            )

    @staticmethod
    def _check_finite(losses: Dict[str, Tensor]):
        finite = torch.isfinite(torch.stack([value.detach().float() for value in losses.values()]))
        if not finite.all():
            found = {key: value.item() for key, value in losses.items()}
            bad = [key for key, ok in zip(losses, finite.tolist()) if not ok]
            raise FloatingPointError(f"The distillation loss {', '.join(bad)} is not finite: {found}.")

    # A checkpoint is the student's.

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The student's state dict; what the losses own is in its metadata."""
        ret = self.student.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        state = self.losses.state_dict()
        if state:
            ret._metadata[_STATE_KEY] = dict(state)
        return ret

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """Load a student's state dict and, where its metadata holds them, what the losses own."""
        state = getattr(state_dict, "_metadata", {}).get(_STATE_KEY, {})
        expected = {key: tuple(value.shape) for key, value in self.losses.state_dict().items()}
        if state and {key: tuple(value.shape) for key, value in state.items()} == expected:
            self.losses.load_state_dict(state)
        elif expected:
            logger.info("The weights bring no state for these distillation losses: connectors and margins start anew.")
        return self.student.load_state_dict(state_dict, strict, **kwargs)


def first_training_batches(cfg: CfgNode, num_images: int) -> Iterator[List[Dict]]:
    """
    This rank's share of the first images of ``DATASETS.TRAIN``, one a batch, as the test-time mapper reads them: no
    augmentation, no random number.
    """
    dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, check_consistency=False
    )
    world_size = comm.get_world_size()
    per_rank = max(min(num_images, len(dicts)) // world_size, 1)
    mapper = DatasetMapper(cfg, is_train=False)
    for index in range(per_rank):
        yield [mapper(dicts[(index * world_size + comm.get_rank()) % len(dicts)])]


def image_sizes(batched_inputs: List[Dict]) -> List[Tuple[int, int]]:
    return [tuple(x["image"].shape[-2:]) for x in batched_inputs]


def _at(features: Dict[str, List[Tensor]], taps: Sequence[str]) -> List[Tensor]:
    return [value for tap in taps for value in features[tap]]


def _check_task_losses(loss: DistillationLoss, **networks: nn.Module) -> None:
    for side, network in networks.items():
        if not hasattr(network, "task_losses"):
            raise ValueError(
                f"{type(loss).__name__} differentiates the task loss twice, down to the pixels, with the same labels "
                f"for both networks: it works for ImageClassifier, and the {side} is {type(network).__name__} "
                f"(ROIAlign has no second derivative). Distil attention in a detector by AttentionTransferLoss."
            )


def _zero(loss: nn.Module) -> Tensor:
    """A loss that is off: 0, with a path to its connectors so that DDP finds a gradient for every parameter."""
    parameters = list(loss.parameters())
    return sum((p.sum() * 0 for p in parameters), torch.zeros((), device=parameters[0].device if parameters else None))
