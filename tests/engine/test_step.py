"""A step of training on a device: it waits once, and takes losses as they come."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import nn

from kd_det.engine.step import TrainStep
from tests.pretend_accelerator import Accelerator, on_device, place
from tests.tiny import batch, distillation_cfg


def waits_of_the_engine(accelerator) -> list[str]:
    """Without those of Detectron2's backward, which have no line of their own."""
    waits = [place.split(":")[0] for place in accelerator.waits.elements() if "engine/step.py" in place]
    return [place for place in waits if not place.startswith("index_put")]


@pytest.mark.parametrize("losses", [("NST",), ("NST", "Hint", "AttentionTransfer")])
def test_the_host_waits_once_a_step(tmp_path, storage, losses):
    model = build_model(distillation_cfg(tmp_path, *losses)).train()
    with Accelerator() as accelerator:
        place(model)
        place(model.teacher)
        step = TrainStep(model, [batch()] * 3, torch.optim.SGD(model.parameters(), lr=0.0), dump_dir=str(tmp_path))
        step.iter = 0
        step.run_step()
        accelerator.reset()
        step.run_step()
    assert waits_of_the_engine(accelerator) == ["copy to the host, kd_det/engine/step.py"]
    assert storage.latest()["total_loss"][0] == pytest.approx(
        sum(value for key, (value, _) in storage.latest().items() if key.startswith("loss_")), rel=1e-5
    )


class Lossy(nn.Module):
    """A model one of whose losses is a scalar on the CPU, as a loss that is off may be, and one in half precision."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return {"loss": (self.weight * 2).sum(), "loss_off": torch.zeros(()), "loss_half": self.weight.half().sum()}


def test_losses_of_several_devices_and_precisions(tmp_path, storage):  # D2: stacked without a look at their devices
    model = Lossy()
    with Accelerator():
        model.weight = nn.Parameter(on_device(model.weight))
        step = TrainStep(model, [None], torch.optim.SGD(model.parameters(), lr=1.0), dump_dir=str(tmp_path))
        step.iter = 0
        step.run_step()
        weight = model.weight.detach().cpu()
    assert weight.tolist() == [-2.0] * 3  # 1 - (2 + 1)
    assert {key: value for key, (value, _) in storage.latest().items() if key != "data_time"} == {
        "loss": 6.0,
        "loss_off": 0.0,
        "loss_half": 3.0,
        "total_loss": 9.0,
    }


class Store(PathHandler):
    """Remote storage, kept in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["store://"]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(path.replace("store:/", str(self.folder)), mode)

    def _mkdirs(self, path, **kwargs):
        self.folder.joinpath(path.removeprefix("store://")).mkdir(parents=True, exist_ok=True)


def test_a_batch_is_dumped_to_remote_storage(tmp_path, storage):  # D37: a folder named "s3:" was made
    PathManager.register_handler(Store(tmp_path), allow_override=True)
    model = Lossy()
    model.weight.data.fill_(float("nan"))
    step = TrainStep(
        model, [[{"file_name": "a.png"}]], torch.optim.SGD(model.parameters(), lr=1.0), dump_dir="store://d"
    )
    step.iter = 3
    with pytest.raises(
        FloatingPointError, match="iteration 3: .*loss is nan.*a.png.*store://d/iter_0000003_rank_0.pth"
    ):
        step.run_step()
    dump = torch.load(tmp_path / "d" / "iter_0000003_rank_0.pth", weights_only=True)
    assert dump["losses"]["loss"].isnan() and dump["batch"] == [{"file_name": "a.png"}]


def test_a_state_of_other_parameters_is_refused_also_without_the_trainer(tmp_path):  # D13, of a LazyConfig's run
    def step_of(classes):
        model = nn.Linear(3, classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return TrainStep(model, [], optimizer, dump_dir=str(tmp_path))

    saved = step_of(2).optimizer.state_dict()
    with pytest.raises(ValueError, match=r"weight was \(2, 3\), is \(4, 3\)"):
        step_of(4).load_state_dict({"iteration": 1, "hooks": {}, "optimizer": saved})
