"""Runs in Weights & Biases and MLflow, by stand-ins of the packages that note what they are told."""

import json
import sys
import types

import pytest

from kd_det.engine import Trainer
from kd_det.errors import UserError
from tests.tiny_run import run_cfg, train


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


@pytest.fixture
def noted(monkeypatch) -> list:
    """What both stand-ins were told: ("wandb", "init", {...}), ("mlflow", "log", scalars, step), ..."""
    ret = []
    wandb, mlflow = types.ModuleType("wandb"), types.ModuleType("mlflow")

    def init(**options):
        ret.append(("wandb", "init", options))
        return types.SimpleNamespace(
            id=options["id"] or "w1",
            log=lambda scalars, step: ret.append(("wandb", "log", scalars, step)),
            finish=lambda: ret.append(("wandb", "end")),
        )

    def start_run(run_id, run_name):
        ret.append(("mlflow", "init", {"id": run_id, "name": run_name}))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "m1"))

    wandb.init, mlflow.start_run = init, start_run
    mlflow.log_metrics = lambda scalars, step: ret.append(("mlflow", "log", scalars, step))
    mlflow.log_artifact = lambda path: ret.append(("mlflow", "config", path))
    mlflow.end_run = lambda: ret.append(("mlflow", "end"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return ret


def cfg_of(tmp_path, *names, **opts):
    return run_cfg(tmp_path, "NST", KD__WRITERS=names, **opts)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_every_scalar_once_and_one_run(tmp_path, noted, name):
    cfg = cfg_of(tmp_path, name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").write_text("SEED: 7\n")

    class Named(Trainer):
        def after_step(self):
            self.storage.put_scalar("bbox/AP-dog (big)", self.iter, smoothing_hint=False)
            super().after_step()

    train(cfg, trainer_class=Named)
    (_, _, options), *rest = [note for note in noted if note[1] != "config"]
    assert options["name"] == "out" and options["id"] is None and rest[-1] == (name, "end")
    if name == "wandb":
        assert options["config"] == {"SEED": 7} and options["resume"] == "allow"
    else:
        assert ("mlflow", "config", str(tmp_path / "out/config.yaml")) in noted
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    steps = {step: scalars for _, kind, scalars, step in rest[:-1]}
    key = {"wandb": "bbox/AP-dog (big)", "mlflow": "bbox/AP-dog _big_"}[name]
    for line in lines:
        scalars = dict(steps[line.pop("iteration")])
        line[key] = line.pop("bbox/AP-dog (big)")
        assert scalars == line and "loss_nst" in scalars

    noted.clear()
    longer = cfg_of(tmp_path, name, SOLVER__MAX_ITER=8)
    train(longer, resume=True)
    assert noted[0][2]["id"] == {"wandb": "w1", "mlflow": "m1"}[name]


def test_one_that_is_unknown_or_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"KD.WRITERS 'wandb' needs the package wandb: pip install kd_det\[wandb\]"):
        Trainer(cfg_of(tmp_path, "wandb"))
    with pytest.raises(UserError, match="Unknown KD.WRITERS 'wandbb'. Did you mean 'wandb'"):
        Trainer(cfg_of(tmp_path, "wandbb"))
