"""Checkpoints on disk: written whole or not at all, named when damaged, plain students inside."""

import os
import pickle
import re
import resource
import signal
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import nn

from kd_det import build_student
from kd_det.errors import one_line
from kd_det.weights.checkpoint import SafeCheckpointer
from kd_det.weights.files import find_weights
from kd_det.weights.strict import load_strictly
from tests.engine.test_distributed import on_two_ranks
from tests.tiny import distillation_cfg, tiny_cfg


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def checkpointer(tmp_path, model=None, **checkpointables) -> SafeCheckpointer:
    return SafeCheckpointer(model or nn.Linear(2, 2), str(tmp_path), **checkpointables)


def test_it_is_detectron2s_file(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    checkpointer(tmp_path, model, optimizer=optimizer).save("a", iteration=3)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "last_checkpoint"]
    plain = nn.Linear(2, 2)
    rest = DetectionCheckpointer(plain, str(tmp_path)).resume_or_load("", resume=True)
    assert equal(plain.state_dict(), model.state_dict())
    assert rest["iteration"] == 3 and rest["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch):
    saver = checkpointer(tmp_path)
    saver.save("a")
    before = (tmp_path / "a.pth").read_bytes()

    def full_disk(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="No space left"):
            saver.save(name)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "last_checkpoint"]
    assert (tmp_path / "a.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "a.pth"


def test_a_full_disk_is_said_in_one_line(tmp_path):
    """torch's own archive writer turns the file's error into one of its own."""
    saver = checkpointer(tmp_path, nn.Linear(100, 100))
    saver.save("a")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as e:
            saver.save("b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert one_line(e.value) == f"{tmp_path}/b.pth: File too large"
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "last_checkpoint"]


def test_what_lies_under_the_other_name_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "out").mkdir()
    for name in ("a.pth", "a.pth.tmp", "last_checkpoint", "last_checkpoint.tmp"):
        (tmp_path / "out" / name).symlink_to(outside)
    saver = checkpointer(tmp_path / "out")
    saver.save("a")
    assert outside.read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "out")) == ["a.pth", "last_checkpoint"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../a", "sub/a", "/tmp/a"])
def test_nothing_is_written_outside_the_folder(tmp_path, name):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    with pytest.raises(ValueError, match="must not name a folder"):
        checkpointer(tmp_path / "out").save(name)
    assert not list(tmp_path.rglob("*.pth*"))


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named_and_the_one_before_offered(tmp_path, keep):
    saver = checkpointer(tmp_path)
    for name in ("model_0000001", "model_0000003"):
        saver.save(name, iteration=1)
        os.utime(tmp_path / f"{name}.pth", (int(name[-1]), int(name[-1])))
    damaged = tmp_path / "model_0000003.pth"
    size = damaged.stat().st_size
    with damaged.open("r+b") as file:
        file.truncate(keep if isinstance(keep, int) else int(size * keep))
    with pytest.raises(ValueError) as e:
        checkpointer(tmp_path).resume_or_load("", resume=True)
    assert str(damaged) in str(e.value) and "truncated or not a checkpoint" in str(e.value)
    assert "The one before it is model_0000001.pth" in str(e.value)
    # What the message says to do works.
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert checkpointer(tmp_path).resume_or_load("", resume=True)["iteration"] == 1


def test_without_an_earlier_one_there_is_nothing_to_offer(tmp_path):
    saver = checkpointer(tmp_path)
    saver.save("model_0000001")
    (tmp_path / "model_0000001.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(0 bytes\) is truncated.*There is no earlier checkpoint"):
        checkpointer(tmp_path).resume_or_load("", resume=True)
    (tmp_path / "model_0000001.pth").unlink()
    with pytest.raises(ValueError, match="model_0000001.pth, which does not exist. There is no earlier"):
        checkpointer(tmp_path).resume_or_load("", resume=True)


def test_a_last_checkpoint_that_names_none_is_said(tmp_path):
    checkpointer(tmp_path).save("model_0000001")
    for content, message in ((b"\xff\xfe", "last_checkpoint does not hold a name"), (b"", "which does not exist")):
        (tmp_path / "last_checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match=f"{message}.* The one before it is model_0000001.pth"):
            checkpointer(tmp_path).resume_or_load("", resume=True)


class _Store(PathHandler):
    """What iopath offers of s3://, on a local folder: whole files are fetched, and nothing is renamed."""

    def __init__(self, folder):
        self._folder = folder

    def _get_supported_prefixes(self):
        return ["store://"]

    def _file(self, path: str) -> str:
        return os.path.join(self._folder, path.removeprefix("store://"))

    def _get_local_path(self, path, **kwargs):
        return self._file(path)

    def _open(self, path, mode="r", **kwargs):
        return open(self._file(path), mode)

    def _exists(self, path, **kwargs):
        return os.path.exists(self._file(path))

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._file(path))

    def _ls(self, path, **kwargs):
        return os.listdir(self._file(path))


@pytest.fixture
def store(tmp_path):
    handler = _Store(str(tmp_path / "store"))
    (tmp_path / "store" / "run").mkdir(parents=True)
    PathManager.register_handler(handler)
    yield tmp_path / "store" / "run"
    del PathManager._path_handlers["store://"]


def test_a_run_in_a_store_resumes(store):
    """D37"""
    trained = nn.Linear(2, 2)
    saver = SafeCheckpointer(trained, "store://run")
    for name in ("model_0000001", "model_0000003"):
        saver.save(name, iteration=int(name[-1]))
    assert sorted(os.listdir(store)) == ["last_checkpoint", "model_0000001.pth", "model_0000003.pth"]
    model = nn.Linear(2, 2)
    assert SafeCheckpointer(model, "store://run").resume_or_load("", resume=True)["iteration"] == 3
    assert equal(model.state_dict(), trained.state_dict())
    (store / "model_0000003.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(0 bytes\) is truncated.* The one before it is model_0000001.pth"):
        SafeCheckpointer(model, "store://run").resume_or_load("", resume=True)


def resume_from(folders, weights):
    """The error's text on this rank, whose machine sees a folder and a file of its own."""
    try:
        SafeCheckpointer(nn.Linear(2, 2), folders[comm.get_rank()]).resume_or_load(weights[comm.get_rank()])
    except OSError as e:
        return str(e)


@pytest.mark.parametrize("missing", ["checkpoint", "weights"])
def test_a_file_that_one_machine_lacks_is_an_error_on_all(tmp_path, missing):
    """D39: the other ranks waited for the one that raised."""
    (tmp_path / "w").mkdir()
    checkpointer(tmp_path).save("model_0000001")
    if missing == "checkpoint":
        folders, weights, message = (str(tmp_path), str(tmp_path / "w")), ("", ""), "not on the machines of .* .1."
    else:
        folders, weights, message = [str(tmp_path / "w")] * 2, (str(tmp_path / "model_0000001.pth"), "no.pth"), "no.pth"
    for error in on_two_ranks(tmp_path, resume_from, folders, weights):
        assert re.search(message, error)


# The formats that Detectron2 reads.


def to_numpy(state: dict) -> dict:
    return {key: value.numpy() for key, value in state.items()}


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_zoo_pickle_loads(tmp_path, protocol):
    torch.manual_seed(0)
    trained, model = build_model(tiny_cfg()), build_model(tiny_cfg())
    content = {"model": to_numpy(trained.state_dict()), "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    load_strictly(model, str(tmp_path / "zoo.pkl"), who="student")
    assert equal(model.state_dict(), trained.state_dict())


def test_a_backbone_pickle_loads_by_matching_names(tmp_path):
    """As torchvision's converted weights: no prefix, matched by their endings."""
    trained = build_model(tiny_cfg()).backbone.bottom_up
    content = {"model": OrderedDict(to_numpy(trained.state_dict())), "__author__": "torchvision"}
    content["matching_heuristics"] = True
    (tmp_path / "r18.pkl").write_bytes(pickle.dumps(content))
    model = build_model(tiny_cfg())
    checkpointer(tmp_path, model).resume_or_load(str(tmp_path / "r18.pkl"), resume=False)
    assert equal(model.backbone.bottom_up.state_dict(), trained.state_dict())


def test_a_caffe2_pickle_loads_by_its_blobs(tmp_path):
    model = build_model(tiny_cfg())
    shape = model.backbone.bottom_up.stem.conv1.weight.shape
    weight = np.arange(shape.numel(), dtype=np.float32).reshape(shape)
    blobs = {"blobs": {"conv1_w": weight, "conv1_w_momentum": weight * 0}}
    (tmp_path / "c2.pkl").write_bytes(pickle.dumps(blobs, protocol=2))
    checkpointer(tmp_path, model).resume_or_load(str(tmp_path / "c2.pkl"), resume=False)
    stem = model.backbone.bottom_up.stem.conv1.weight
    torch.testing.assert_close(stem, torch.from_numpy(weight), rtol=0, atol=0)


def test_a_pycls_file_loads(tmp_path):
    trained = build_model(tiny_cfg()).backbone.bottom_up
    torch.save({"model_state": trained.state_dict()}, tmp_path / "a.pyth")
    model = build_model(tiny_cfg())
    checkpointer(tmp_path, model).resume_or_load(str(tmp_path / "a.pyth"), resume=False)
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, trained.stem.conv1.weight)


def test_bare_and_ddp_state_dicts_load(tmp_path):
    trained = nn.Linear(2, 2)
    for state in (trained.state_dict(), {f"module.{k}": v for k, v in trained.state_dict().items()}):
        torch.save(state, tmp_path / "bare.pth")
        model = nn.Linear(2, 2)
        checkpointer(tmp_path, model).resume_or_load(str(tmp_path / "bare.pth"), resume=False)
        assert equal(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pth", b"", "(0 bytes) is truncated or not a checkpoint"),
        ("a.pth", b"<html>404</html>", "is truncated or not a checkpoint"),
        ("a.pkl", b"", "is truncated or not a checkpoint"),
        ("a.pkl", b"version https://git-lfs.github.com/spec/v1", "is truncated or not a checkpoint"),
        ("a.pkl", pickle.dumps([1, 2]), "is truncated or not a checkpoint"),
        ("a.pkl", pickle.dumps({"model": {"weight": "text"}, "__author__": "x"}), "weight is a str, expected a dense"),
        ("a.pyth", b"PK\x03\x04", "is truncated or not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        load_strictly(nn.Linear(2, 2), str(tmp_path / name), who="teacher 'x'")
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("path", ["", "nowhere.pth", "detectron2://nowhere.pkl", "s4://bucket/a.pth"])
def test_weights_that_are_not_there(tmp_path, monkeypatch, path):
    def unreachable(*args, **kwargs):
        raise OSError("the network is unreachable")

    monkeypatch.setattr("iopath.common.file_io.download", unreachable)
    with pytest.raises(FileNotFoundError, match="The weights of the student"):
        find_weights(path, who="student")


def test_a_checkpoint_is_the_plain_students_and_no_larger(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST", "SoftTarget")
    model = build_model(cfg)
    plain = build_student(cfg)
    plain.load_state_dict(model.state_dict(), strict=True)
    for name, network in (("distilled", model), ("plain", plain)):
        checkpointer(tmp_path, network).save(name)
    sizes = [(tmp_path / f"{name}.pth").stat().st_size for name in ("distilled", "plain")]
    assert abs(sizes[0] - sizes[1]) < 2000  # names in the metadata, no weight
    teacher = sum(p.numel() for p in model.teacher.parameters()) * 4
    assert teacher > 20_000
