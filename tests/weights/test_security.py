"""Files from strangers: none of them runs code, fills the disk or leads out of its folder."""

import builtins
import copy
import os
import pickle
import pickletools
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from torch import nn

from kd_det import build_teacher
from kd_det.compat import model_zoo
from kd_det.config_file import merge_config_file
from kd_det.weights.checkpoint import SafeCheckpointer
from kd_det.weights.strict import load_strictly
from tests.tiny import distillation_cfg


class Run:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(marker) -> dict:
    command = f"touch {marker}"
    return {
        "system": Run(os.system, command),
        "popen": Run(subprocess.Popen, ["touch", str(marker)]),
        "eval": Run(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "exec": Run(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "open": Run(builtins.open, str(marker), "w"),
        "getattr": Run(builtins.getattr, dict, "update"),
        "nested": np.array([Run(os.system, command)], dtype=object),
        "torch.load": Run(torch.load, str(marker)),
        "numpy": Run(np.load, str(marker)),
    }


@pytest.mark.parametrize("attack", sorted(attacks("x")))
@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w.pyth"])
def test_a_file_that_would_run_a_command_is_refused(tmp_path, attack, name):
    marker = tmp_path / "owned"
    content = {"model": {"weight": attacks(marker)[attack]}, "__author__": "me"}
    if name == "w.pyth":
        content["model_state"] = content["model"]
    path = str(tmp_path / name)
    if name == "w.pkl":
        with open(path, "wb") as file:
            pickle.dump(content, file)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as e:
        load_strictly(nn.Linear(2, 2), path, who="teacher")
    assert f"{path} is refused: it holds " in str(e.value)
    assert "could run any command" in str(e.value) and "\n" not in str(e.value)
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path):
    """Otherwise the tests above show nothing."""
    marker = tmp_path / "owned"
    with open(tmp_path / "w.pkl", "wb") as file:
        pickle.dump({"model": {}, "__author__": attacks(marker)["system"]}, file)
    # A user's own script with Detectron2's checkpointer stays as it is.
    DetectionCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / "w.pkl"))
    assert marker.exists()


def test_every_pickled_name_is_refused_but_numpys_own(tmp_path):
    """Names that would pass a filter by prefix: 'numpy.' leads to os, 'collections.' to eval."""
    for module, name in [("numpy", "os.system"), ("numpy.core.multiarray", "fromfile"), ("collections", "namedtuple")]:
        path = tmp_path / "w.pkl"
        path.write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)])
                         + name.encode() + b"\x93.")  # fmt: skip
        pickletools.dis(path.read_bytes(), out=open(os.devnull, "w"))
        with pytest.raises(ValueError, match=f"it holds {module}.{name}"):
            load_strictly(nn.Linear(2, 2), str(path), who="teacher")


def test_the_teachers_and_the_initial_weights_and_resuming_are_covered(tmp_path):
    marker = tmp_path / "owned"
    cfg = distillation_cfg(tmp_path, "NST")
    torch.save({"model": attacks(marker)["system"]}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="teacher.pth is refused: it holds posix.system"):
        build_teacher(cfg)
    trainer = SafeCheckpointer(nn.Linear(2, 2), str(tmp_path))
    with pytest.raises(ValueError, match="is refused: it holds posix.system"):
        trainer.resume_or_load(str(tmp_path / "teacher.pth"), resume=False)
    (tmp_path / "last_checkpoint").write_text("teacher.pth")
    with pytest.raises(ValueError, match="is refused: it holds posix.system"):
        trainer.resume_or_load("", resume=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {}']",
        'MODEL: {{WEIGHTS: !!python/object/apply:eval [\'__import__("os").system("touch {}")\']}}',
        'MODEL: {{WEIGHTS: !!python/object/apply:eval [\'open("{}", "w")\']}}',
        "MODEL: {{WEIGHTS: !!python/object/new:os.system ['touch {}']}}",
        "MODEL: {{WEIGHTS: !!python/name:os.system }}",
        "SEED: !!python/object/apply:eval ['9**9**9**9']",
        "SEED: !!python/object/apply:eval ['[x for x in range(10**9)]']",
        "SEED: !!python/object/apply:eval ['[y for x in range(9999) for y in range(x*9999)]']",
    ],
)
@pytest.mark.parametrize("as_base", [False, True])
def test_a_config_that_would_run_code_is_refused(tmp_path, text, as_base):
    marker = tmp_path / "owned"
    path = tmp_path / "a.yaml"
    path.write_text(text.format(marker))
    if as_base:
        path = tmp_path / "b.yaml"
        path.write_text("_BASE_: a.yaml")
    with pytest.raises(ValueError, match="a.yaml is refused"):
        merge_config_file(get_cfg(), str(path))
    assert not marker.exists()


