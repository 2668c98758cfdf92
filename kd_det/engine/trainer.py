"""Detectron2's ``DefaultTrainer`` with evaluators and exact resumption, on any number of processes and devices."""

import logging
import os
import warnings
import weakref

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_det.data import DatasetError, evaluator_type
from kd_det.engine.evaluation import COCOEvaluator, test_with_augmentation
from kd_det.engine.loader import build_train_loader
from kd_det.engine.step import TrainStep
from kd_det.engine.stopping import CheckpointHook, StopSignals
from kd_det.errors import UserError, one_line, unknown_name
from kd_det.random_state import get_random_state, preserved_random_state, set_random_state
from kd_det.weights.checkpoint import SafeCheckpointer, load_strictly

__all__ = ["EVALUATORS", "Trainer", "evaluate"]

logger = logging.getLogger(__name__)

# By the ``evaluator_type`` of a data set's metadata.
EVALUATORS = {
    "coco": lambda cfg, name, output_dir: COCOEvaluator(
        name, output_dir=output_dir, kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    ),
    "pascal_voc": lambda cfg, name, output_dir: PascalVOCDetectionEvaluator(name),
}


class Trainer(DefaultTrainer):
    """
    Trains what ``build_model`` builds, a Distiller or a plain model, and evaluates it on ``DATASETS.TEST``. Override
    ``build_train_loader``, ``build_evaluator`` and the other class methods as those of ``DefaultTrainer``.

    A run that was killed and resumed goes on from its last checkpoint bit for bit as one never stopped (on the CPU):
    checkpoints also hold the optimizer (which v0.6's own leave out), the random state of every process and the order
    of the data. For the latter, ``build_train_loader`` must return a :class:`ResumableLoader`.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _distributed(model)
        kd = cfg.get("KD", {})
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            amp=cfg.SOLVER.AMP.ENABLED,
            non_finite=kd.get("NON_FINITE", "stop"),
            dump_dir=os.path.join(cfg.OUTPUT_DIR, "non_finite"),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self._signals = StopSignals()
        self._random_states: dict = {}  # of every rank, and the iteration after which they were
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list:
        ret = [hook for hook in super().build_hooks() if not isinstance(hook, hooks.PeriodicCheckpointer)]
        before_evaluation = next(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook))
        checkpoints = CheckpointHook(
            self.checkpointer,
            self.cfg.SOLVER.CHECKPOINT_PERIOD,
            self._signals,
            eval_period=self.cfg.TEST.EVAL_PERIOD,
        )
        ret.insert(before_evaluation, checkpoints)
        return ret

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter and hasattr(self.data_loader, "start_at"):
            self.data_loader.start_at(self.start_iter)
        elif self.start_iter:
            logger.warning("This train loader cannot go on where it was: the order of the data starts anew.")

    def train(self):
        """
        As ``DefaultTrainer.train``.

        Raises:
            SystemExit: with status 75, after SIGTERM or SIGINT: the step was finished, and all is saved to resume.
        """
        log = logging.getLogger("detectron2.engine.train_loop")
        log.addFilter(_without_traceback)
        try:
            with self._signals.handled():
                return super().train()
        finally:
            log.removeFilter(_without_traceback)

    def before_train(self):
        super().before_train()
        states = self._random_states.get("states", ())
        if comm.get_rank() < len(states):
            set_random_state(states[comm.get_rank()])

    def gather_random_states(self) -> None:
        """Bring the random states of all processes to the one that saves. All processes must call it."""
        self._random_states = {"iteration": self.iter, "states": comm.gather(get_random_state())}

    def state_dict(self) -> dict:
        ret = super().state_dict()
        ret.setdefault("_trainer", self._trainer.state_dict())  # v0.6 leaves it out
        if hasattr(self.data_loader, "state_dict"):
            ret["data_loader"] = self.data_loader.state_dict()
        if self._random_states.get("iteration") == self.iter:
            ret["random_states"] = self._random_states
        return ret

    def load_state_dict(self, state_dict: dict) -> None:
        try:
            TrainerBase.load_state_dict(self, state_dict)
        except (AttributeError, KeyError, TypeError) as e:
            raise ValueError(f"The checkpoint's trainer state is not this trainer's ({type(e).__name__}: {e}).") from e
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint brings no optimizer state: momentum starts anew.")
        else:
            try:
                self._trainer.load_state_dict(state_dict["_trainer"])
            except ValueError as e:
                raise ValueError(f"The checkpoint is of a run with other losses or another model: {e}.") from e
        self._random_states = state_dict.get("random_states", {})
        self._load_order_of_data(state_dict.get("data_loader"))

    def _load_order_of_data(self, saved: dict | None) -> None:
        if saved is None or not hasattr(self.data_loader, "load_state_dict"):
            return
        self.data_loader.load_state_dict(saved)
        now = self.data_loader.state_dict()
        changed = [f"{key} was {saved[key]}, is {now[key]}" for key in saved if saved[key] != now[key]]
        if changed:
            logger.warning(f"Resumed with other batches ({', '.join(changed)}): from here on, the run is another one.")

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """See :func:`kd_det.engine.build_train_loader`; override to pass a mapper or a data set."""
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """
        The evaluator of the data set's ``evaluator_type``; ``output_folder``: default ``OUTPUT_DIR/inference``.

        Raises:
            ValueError: no evaluator of that type.
        """
        kind = evaluator_type(dataset_name)
        if kind not in EVALUATORS:
            raise ValueError(f"data set {dataset_name!r}: {unknown_name('evaluator_type', kind, EVALUATORS)}")
        return EVALUATORS[kind](cfg, dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None):
        """As ``DefaultTrainer.test``; what it draws at random does not shift training."""
        with preserved_random_state():
            return super().test(cfg, model, evaluators)


def evaluate(cfg: CfgNode, trainer_class=Trainer, *, resume: bool = False):
    """
    Evaluate the plain student of a config on ``DATASETS.TEST``. No teacher is read.

    Args:
        cfg: a distillation config or a plain one.
        trainer_class: has ``build_model`` and ``test``.
        resume: evaluate the latest checkpoint of ``OUTPUT_DIR`` instead of ``MODEL.WEIGHTS``.

    Returns:
        Results as ``DefaultTrainer.test`` gives them.

    Raises:
        FileNotFoundError, ValueError: weights that do not exist or do not fit.
    """
    model = trainer_class.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
    weights = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        weights = checkpointer.get_checkpoint_file()
    load_strictly(model, weights, who="student")
    results = trainer_class.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(test_with_augmentation(cfg, model, trainer_class))
    return results


def _without_traceback(record: logging.LogRecord) -> bool:
    """Shortens Detectron2's "Exception during training" to one line where a user can mend the cause."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (DatasetError, FloatingPointError, OSError, UserError)):
        record.msg, record.args, record.exc_info = f"{record.msg} {one_line(error)}", (), None
    return True


def _distributed(model: nn.Module) -> nn.Module:
    """Detectron2's ``create_ddp_model``, which gives CPU models a device number."""
    if comm.get_world_size() == 1:
        return model
    devices = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer PyTorch has another name for it
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
