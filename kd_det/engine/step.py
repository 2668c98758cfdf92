"""One step of training: mixed precision on any device, and no non-finite loss that goes unnoticed."""

import contextlib
import logging
import math
import time

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.file_io import PathManager
from torch import Tensor
from torch.nn.utils import get_total_norm

from kd_det.engine.resuming import check_optimizer_state
from kd_det.engine.stopping import StopSignals, any_rank
from kd_det.errors import first_few, one_line, unknown_name

__all__ = ["NON_FINITE", "PRECISIONS", "TrainStep"]

logger = logging.getLogger(__name__)

# Values of KD.NON_FINITE.
NON_FINITE = ("stop", "skip")

# Values of KD.AMP_PRECISION.
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# After so many skipped steps in a row, the cause is not the images but the weights.
MOST_SKIPPED_IN_A_ROW = 100

_OTHER_RANK = "a loss of another process is not finite."


class TrainStep(SimpleTrainer):
    """
    The step of ``SimpleTrainer`` or, with ``precision``, of ``AMPTrainer``, which itself needs CUDA. The host waits for
    the device once a step: when it reads the losses of all ranks and whether their gradients are finite.

    A step with a non-finite loss or gradient never reaches the weights. "stop" ends training; "skip" leaves weights,
    optimizer and buffers as they were and counts the step as ``non_finite_steps``, on all ranks alike. Both write the
    batch to ``dump_dir``.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        precision: torch.dtype | None = None,
        non_finite: str = "stop",
        dump_dir: str,
        signals: StopSignals | None = None,
    ):
        """
        Args:
            precision: of autocast, ``float16`` (with scaled gradients) or ``bfloat16``; None: float32. The CPU takes
                ``bfloat16`` for either.
            non_finite: "stop" or "skip"; a ``ValueError`` for another.
            signals: requests to stop, which the ranks exchange with their losses.
        """
        if non_finite not in NON_FINITE:
            raise ValueError(unknown_name("KD.NON_FINITE", non_finite, NON_FINITE))
        super().__init__(model, data_loader, optimizer)
        self._device = next(model.parameters()).device
        self._precision = torch.bfloat16 if precision is not None and self._device.type == "cpu" else precision
        self.grad_scaler = torch.amp.GradScaler(self._device.type) if self._precision is torch.float16 else None
        self._skips = non_finite == "skip"
        self._dump_dir = dump_dir
        self._signals = signals or StopSignals()
        self.non_finite_steps = 0
        self._skipped_in_a_row = 0

    def run_step(self):
        """
        Raises:
            FloatingPointError: a loss or a gradient is not finite; names it, the step, the images and the dump.
        """
        if not self.model.training:
            raise RuntimeError("the model was changed to eval mode")
        start = time.perf_counter()
        # SimpleTrainer's: an attribute in v0.6, a property in main.
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if self._skips else []
        try:
            losses = self._forward(batch)
        except FloatingPointError as e:  # a proposal generator's, of this rank or of another one
            problem = one_line(e)
            self._give_up(problem if problem == _OTHER_RANK else f"{problem} {self._dump(batch, {})}", buffers)
            return
        total = sum(losses.values())
        self.optimizer.zero_grad()
        (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()

        ranks = self._exchange(losses, data_time)
        if (problem := self._problem(losses, ranks, batch)) is not None:
            self._give_up(problem, buffers)
            return
        self._skipped_in_a_row = 0
        self._log(list(losses), ranks)
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def state_dict(self):
        scaler = {} if self.grad_scaler is None else {"grad_scaler": self.grad_scaler.state_dict()}
        return {**super().state_dict(), **scaler, "non_finite_steps": self.non_finite_steps}

    def load_state_dict(self, state_dict):
        check_optimizer_state(self.model, self.optimizer, state_dict["optimizer"])
        super().load_state_dict(state_dict)
        if self.grad_scaler is not None and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.non_finite_steps = state_dict.get("non_finite_steps", 0)

    def _forward(self, batch) -> dict[str, Tensor]:
        device, precision = self._device.type, self._precision
        autocast = contextlib.nullcontext() if precision is None else torch.autocast(device, dtype=precision)
        with self._watching_other_ranks(), autocast:
            losses = self.model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    @contextlib.contextmanager
    def _watching_other_ranks(self):
        """
        A rank whose forward raised ``FloatingPointError`` never comes to the collectives of the distillation losses and
        of backward. Where such a step is skipped, all ranks exchange how the student's forward went, and give it up.
        """
        if not self._skips or comm.get_world_size() == 1:
            yield
            return

        def exchange(*_):
            if any_rank(False):
                raise FloatingPointError(_OTHER_RANK)

        model = getattr(self.model, "module", self.model)
        handle = getattr(model, "student", model).register_forward_hook(exchange)
        try:
            yield
        except FloatingPointError as e:
            if str(e) != _OTHER_RANK:
                any_rank(True)
            raise
        finally:
            handle.remove()

    @torch.no_grad()
    def _exchange(self, losses: dict[str, Tensor], data_time: float) -> list[list[float]]:
        """
        A row for each rank: its losses, the largest magnitude in its gradients, its data_time and whether it was asked
        to stop. It takes one collective and one read of the device.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None and p.numel()]
        if self.grad_scaler is not None or not gradients:  # a scaler looks for itself, and lowers its scale
            largest = torch.zeros((), device=self._device)
        else:
            largest = get_total_norm(gradients, math.inf)
        # Without non_blocking, a copy to the device waits for it.
        parts = [part.to(self._device, torch.float32, non_blocking=True) for part in (*losses.values(), largest)]
        on_host = [data_time, float(bool(self._signals.requested))]
        if comm.get_world_size() == 1:
            return [torch.stack(parts).cpu().tolist() + on_host]
        row = torch.cat([torch.stack(parts), torch.tensor(on_host).to(self._device, non_blocking=True)])
        rows = [torch.empty_like(row) for _ in range(comm.get_world_size())]
        dist.all_gather(rows, row)
        ret = torch.stack(rows).cpu().tolist()
        self._signals.agreed = any(row[-1] for row in ret)
        return ret

    def _problem(self, losses: dict[str, Tensor], ranks: list[list[float]], batch) -> str | None:
        """What is not finite in this step; None if all is well."""
        own = zip(losses, ranks[comm.get_rank()], strict=False)
        if bad := [f"{name} is {value}" for name, value in own if not math.isfinite(value)]:
            what = f"the losses are not finite: {', '.join(bad)}."
        elif not all(math.isfinite(value) for row in ranks for value in row[: len(losses)]):
            return _OTHER_RANK
        elif not all(math.isfinite(row[len(losses)]) for row in ranks):
            gradients = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
            bad = [name for name, gradient in gradients if not gradient.isfinite().all()]
            what = f"the losses are finite, the gradients of {first_few(bad)} are not."
        else:
            return None
        return f"{what} {self._dump(batch, losses)}"

    def _log(self, names: list[str], ranks: list[list[float]]):
        """
        What ``SimpleTrainer.write_metrics`` logs, without its collectives of pickles and a read for each loss, and also
        a single loss under its own name.
        """
        if not comm.is_main_process():
            return
        means = {name: sum(row[i] for row in ranks) / len(ranks) for i, name in enumerate(names)}
        scalars = {"data_time": max(row[-2] for row in ranks), "total_loss": sum(means.values())}
        get_event_storage().put_scalars(**{**means, **scalars})

    def _give_up(self, problem: str, buffers: list[tuple[Tensor, Tensor]]):
        problem = f"iteration {self.iter}: {problem}"
        if not self._skips:
            raise FloatingPointError(problem)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self.non_finite_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{problem} Skipped {self._skipped_in_a_row} steps in a row: training diverged.")
        logger.warning(f"Skipped a step ({self.non_finite_steps} so far). {problem}")
        if comm.is_main_process():
            get_event_storage().put_scalar("non_finite_steps", self.non_finite_steps, smoothing_hint=False)

    def _dump(self, batch, losses: dict[str, Tensor]) -> str:
        """Write the batch for :func:`torch.load`; returns what to tell about it."""
        files = ", ".join(str(image.get("file_name", "(no file name)")) for image in batch)
        PathManager.mkdirs(self._dump_dir)
        path = f"{self._dump_dir}/iter_{self.iter:07d}_rank_{comm.get_rank()}.pth"
        values = {name: loss.detach().cpu() for name, loss in losses.items()}
        with PathManager.open(path, "wb") as file:
            torch.save({"iteration": self.iter, "losses": values, "batch": [_plain(image) for image in batch]}, file)
        return f"Images: {files}. The batch is in {path}."


def _plain(image: dict) -> dict:
    """A model's input in tensors, numbers and names only; instances by their fields."""
    ret = {key: value for key, value in image.items() if isinstance(value, (Tensor, int, float, str))}
    if "instances" in image:
        fields = image["instances"].get_fields()
        fields = {key: getattr(value, "tensor", value) for key, value in fields.items()}
        ret["instances"] = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
    return ret
