"""Detectron2's ``DefaultTrainer`` with evaluators and exact resumption, on any number of processes and devices."""

import contextlib
import logging
import os
import weakref

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from kd_det.data import DatasetError, evaluator_type
from kd_det.engine.average import AverageStatistics, AverageWeights, plain_model
from kd_det.engine.best import BestStudent
from kd_det.engine.evaluation import COCOEvaluator, test_with_augmentation
from kd_det.engine.loader import build_train_loader
from kd_det.engine.resuming import RESUME_SOLVER, load_optimizer
from kd_det.engine.step import PRECISIONS, TrainStep
from kd_det.engine.stopping import CheckpointHook, StopSignals
from kd_det.engine.teacher_evaluation import EvaluateTeacher
from kd_det.engine.writers import TrackingWriter, check_writers
from kd_det.errors import UserError, one_line, unknown_name
from kd_det.random_state import get_random_state, preserved_random_state, set_random_state
from kd_det.weights.average import WeightAverage
from kd_det.weights.checkpoint import SafeCheckpointer
from kd_det.weights.strict import load_strictly

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

    A run that was killed and resumed ends, on the CPU, bit for bit as one that was never stopped:
    checkpoints also hold the optimizer (which v0.6's own leave out), the random state of every process and the order
    of the data. For the latter, ``build_train_loader`` must return a :class:`ResumableLoader`.

    With ``KD.EMA_DECAY``, the average of the student's weights is what is evaluated; checkpoints hold both, and at the
    end ``OUTPUT_DIR/model_ema.pth`` is a plain student of the average. With ``TEST.EVAL_PERIOD``,
    ``OUTPUT_DIR/model_best.pth`` is the plain student that was evaluated best, see :class:`BestStudent`.
    """

    average: WeightAverage | None = None
    best: BestStudent | None = None

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        kd = cfg.get("KD", {})
        for key, valid in (("AMP_PRECISION", PRECISIONS), ("RESUME_SOLVER", RESUME_SOLVER)):
            if kd.get(key, next(iter(valid))) not in valid:
                raise UserError(unknown_name(f"KD.{key}", kd[key], valid))
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        devices = {} if next(model.parameters()).is_cuda else {"device_ids": None}  # its default numbers a GPU
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        self._signals = StopSignals()
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            precision=PRECISIONS[kd.get("AMP_PRECISION", "float16")] if cfg.SOLVER.AMP.ENABLED else None,
            non_finite=kd.get("NON_FINITE", "stop"),
            dump_dir=os.path.join(cfg.OUTPUT_DIR, "non_finite"),
            signals=self._signals,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self._random_states: dict = {}  # of every rank, and the iteration after which they were
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As ``DefaultTrainer.auto_scale_workers``; the schedules of the distillation losses are scaled likewise."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg or "KD" not in cfg:
            return scaled
        frozen = scaled.is_frozen()
        scaled.defrost()
        scale = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
        for node in (scaled.KD, *(node for node in scaled.KD.values() if isinstance(node, CfgNode))):
            for key in ("WARMUP_ITERS", "STOP_ITER", "DECAY_START"):
                if (node.get(key) or 0) > 0:  # None: that of KD; -1: never
                    node[key] = round(node[key] / scale)
        if frozen:
            scaled.freeze()
        return scaled

    def build_hooks(self) -> list:
        # DefaultTrainer's __init__ calls this with the model built and nothing loaded.
        decay, kd = self.ema_decay(self.cfg), self.cfg.get("KD", {})
        if self.cfg.TEST.EVAL_PERIOD > 0:
            self.best = BestStudent(self.cfg.OUTPUT_DIR, kd.get("BEST_METRIC", ""))
        if decay:
            self.average = WeightAverage(plain_model(self.model), decay)
        ret = [
            hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate) if isinstance(hook, hooks.EvalHook) else hook
            for hook in super().build_hooks()
            if not isinstance(hook, hooks.PeriodicCheckpointer)
        ]
        before_evaluation = next(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook))
        periods = (self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD)
        ret.insert(before_evaluation, CheckpointHook(self.checkpointer, *periods, self._signals))
        if kd.get("TEACHER", {}).get("EVALUATE", False):
            ret.append(EvaluateTeacher())
        loaders = []
        for hook in (hook for hook in ret if isinstance(hook, hooks.PreciseBN)):
            # Private: DefaultTrainer builds the loader of PreciseBN and gives it to the hook alone. Its statistics are
            # those of a step's last forward, so unlabelled images, which have one of their own, are left out.
            hook._data_loader = getattr(hook._data_loader, "labelled", hook._data_loader)
            loaders.append(hook._data_loader)
        self._loaders = [loader for loader in (self.data_loader, *loaders) if hasattr(loader, "start_at")]
        for loader in self._loaders[1:]:
            loader.load_state_dict(self._loaders[0].state_dict())
        if self.average is None:
            return ret
        self.checkpointer.add_checkpointable("ema", self.average)
        # Before the checkpointer, so that a checkpoint holds the averages of its own weights.
        return [AverageStatistics(), AverageWeights(), *ret]

    def build_writers(self) -> list:
        """Detectron2's, and those of ``KD.WRITERS``; ``UserError`` for one that is unknown or not installed."""
        names = self.cfg.get("KD", {}).get("WRITERS", ())
        check_writers(names)
        return [*super().build_writers(), *(TrackingWriter(name, self.cfg.OUTPUT_DIR) for name in names)]

    @classmethod
    def ema_decay(cls, cfg: CfgNode) -> float:
        """The decay of the average of the weights, 0 for none."""
        return cfg.get("KD", {}).get("EMA_DECAY", 0.0)

    def averaged(self):
        """A context in which the student's weights are their average, if one is kept."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    @property
    def non_finite_steps(self) -> int:
        """Steps that were skipped so far (``KD.NON_FINITE``)."""
        return self._trainer.non_finite_steps

    @property
    def _tester(self) -> type["Trainer"]:
        """The class whose ``test`` evaluates during training."""
        return type(self)

    def _evaluate(self):
        with self.averaged():
            self._last_eval_results = self._tester.test(self.cfg, self.model)
            if self.best is not None and comm.is_main_process():
                self.best.update(self._last_eval_results, plain_model(self.model), min(self.iter, self.max_iter - 1))
        return self._last_eval_results

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; ``ValueError`` or ``OSError`` for a checkpoint that is missing, damaged, or does not fit."""
        super().resume_or_load(resume)
        if self.average is not None:
            self.average.start()
        if not self.start_iter:
            return
        if self.best is not None and comm.is_main_process():
            self.best.resume()
        if not self._loaders:
            logger.warning("This train loader cannot continue where it was: the order of the data starts anew.")
        evaluations = self.start_iter // self.cfg.TEST.EVAL_PERIOD if self.cfg.TEST.EVAL_PERIOD > 0 else 0
        starts = (self.start_iter, evaluations * self.cfg.TEST.PRECISE_BN.NUM_ITER)
        for loader, start in zip(self._loaders, starts, strict=False):
            loader.start_at(start)

    def train(self):
        """
        As ``DefaultTrainer.train``, and returns the results of the last evaluation, if there was one. After SIGTERM or
        SIGINT it saves all and raises ``SystemExit(RESUMABLE)``.
        """
        log = logging.getLogger("detectron2.engine.train_loop")
        log.addFilter(_without_traceback)
        try:
            with self._signals.handled():
                super().train()
            return getattr(self, "_last_eval_results", None)
        finally:
            log.removeFilter(_without_traceback)

    def before_train(self):
        super().before_train()
        states = self._random_states.get("states", ())
        if comm.get_rank() < len(states):
            set_random_state(states[comm.get_rank()])

    def gather_random_states(self) -> None:
        """Send the random states of all processes, which all must call this, to the one that saves."""
        self._random_states = {"iteration": self.iter, "states": comm.gather(get_random_state())}

    def state_dict(self) -> dict:
        ret = super().state_dict()
        ret.setdefault("_trainer", self._trainer.state_dict())  # v0.6 leaves it out
        if self._loaders:
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
            logger.warning("The checkpoint has no optimizer state: momentum starts anew.")
        else:
            apply = self.cfg.get("KD", {}).get("RESUME_SOLVER", "checkpoint") == "config"
            load_optimizer(self.scheduler, self._trainer, state_dict["_trainer"], apply=apply)
        self._random_states = state_dict.get("random_states", {})
        saved = state_dict.get("data_loader")
        if saved is None or not self._loaders:
            return
        for loader in self._loaders:
            loader.load_state_dict(saved)
        now = self.data_loader.state_dict()
        keys = {**saved, **now}
        changed = [f"{k} was {saved.get(k, 0)}, is {now.get(k, 0)}" for k in keys if saved.get(k) != now.get(k)]
        if changed:
            logger.warning(f"Resumed with other batches ({', '.join(changed)}): from here on, the run is another one.")

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """See :func:`kd_det.engine.build_train_loader`; override to pass a mapper or a data set."""
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """The evaluator of the data set's ``evaluator_type``; ``output_folder``: default ``OUTPUT_DIR/inference``."""
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
        resume: evaluate the latest checkpoint of ``OUTPUT_DIR`` instead of ``MODEL.WEIGHTS``.

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
    """Shortens Detectron2's "Exception during training" to one line where a user can fix the cause."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (DatasetError, FloatingPointError, OSError, UserError)):
        record.msg, record.args, record.exc_info = f"{record.msg} {one_line(error)}", (), None
    return True
