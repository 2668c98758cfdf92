#!/usr/bin/env python
"""
Install Detectron2 v0.6 into the Python that runs this script, where Detectron2 does not import yet.

Detectron2 has no release on PyPI under its own name. The PyPI project ``pb1-detectron2`` 0.6 holds the Python files
and the model-zoo configs of tag v0.6, but not the C++ sources, so a plain ``pip install`` of it fails at the compile
step. This script downloads that archive with pip, which checks its sha256, applies ``FIXES`` for current packages, and
installs it as a pure-Python distribution named ``detectron2``. An installed Detectron2 is never touched: build it from
its repository where you need its compiled operators (deformable convolution in training, rotated boxes).

    python tools/install_detectron2.py
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PROJECT, VERSION = "pb1-detectron2", "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# What Detectron2 imports.
MODULES = "torch torchvision fvcore iopath pycocotools cv2 matplotlib PIL tabulate termcolor omegaconf"

# Replaces the setup.py of v0.6, with the requirements that hold today: it runs without black, pydot and future.
SETUP = """\
from setuptools import find_packages, setup

projects = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
setup(
    name="detectron2",
    version="0.6",
    packages=[*find_packages(include=["detectron2", "detectron2.*"]), *projects],
    package_dir=projects,
    package_data={"detectron2.model_zoo": ["configs/**/*"]},
    install_requires=[
        "Pillow>=7.1", "cloudpickle", "fvcore>=0.1.5,<0.1.6", "hydra-core>=1.1", "iopath>=0.1.7,<0.1.10", "matplotlib",
        "omegaconf>=2.1", "pycocotools>=2.0.2", "tabulate", "tensorboard", "termcolor>=1.1", "tqdm>4.29.0",
        "yacs>=0.1.8",
    ],
)
"""

NO_EXTENSION = '''\
"""Stands in for the compiled detectron2._C where Detectron2 was installed without it."""


class _MissingExtension:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"detectron2._C.{name} is missing: this Detectron2 was installed without its compiled operators. "
            "Build Detectron2 from its repository to use them."
        )


_C = _MissingExtension()
'''
NO_C = "imports the compiled detectron2._C at the top; fails at the first use instead"
IMPORT_C = "from detectron2 import _C\n"
TRY_IMPORT_C = (
    "try:\n    from detectron2 import _C\nexcept ImportError:\n    from detectron2.layers._no_extension import _C\n"
)
NO_FAST_EVAL = "fast_eval_api needs detectron2._C; falls back to pycocotools, which gives the same numbers"
FAST_EVAL = "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
TRY_FAST_EVAL = f"try:\n    {FAST_EVAL}except ImportError:\n    COCOeval_opt = COCOeval\n"
NUMPY = "NumPy 1.24 removed the aliases np.bool, np.int, np.float and np.str"
SETUPTOOLS = "setuptools 82 removed pkg_resources"

# (file in detectron2/, why, old text, new text). Every occurrence is replaced; without an old text, the file is new.
FIXES = (
    ("layers/_no_extension.py", "names the compiled operator that is missing", "", NO_EXTENSION),
    ("layers/deform_conv.py", NO_C, IMPORT_C, TRY_IMPORT_C),
    ("layers/rotated_boxes.py", NO_C, IMPORT_C, TRY_IMPORT_C),
    ("layers/roi_align_rotated.py", NO_C, IMPORT_C, TRY_IMPORT_C),
    ("evaluation/coco_evaluation.py", NO_FAST_EVAL, FAST_EVAL, TRY_FAST_EVAL),
    ("data/transforms/transform.py", "Pillow 10 removed this alias of BILINEAR", "Image.LINEAR", "Image.BILINEAR"),
    (
        "layers/mask_ops.py",
        "NumPy 2 made copy=False an error where a copy is needed",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
    ),
    ("data/build.py", NUMPY, "np.int)", "int)"),
    ("data/datasets/pascal_voc.py", NUMPY, "np.str)", "str)"),
    ("evaluation/pascal_voc_evaluation.py", NUMPY, "np.bool)", "bool)"),
    ("evaluation/sem_seg_evaluation.py", NUMPY, "np.int)", "int)"),
    ("evaluation/sem_seg_evaluation.py", NUMPY, "np.float)", "float)"),
    ("structures/masks.py", NUMPY, "np.bool)", "bool)"),
    ("utils/visualizer.py", NUMPY, "np.bool)", "bool)"),
    ("utils/video_visualizer.py", NUMPY, "np.bool)", "bool)"),
    (
        "modeling/meta_arch/retinanet.py",
        "PyTorch refuses the trial GroupNorm of one channel in 32 groups: FCOS could not be built",
        "get_norm(norm, 1)",
        "get_norm(norm, 32)",
    ),
    (
        "export/__init__.py",
        "PyTorch 2.4 removed caffe2; tracing and scripting, which utils/analysis.py imports, do without",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:\n    pass\n",
    ),
    ("model_zoo/model_zoo.py", SETUPTOOLS, "import pkg_resources\n", ""),
    (
        "model_zoo/model_zoo.py",
        SETUPTOOLS,
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
    ),
)

# Before pip downloads a source archive it runs the archive's setup.py for metadata; v0.6's imports torch and declares a
# dependency that pip refuses. This build backend takes setuptools' place in that one run, so that nothing is executed.
BACKEND = """\
import os, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    os.mkdir(os.path.join(folder, "{stem}.dist-info"))
    with open(os.path.join(folder, "{stem}.dist-info", "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: {project}\\nVersion: {version}\\n")
    return "{stem}.dist-info"

__legacy__ = sys.modules[__name__]
"""


class InstallError(Exception):
    """A reason not to install, in one line."""


def pip(*arguments, **kwargs):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def download(folder, *, project=PROJECT, version=VERSION, sha256=SHA256):
    """Download the source archive into ``folder`` with pip, which checks its hash, and return its path."""
    backend, archives, requirements = (folder / name for name in ("backend/setuptools", "archives", "requirements.txt"))
    backend.mkdir(parents=True)
    stem = f"{project.replace('-', '_')}-{version}"
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND.format(stem=stem, project=project, version=version))
    requirements.write_text(f"{project}=={version} --hash=sha256:{sha256}\n")
    path = os.pathsep.join(p for p in (str(backend.parent), os.environ.get("PYTHONPATH")) if p)
    # Older pips run setup.py themselves without PIP_USE_PEP517.
    result = pip(
        *("download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", project),
        *("--require-hashes", "-r", requirements, "-d", archives),
        env={**os.environ, "PYTHONPATH": path, "PIP_USE_PEP517": "1"},
    )
    if "DO NOT MATCH THE HASHES" in result.stdout:
        got = [line.split()[-1] for line in result.stdout.splitlines() if line.split()[:1] == ["Got"]]
        raise InstallError(
            f"{project} {version} from the package index has sha256 {' '.join(got)}, expected {sha256}. "
            "It was not opened and nothing was installed."
        )
    if result.returncode != 0:
        raise InstallError(f"pip could not download {project}=={version}:\n{result.stdout.strip()}")
    return next(archives.iterdir())


def unpack(archive, folder):
    """Unpack the archive into ``folder``, no file outside of it, and return the one folder inside."""
    with tarfile.open(archive) as tar:
        try:
            tar.extractall(folder, filter="data")
        except tarfile.FilterError as e:
            raise InstallError(f"{archive.name} was not unpacked: {e}") from e
    return next(folder.iterdir())


def apply_fixes(package, fixes=FIXES):
    """Apply ``fixes`` to the files of ``package``, all or none, and note them at the end of each changed file."""
    texts, notes = {}, {}
    for file, why, old, new in fixes:
        text = texts.get(file) or ((package / file).read_text(encoding="utf-8") if old else "")
        if old not in text:
            raise InstallError(f"{file}: the text to be replaced is not there: {old!r} ({why}).")
        texts[file] = text.replace(old, new) if old else new
        notes.setdefault(file, {})[f"# Changed by kd_det's tools/install_detectron2.py: {why}.\n"] = None
    for file, text in texts.items():
        (package / file).write_text(f"{text}\n\n{''.join(notes[file])}", encoding="utf-8")


def build_wheel(source, folder):
    """Build the Python files and configs under ``source`` into the wheel of ``detectron2``, and return its path."""
    (source / "setup.py").write_text(SETUP)
    result = pip("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    if result.returncode != 0:
        raise InstallError(f"pip could not build the wheel:\n{result.stdout.strip()}")
    return next(folder.glob("detectron2-*.whl"))


def installed():
    """Version and place of the Detectron2 that is there; None: there is none. One that does not import is an error."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    try:
        module = importlib.import_module("detectron2")
    except Exception as e:
        raise InstallError(
            f"Detectron2 is there ({spec.origin}) but does not import: {type(e).__name__}: {e}. "
            "Repair or uninstall it first; it is not replaced."
        ) from e
    return f"{module.__version__} ({Path(spec.origin).parent})"


def main():
    found = installed()
    if found:
        print(f"Detectron2 {found} is there already: left as it is.")
        return
    missing = [name for name in MODULES.split() if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallError(
            f"Detectron2 needs {', '.join(missing)}, not found in {sys.prefix}: "
            f"run {sys.executable} -m pip install -r requirements.txt first."
        )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"Detectron2 {VERSION}: downloading {PROJECT} {VERSION}", flush=True)
        source = unpack(download(folder), folder / "source")
        apply_fixes(source / "detectron2")
        files = len({file for file, *_ in FIXES})
        print(f"Detectron2 {VERSION}: sha256 as expected, {files} files fixed, installing", flush=True)
        result = pip("install", "--quiet", "--no-deps", "--no-index", build_wheel(source, folder))
        if result.returncode != 0:
            raise InstallError(f"pip could not install the wheel:\n{result.stdout.strip()}")
    print(f"Detectron2 {VERSION}: installed in {sys.prefix}, without compiled operators.")


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"install_detectron2: {error}")
