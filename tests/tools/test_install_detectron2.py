"""The installer on archives that the tests write; pip finds them in a folder instead of on an index."""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"
spec = importlib.util.spec_from_file_location("install_detectron2", TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip searches a folder instead of an index: one archive, whose setup.py leaves a trace if it runs."""
    folder = tmp_path / "index"
    folder.mkdir()
    trace = tmp_path / "executed"
    files = {"toy-d2-0.6/setup.py": f"open({str(trace)!r}, 'w')\n", "toy-d2-0.6/PKG-INFO": "Name: toy-d2\n"}
    sha256 = write_archive(folder / "toy-d2-0.6.tar.gz", files)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return sha256, trace


def test_download_checks_and_executes_nothing(index, tmp_path):
    sha256, trace = index
    archive = tool.download(tmp_path, project="toy-d2", version="0.6", sha256=sha256)
    assert archive.name == "toy-d2-0.6.tar.gz"
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256
    assert not trace.exists()


def test_wrong_hash_stops(index, tmp_path):
    sha256, trace = index
    with pytest.raises(tool.InstallError, match=f"has sha256 {sha256}, expected {'0' * 64}"):
        tool.download(tmp_path, project="toy-d2", version="0.6", sha256="0" * 64)
    assert not trace.exists()
    assert not list(tmp_path.glob("archives/*"))


def test_missing_archive_stops(index, tmp_path):
    with pytest.raises(tool.InstallError, match="could not download nowhere==0.6"):
        tool.download(tmp_path, project="nowhere", version="0.6", sha256="0" * 64)


def test_unpack_refuses_files_outside(tmp_path):
    archive = tmp_path / "bad.tar.gz"
    write_archive(archive, {"../escaped.py": "x"})
    (tmp_path / "inside").mkdir()
    with pytest.raises(tool.InstallError, match="escaped.py"):
        tool.unpack(archive, tmp_path / "inside")
    assert not (tmp_path / "escaped.py").exists()


def test_fixes_replace_add_and_note(tmp_path):
    (tmp_path / "a.py").write_text("x = old(1)\ny = old(2)\n")
    fixes = [("a.py", "old is gone", "old(", "new("), ("a.py", "three now", "2", "3"), ("b.py", "added", "", "z = 1\n")]
    tool.apply_fixes(tmp_path, fixes)
    lines = (tmp_path / "a.py").read_text().splitlines()
    assert lines[:2] == ["x = new(1)", "y = new(3)"]
    notes = [line.rsplit(": ", 1)[1] for line in lines if line.startswith("#")]
    assert notes == ["old is gone.", "three now."]
    assert (tmp_path / "b.py").read_text().startswith("z = 1\n")


def test_a_fix_that_finds_nothing_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(tool.InstallError, match="a.py: the text to be replaced is not there: 'absent'"):
        tool.apply_fixes(tmp_path, [("a.py", "fine", "1", "2"), ("a.py", "gone", "absent", "")])
    assert (tmp_path / "a.py").read_text() == "x = 1\n"


def test_wheel_installs_as_detectron2(tmp_path):
    source = tmp_path / "source"
    projects = ("PointRend/point_rend", "DeepLab/deeplab", "Panoptic-DeepLab/panoptic_deeplab")
    for name in ("detectron2", "detectron2/model_zoo", *(f"projects/{project}" for project in projects)):
        (source / name).mkdir(parents=True)
        (source / name / "__init__.py").write_text("__version__ = '0.6'\n")
    (source / "detectron2" / "model_zoo" / "configs" / "Misc").mkdir(parents=True)
    (source / "detectron2" / "model_zoo" / "configs" / "Misc" / "zoo.yaml").write_text("A: 1\n")
    (source / "LICENSE").write_text("licence\n")

    wheel = tool.build_wheel(source, tmp_path)
    with zipfile.ZipFile(wheel) as f:
        assert "detectron2/model_zoo/configs/Misc/zoo.yaml" in f.namelist()
        assert "detectron2/projects/point_rend/__init__.py" in f.namelist()
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(pip, check=True)
    code = "from importlib.metadata import version; print(version('detectron2'))"
    out = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, text=True)
    assert out.strip() == "0.6"


def test_no_extension_names_what_is_missing():
    namespace = {}
    exec(tool.NO_EXTENSION, namespace)
    with pytest.raises(ImportError, match="detectron2._C.box_iou_rotated is missing"):
        namespace["_C"].box_iou_rotated()
    assert not hasattr(namespace["_C"], "__deepcopy__")


def test_an_installed_detectron2_is_left_alone(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9.9'\n")
    result = subprocess.run([sys.executable, TOOL], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == f"Detectron2 9.9 ({package}) is there already: left as it is.\n"


def test_a_broken_detectron2_is_not_replaced(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module\n")
    result = subprocess.run([sys.executable, TOOL], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("install_detectron2: Detectron2 is there")
    assert "No module named 'no_such_module'" in result.stderr
    assert [p.name for p in package.iterdir() if p.suffix == ".py"] == ["__init__.py"]
