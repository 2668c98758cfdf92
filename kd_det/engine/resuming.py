"""What an optimizer takes over from a checkpoint: only a state of the same parameters, and no option in silence."""

import logging

from torch import nn
from torch.optim import Optimizer

from kd_det.errors import UserError, first_few

__all__ = ["RESUME_SOLVER", "check_optimizer_state", "load_optimizer"]

logger = logging.getLogger(__name__)

# Values of KD.RESUME_SOLVER.
RESUME_SOLVER = ("checkpoint", "config")

# Options of an optimizer's groups, and what users call them.
_KEYS = {
    "initial_lr": "SOLVER.BASE_LR",
    "momentum": "SOLVER.MOMENTUM",
    "nesterov": "SOLVER.NESTEROV",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
}


def check_optimizer_state(model: nn.Module, optimizer: Optimizer, saved: dict) -> None:
    """
    Raises:
        UserError: a saved state of other parameters than the optimizer's; names those whose shapes changed.
    """
    if problem := _misfit(model, optimizer, saved):
        raise UserError(
            f"The checkpoint is of a run with other losses or another model: {problem}. To start from its weights, set "
            f"MODEL.WEIGHTS to it, without --resume."
        )


def load_optimizer(scheduler, trainer, saved: dict, *, apply: bool) -> None:
    """
    Load the state of the trainer that holds the optimizer; options that the config has changed since are warned of, or
    applied.

    Args:
        scheduler: of the optimizer; is loaded already.
        trainer, saved: a ``SimpleTrainer`` and its ``state_dict()``.
        apply: the config's options replace the checkpoint's.
    """
    optimizer: Optimizer = trainer.optimizer
    configured = [{key: group[key] for key in _KEYS if key in group} for group in optimizer.param_groups]
    trainer.load_state_dict(saved)
    changed = {}
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        changes = {key: value for key, value in options.items() if group.get(key, value) != value}
        changed.update({(_KEYS[key], group[key], value): None for key, value in changes.items()})
        if apply:
            if group.get("initial_lr"):  # at the schedule's factor of this iteration
                group["lr"] *= options["initial_lr"] / group["initial_lr"]
            group.update(changes)
    if changed and apply:
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for key, old, new in changed:
        if apply:
            logger.info(f"Resumed with another {key}: {new}, it was {old}.")
        else:
            logger.warning(
                f"The checkpoint's {key} {old} stays, the config's {new} is not used. To resume with the config's "
                f'solver, set KD.RESUME_SOLVER "config".'
            )


def _misfit(model: nn.Module, optimizer: Optimizer, saved: dict) -> str:
    """In what the parameters of an optimizer differ from those of a state; empty: in nothing."""
    names = {parameter: name.removeprefix("module.") for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(parameters) != len(numbers):
        return f"it trained {len(numbers)} parameters, and this run has {len(parameters)}"
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (optimizer.state_dict(), saved)]
    if sizes[0] != sizes[1]:
        return "its parameters are grouped otherwise (by SOLVER.WEIGHT_DECAY and the other keys a layer's kind)"
    changed = [
        f"{names.get(parameter, 'a parameter')} was {tuple(value.shape)}, is {tuple(parameter.shape)}"
        for parameter, number in zip(parameters, numbers, strict=True)
        for value in saved["state"].get(number, {}).values()
        if getattr(value, "ndim", 0) and value.shape != parameter.shape
    ]
    return first_few(list(dict.fromkeys(changed)))
