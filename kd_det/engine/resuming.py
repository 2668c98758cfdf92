"""What an optimizer takes over from a checkpoint: only a state of the same parameters, and no option in silence."""

import logging

from torch import nn
from torch.optim import Optimizer

__all__ = ["RESUME_SOLVER", "check_optimizer_state", "options_of", "settle_options"]

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
    Args:
        model: has the optimizer's parameters.
        optimizer: not loaded yet.
        saved: its ``state_dict()`` of the checkpoint.

    Raises:
        ValueError: it is of other parameters; names those whose shapes changed.
    """
    names = {parameter: name.removeprefix("module.") for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    problem = ""
    if len(parameters) != len(numbers):
        problem = f"it trained {len(numbers)} parameters, and this run has {len(parameters)}"
    elif sizes != [len(group["params"]) for group in saved["param_groups"]]:
        problem = "its parameters are grouped otherwise (by SOLVER.WEIGHT_DECAY and the other keys a layer's kind)"
    else:
        changed = [
            f"{names.get(parameter, 'a parameter')} was {tuple(value.shape)}, is {tuple(parameter.shape)}"
            for parameter, number in zip(parameters, numbers, strict=True)
            for value in saved["state"].get(number, {}).values()
            if getattr(value, "ndim", 0) and value.shape != parameter.shape
        ]
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        problem = ", ".join(dict.fromkeys(changed[:5])) + more
    if problem:
        raise ValueError(
            f"The checkpoint is of a run with other losses or another model: {problem}. To start from its weights, set "
            f"MODEL.WEIGHTS to it, without --resume."
        )


def options_of(optimizer: Optimizer) -> list[dict]:
    """The options of an optimizer's groups: learning rate, weight decay and so on."""
    return [{key: value for key, value in group.items() if key in _KEYS} for group in optimizer.param_groups]


def settle_options(optimizer: Optimizer, scheduler, configured: list[dict], *, apply: bool) -> None:
    """
    After a checkpoint was loaded: warn of options that the config has changed, or apply them.

    Args:
        optimizer, scheduler: loaded.
        configured: :func:`options_of` the optimizer before that.
        apply: the config's values replace the checkpoint's.
    """
    changed = {}
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        for key, value in options.items():
            if group.get(key, value) != value:
                changed[_KEYS[key], group[key], value] = None
    if not changed:
        return
    if apply:
        for group, options in zip(optimizer.param_groups, configured, strict=True):
            if group.get("initial_lr"):  # at the schedule's factor of this iteration
                group["lr"] *= options["initial_lr"] / group["initial_lr"]
            group.update(options)
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for key, old, new in changed:
        if apply:
            logger.info(f"Resumed with another {key}: {new}, it was {old}.")
        else:
            logger.warning(
                f"The checkpoint's {key} {old} stays, the config's {new} is not used. To resume with the config's "
                f'solver, set KD.RESUME_SOLVER "config".'
            )
