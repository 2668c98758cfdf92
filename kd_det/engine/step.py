"""One step of training: mixed precision on any device, and no non-finite loss that goes unnoticed."""

import contextlib
import logging
import os
import time

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor

from kd_det.errors import one_line

__all__ = ["NON_FINITE", "TrainStep", "any_rank"]

logger = logging.getLogger(__name__)

# Values of KD.NON_FINITE.
NON_FINITE = ("stop", "skip")

# So many skipped steps in a row are not the images' fault: the weights themselves are gone.
MOST_SKIPPED_IN_A_ROW = 100


class TrainStep(SimpleTrainer):
    """
    ``SimpleTrainer``, and ``AMPTrainer`` where ``amp``: float16 with scaled gradients on a GPU, bfloat16 on the CPU.

    A step with a non-finite loss or gradient never reaches the weights. "stop" ends training; "skip" leaves weights,
    optimizer and buffers as they were and counts the step as ``non_finite_steps``, on all ranks alike. Both write the
    batch to ``dump_dir``.
    """

    def __init__(self, model, data_loader, optimizer, *, amp: bool = False, non_finite: str = "stop", dump_dir: str):
        """
        Args:
            model, data_loader, optimizer: as of ``SimpleTrainer``.
            amp: run the forward under autocast.
            non_finite: "stop" or "skip".
            dump_dir: where batches with non-finite losses are written.

        Raises:
            ValueError: another value of ``non_finite``.
        """
        if non_finite not in NON_FINITE:
            raise ValueError(f"KD.NON_FINITE must be one of {', '.join(NON_FINITE)}, found {non_finite!r}.")
        super().__init__(model, data_loader, optimizer)
        self._device = next(model.parameters()).device.type
        self._amp = amp
        self.grad_scaler = torch.amp.GradScaler(self._device, enabled=amp and self._device == "cuda")
        self._skips = non_finite == "skip"
        self._dump_dir = dump_dir
        self.non_finite_steps = 0
        self._skipped_in_a_row = 0

    def run_step(self):
        """
        Raises:
            FloatingPointError: a loss or a gradient is not finite (the step is not to be skipped, or too many were);
                names it, the step, the images and the dump.
        """
        if not self.model.training:
            raise RuntimeError("the model was changed to eval mode")
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if self._skips else []
        losses, problem = {}, None
        try:
            with self._watching_other_ranks():
                losses, problem = self._forward(batch)
            # Whether to skip is decided before backward, in which ranks wait for each other.
            if self._skips and any_rank(problem is not None) and not problem:
                raise _OtherRankFailed
        except _OtherRankFailed:
            self._skip(f"iteration {self.iter}: a loss of another process is not finite.", buffers)
            return
        if not problem:
            self.optimizer.zero_grad()
            self.grad_scaler.scale(sum(losses.values())).backward()
            if hasattr(self, "after_backward"):  # not in v0.6
                self.after_backward()
            problem = self._problem_of_gradients()  # of all ranks: they are averaged
        if problem:
            problem = f"iteration {self.iter}: {problem} {self._dump(batch, losses)}"
            if not self._skips:
                raise FloatingPointError(problem)
            self._skip(problem, buffers)
            return
        self._skipped_in_a_row = 0
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self):
        ret = super().state_dict()
        if self.grad_scaler.is_enabled():
            ret["grad_scaler"] = self.grad_scaler.state_dict()
        ret["non_finite_steps"] = self.non_finite_steps
        return ret

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.non_finite_steps = state_dict.get("non_finite_steps", 0)

    def _forward(self, batch) -> tuple[dict[str, Tensor], str | None]:
        """The losses, and what is wrong with them."""
        dtype = torch.bfloat16 if self._device == "cpu" else torch.float16
        try:
            with torch.autocast(self._device, dtype=dtype, enabled=self._amp):
                losses = self.model(batch)
        except FloatingPointError as e:  # the Distiller's, or a proposal generator's
            return {}, one_line(e)
        if isinstance(losses, Tensor):
            losses = {"total_loss": losses}
        finite = torch.isfinite(torch.stack([loss.detach().float() for loss in losses.values()])).tolist()
        bad = [f"{name} is {loss.item()}" for (name, loss), ok in zip(losses.items(), finite, strict=True) if not ok]
        return losses, f"the losses are not finite: {', '.join(bad)}." if bad else None

    def _problem_of_gradients(self) -> str | None:
        """What is wrong with the gradients; a gradient scaler looks for itself."""
        if self.grad_scaler.is_enabled():
            return None
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None and p.numel()}
        if not gradients:
            return None
        largest = torch.stack([torch.linalg.vector_norm(g, float("inf")).float() for g in gradients.values()])
        bad = [name for name, ok in zip(gradients, torch.isfinite(largest).tolist(), strict=True) if not ok]
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        return f"the losses are finite, the gradients of {', '.join(bad[:5])}{more} are not." if bad else None

    @contextlib.contextmanager
    def _watching_other_ranks(self):
        """
        Inside, a student's forward that went well asks whether it went well on all ranks. One that raised
        ``FloatingPointError`` will never come to what the ranks do together in the distillation losses.
        """
        student = getattr(getattr(self.model, "module", self.model), "student", None)
        if not self._skips or student is None or comm.get_world_size() == 1:
            yield
            return
        handle = student.register_forward_hook(_ask_other_ranks)
        try:
            yield
        finally:
            handle.remove()

    def _skip(self, problem: str, buffers: list[tuple[Tensor, Tensor]]):
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
        path = os.path.join(self._dump_dir, f"iter_{self.iter:07d}_rank_{comm.get_rank()}.pth")
        os.makedirs(self._dump_dir, exist_ok=True)
        values = {name: loss.detach().cpu() for name, loss in losses.items()}
        torch.save({"iteration": self.iter, "losses": values, "batch": [_plain(image) for image in batch]}, path)
        return f"Images: {files}. The batch is in {path}."


class _OtherRankFailed(Exception):
    """The forward was given up because that of another process failed."""


def _ask_other_ranks(module, args, output) -> None:
    if any_rank(False):
        raise _OtherRankFailed


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes must ask."""
    if comm.get_world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def _plain(image: dict) -> dict:
    """A model's input in tensors, numbers and names only; instances by their fields."""
    ret = {key: value for key, value in image.items() if isinstance(value, (Tensor, int, float, str))}
    if "instances" in image:
        fields = image["instances"].get_fields()
        fields = {key: getattr(value, "tensor", value) for key, value in fields.items()}
        ret["instances"] = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
    return ret
