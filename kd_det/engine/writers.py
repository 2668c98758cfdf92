"""A run's scalars in Weights & Biases or MLflow, beside Detectron2's log, metrics.json and TensorBoard."""

import importlib
import os
import re
from collections.abc import Callable, Iterable

import yaml
from detectron2.utils.events import EventWriter, get_event_storage

from kd_det.errors import UserError, unknown_name

__all__ = ["TrackingWriter", "WRITERS", "check_writers"]


def _wandb(folder: str, config: str, run_id: str | None) -> tuple[str, Callable, Callable]:
    import wandb

    keys = None
    if os.path.isfile(config):
        with open(config) as file:
            keys = yaml.safe_load(file)
    name = os.path.basename(os.path.abspath(folder))
    run = wandb.init(id=run_id, resume="allow", dir=folder, name=name, config=keys)
    return run.id, lambda scalars, step: run.log(scalars, step=step), run.finish


def _mlflow(folder: str, config: str, run_id: str | None) -> tuple[str, Callable, Callable]:
    import mlflow

    run = mlflow.start_run(run_id=run_id, run_name=os.path.basename(os.path.abspath(folder)))
    if os.path.isfile(config):
        mlflow.log_artifact(config)

    def log(scalars: dict[str, float], step: int) -> None:
        # Names of classes may hold what MLflow refuses in a name.
        mlflow.log_metrics({re.sub(r"[^\w./ -]", "_", key): value for key, value in scalars.items()}, step=step)

    return run.info.run_id, log, mlflow.end_run


# From OUTPUT_DIR, its config.yaml and the id of a run to continue (None: a new one) to the run's id and the functions
# that log and end it.
WRITERS = {"wandb": _wandb, "mlflow": _mlflow}


def check_writers(names: Iterable[str]) -> None:
    """Raise a :class:`UserError` for a writer that does not exist, or whose package is not installed."""
    for name in names:
        if name not in WRITERS:
            raise UserError(unknown_name("KD.WRITERS", name, WRITERS))
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise UserError(f"KD.WRITERS {name!r} needs the package {name}: pip install kd_det[{name}]") from e


class TrackingWriter(EventWriter):
    """
    Sends each scalar once, smoothed as in metrics.json. The service's own environment variables say where to and under
    which project. The id of the run stays in ``OUTPUT_DIR/<name>_run_id``, by which a resumed training continues it.
    """

    def __init__(self, name: str, folder: str, window_size: int = 20):
        self._name, self._folder, self._window_size = name, folder, window_size
        self._log: Callable | None = None
        self._last_write = -1

    def write(self) -> None:
        if self._log is None:  # a run that fails before its first step is none
            self._open()
        by_step: dict[int, dict[str, float]] = {}
        for key, (value, step) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if step > self._last_write:
                by_step.setdefault(step, {})[key] = value
        for step in sorted(by_step):
            self._log(by_step[step], step)
            self._last_write = step

    def close(self) -> None:
        if self._log is not None:
            self._end()

    def _open(self) -> None:
        path, known = os.path.join(self._folder, f"{self._name}_run_id"), None
        if os.path.isfile(path):
            with open(path) as file:
                known = file.read().strip()
        config = os.path.join(self._folder, "config.yaml")
        run_id, self._log, self._end = WRITERS[self._name](self._folder, config, known)
        with open(path, "w") as file:
            file.write(run_id)