def test_expressions_are_read_in_the_model_zoos_own_files_and_copies_of_them(tmp_path):
    zoo = Path(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    shutil.copy(zoo.parents[1] / "Base-RetinaNet.yaml", tmp_path)
    for base in (zoo, "Base-RetinaNet.yaml"):
        (tmp_path / "mine.yaml").write_text(f"_BASE_: {base}\nSEED: 3")
        cfg = get_cfg()
        merge_config_file(cfg, str(tmp_path / "mine.yaml"))
        assert cfg.SEED == 3 and cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]
    with open(tmp_path / "Base-RetinaNet.yaml", "a") as file:
        file.write("# not the zoo's any more\n")
    with pytest.raises(ValueError, match="Base-RetinaNet.yaml is refused"):
        merge_config_file(get_cfg(), str(tmp_path / "mine.yaml"))


def test_absurd_sizes_fail_cleanly(tmp_path):
    """A pickle and an archive that announce terabytes."""
    (tmp_path / "huge.pkl").write_bytes(b"\x80\x04\x8e" + (1 << 45).to_bytes(8, "little") + b"x.")
    torch.save({"model": {"weight": torch.zeros(2, 2)}}, tmp_path / "small.pth")
    with zipfile.ZipFile(tmp_path / "small.pth") as old, zipfile.ZipFile(tmp_path / "huge.pth", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                data = data.replace(b"K\x02K\x02\x86", b"\x8a\x06\x00\x00\x00\x00\x00\x01K\x02\x86")  # (2^40, 2)
            new.writestr(item.filename, data)
    for name in ("huge.pkl", "huge.pth"):
        with pytest.raises(ValueError, match="is truncated or not a checkpoint"):
            load_strictly(nn.Linear(2, 2), str(tmp_path / name), who="teacher")


def with_array(weight):
    return pickle.dumps({"model": {"weight": weight}, "__author__": "me"})


def numbering(index: int) -> bytes:
    """Python 3.11 makes room for as many objects as the number of one says: 9 bytes that fill 64 GB."""
    return b"\x80\x04Nr" + index.to_bytes(4, "little") + b"."


BYTES = {
    "numbered.pkl": (numbering(2**32 - 1), "it numbers an object 4294967295"),
    "array.pkl": (b"\x80\x04cnumpy\nndarray\n(J\x00\x00\x00\x70J\x00\x00\x00\x01\x86tR.", "Unable to allocate"),
    "objects.pkl": (with_array(np.array([None, [1]], dtype=object)), "weight is a ndarray, expected a dense tensor"),
    "words.pkl": (with_array(np.array(["a"])), "weight is a ndarray, expected a dense tensor"),
    "fields.pkl": (with_array(np.zeros(2, dtype=[("a", "f4")])), "weight is a ndarray, expected a dense tensor"),
    "number.pkl": (pickle.dumps({"model": 5, "__author__": "me"}), "its weights are a int"),
    "named.pkl": (pickle.dumps({"model": {3: np.zeros(2)}, "__author__": "me"}), "a weight is named 3"),
    "header.safetensors": ((1 << 60).to_bytes(8, "little") + b"{}", ".*header too large"),
}
CONTENTS = {
    "a number": (5, "its weights are a int"),
    "a list": ([torch.zeros(2)], "its weights are a list"),
    "a number as a name": ({3: torch.zeros(2)}, "a weight is named 3"),
    "a tensor of nothing": ({"weight": torch.zeros(2, 2, device="meta")}, "weight is a Tensor, expected a dense"),
    "a sparse tensor": ({"weight": torch.eye(2).to_sparse()}, "weight is a Tensor, expected a dense"),
    "a nested dict": ({"weight": {"weight": torch.zeros(2)}}, "weight is a dict, expected a dense tensor"),
}


@pytest.mark.parametrize("name", BYTES)
def test_odd_bytes_are_refused_in_one_line(tmp_path, name):
    content, message = BYTES[name]
    (tmp_path / name).write_bytes(content)
    check_refused(tmp_path / name, message)


@pytest.mark.parametrize("kind", CONTENTS)
def test_weights_that_are_no_dense_tensors_are_refused_in_one_line(tmp_path, kind):
    content, message = CONTENTS[kind]
    torch.save({"model": content}, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", message)


def check_refused(path, message):
    for load in (lambda: load_strictly(nn.Linear(2, 2), str(path), who="teacher"), lambda: resume_or_load(path)):
        with pytest.raises(ValueError, match=f"{path.name} .* is truncated or not a checkpoint: {message}") as e:
            load()
        assert "\n" not in str(e.value)


def resume_or_load(path):
    SafeCheckpointer(nn.Linear(2, 2), save_to_disk=False).resume_or_load(str(path), resume=False)


@pytest.mark.parametrize("how", ["compressed", "overlapping"])
def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path, how):
    torch.save({"model": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}}, tmp_path / "small.pth")
    with zipfile.ZipFile(tmp_path / "small.pth") as old, zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("/data/0") and how == "compressed":
                new.writestr(item.filename, bytes(1 << 24), compress_type=zipfile.ZIP_DEFLATED)
            else:
                new.writestr(item.filename, data)
        if how == "overlapping":
            largest = max(new.infolist(), key=lambda item: item.file_size)
            for i in range(20):
                again = copy.copy(largest)
                again.filename = f"again{i}"
                new.filelist.append(again)
    check_refused(tmp_path / "w.pth", "it unpacks to ")
