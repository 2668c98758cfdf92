#!/usr/bin/env python
"""
Install Detectron2 v0.6 into the Python that runs this script, where Detectron2 does not import yet.

Detectron2 has no release on PyPI under its own name. The PyPI project ``pb1-detectron2`` 0.6 holds the Python
files and the model-zoo configs of tag v0.6, but not the C++ sources, so that installing it directly fails at
the compile step. This script downloads that one archive with pip (and pip's own index settings), lets pip
check its sha256, mends the places listed in ``MENDS``, and installs the result as a pure-Python distribution
named ``detectron2``.

An installed Detectron2 always wins: if ``import detectron2`` works, nothing is touched. Build Detectron2 from
its repository where you need its compiled operators (deformable convolution in training, rotated boxes).

    python tools/install_detectron2.py
"""

import base64
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

PROJECT, VERSION = "pb1-detectron2", "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# What Detectron2 imports, and what it declares, without black, pydot and future: it runs without them.
MODULES = "torch torchvision fvcore iopath pycocotools cv2 matplotlib PIL tabulate termcolor omegaconf"
REQUIRES = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7,<0.1.10",
    "matplotlib",
    "omegaconf>=2.1",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

# setup.py of v0.6 installs these beside the package.
PROJECTS = {
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}


class InstallError(Exception):
    """A reason not to install, in one line."""


class Mend(NamedTuple):
    """One mended file: every occurrence of ``old`` becomes ``new``; an empty ``old`` adds the file."""

    file: str
    why: str
    old: str
    new: str


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
IMPORT_C = "from detectron2 import _C\n"
TRY_IMPORT_C = """\
try:
    from detectron2 import _C
except ImportError:
    from detectron2.layers._no_extension import _C
"""
NO_C = "imports the compiled detectron2._C at the top; fail at the first use instead"
NUMPY = "NumPy 1.24 removed the aliases np.bool, np.int, np.float and np.str"

MENDS = (
    Mend("detectron2/layers/_no_extension.py", "says which compiled operator is missing", "", NO_EXTENSION),
    Mend("detectron2/layers/deform_conv.py", NO_C, IMPORT_C, TRY_IMPORT_C),
    Mend("detectron2/layers/rotated_boxes.py", NO_C, IMPORT_C, TRY_IMPORT_C),
    Mend("detectron2/layers/roi_align_rotated.py", NO_C, IMPORT_C, TRY_IMPORT_C),
    Mend(
        "detectron2/evaluation/coco_evaluation.py",
        "fast_eval_api needs detectron2._C; fall back to pycocotools, which gives the same numbers",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n"
        "    COCOeval_opt = COCOeval\n",
    ),
    Mend(
        "detectron2/data/transforms/transform.py",
        "Pillow 10 removed Image.LINEAR, which was BILINEAR",
        "Image.LINEAR",
        "Image.BILINEAR",
    ),
    Mend(
        "detectron2/layers/mask_ops.py",
        "NumPy 2 made copy=False an error where a copy is needed",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
    ),
    Mend("detectron2/data/build.py", NUMPY, "np.int)", "int)"),
    Mend("detectron2/data/datasets/pascal_voc.py", NUMPY, "np.str)", "str)"),
    Mend("detectron2/evaluation/pascal_voc_evaluation.py", NUMPY, "np.bool)", "bool)"),
    Mend("detectron2/evaluation/sem_seg_evaluation.py", NUMPY, "np.int)", "int)"),
    Mend("detectron2/evaluation/sem_seg_evaluation.py", NUMPY, "np.float)", "float)"),
    Mend("detectron2/structures/masks.py", NUMPY, "np.bool)", "bool)"),
    Mend("detectron2/utils/visualizer.py", NUMPY, "np.bool)", "bool)"),
    Mend("detectron2/utils/video_visualizer.py", NUMPY, "np.bool)", "bool)"),
    Mend(
        "detectron2/modeling/meta_arch/retinanet.py",
        "PyTorch now refuses the trial GroupNorm of one channel in 32 groups: FCOS could not be built",
        "get_norm(norm, 1)",
        "get_norm(norm, 32)",
    ),
    Mend(
        "detectron2/export/__init__.py",
        "PyTorch 2.4 removed caffe2; tracing and scripting, which utils/analysis.py imports, do without",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:\n    pass\n",
    ),
    Mend(
        "detectron2/model_zoo/model_zoo.py",
        "setuptools 82 removed pkg_resources",
        "import pkg_resources\n",
        "",
    ),
    Mend(
        "detectron2/model_zoo/model_zoo.py",
        "setuptools 82 removed pkg_resources",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
    ),
)

# pip asks a source archive for its metadata by running its setup.py, which here imports torch and declares a
# dependency that pip refuses. This stands in for setuptools as the build backend of that one pip run, so that
# pip finds, downloads and checks the archive without executing anything in it.
BACKEND = """\
import os


class _Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        name = "{stem}.dist-info"
        os.mkdir(os.path.join(metadata_directory, name))
        with open(os.path.join(metadata_directory, name, "METADATA"), "w") as f:
            f.write("Metadata-Version: 2.1\\nName: {project}\\nVersion: {version}\\n")
        return name


__legacy__ = _Backend()
"""


def download(folder, *, project=PROJECT, version=VERSION, sha256=SHA256):
    """
    Download the source archive with pip, which checks it against ``sha256`` before unpacking it.

    Args:
        folder (Path): an empty folder; the archive and what pip needs are written there.

    Returns:
        Path: the archive.

    Raises:
        InstallError: if the archive is not found or is not the expected one.
    """
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    stem = f"{project.replace('-', '_')}-{version}"
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND.format(stem=stem, project=project, version=version))
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{project}=={version} --hash=sha256:{sha256}\n")
    archives = folder / "archives"

    path = os.pathsep.join(p for p in (str(backend.parent), os.environ.get("PYTHONPATH")) if p)
    # PIP_USE_PEP517: older pips otherwise run setup.py themselves; a pip without that option ignores it here.
    env = {**os.environ, "PYTHONPATH": path, "PIP_USE_PEP517": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", project, "--require-hashes", "-r", str(requirements), "-d", str(archives)]
    result = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
    """
    Unpack the plain files of the archive into ``folder`` and return the one folder inside.

    Raises:
        InstallError: if a file would land outside of ``folder``.
    """
    folder = folder.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            target = (folder / member.name).resolve()
            if not target.is_relative_to(folder):
                raise InstallError(f"{archive.name} has a file outside of its folder: {member.name}")
            if member.isfile():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return next(folder.iterdir())


def mend(source, mends=MENDS):
    """
    Apply ``mends`` to the files under ``source``, and say so at the end of each changed file.

    Raises:
        InstallError: if a text to be replaced is not there; no file is then written.
    """
    texts, reasons = {}, {}
    for m in mends:
        if m.old:
            if m.file not in texts:
                texts[m.file] = (source / m.file).read_text(encoding="utf-8")
            if m.old not in texts[m.file]:
                raise InstallError(f"{m.file}: the text to be mended is not there: {m.old!r} ({m.why}).")
            texts[m.file] = texts[m.file].replace(m.old, m.new)
        else:
            texts[m.file] = m.new
        reasons.setdefault(m.file, {})[m.why] = None
    for file, text in texts.items():
        notes = [f"# Changed by kd_det's tools/install_detectron2.py: {why}.\n" for why in reasons[file]]
        (source / file).write_text(text + "\n\n" + "".join(notes), encoding="utf-8")


def build_wheel(source, folder):
    """
    Write the Python files and configs under ``source`` as the wheel of ``detectron2`` and return its path.
    """
    paths = [p for p in (source / "detectron2").rglob("*") if p.is_file()]
    files = {p.relative_to(source).as_posix(): p.read_bytes() for p in paths}
    for project, target in PROJECTS.items():
        files.update({f"{target}/{p.name}": p.read_bytes() for p in (source / project).glob("*.py")})

    info = f"detectron2-{VERSION}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\n"
    metadata += "Summary: Detectron2 v0.6, its Python part, mended for current packages by kd_det\n"
    metadata += "Home-page: https://github.com/facebookresearch/detectron2\nLicense: Apache-2.0\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIRES)
    files[f"{info}/METADATA"] = metadata.encode()
    wheel = "Wheel-Version: 1.0\nGenerator: kd_det\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/WHEEL"] = wheel.encode()
    files[f"{info}/LICENSE"] = (source / "LICENSE").read_bytes()

    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()

    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as f:
        for name, content in files.items():
            f.writestr(name, content)
    return wheel


def installed():
    """
    Returns:
        str or None: version and place of the Detectron2 that imports here; None if there is none.

    Raises:
        InstallError: if there is one that does not import: it is the user's, and not replaced.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    try:
        module = importlib.import_module("detectron2")
    except Exception as e:
        raise InstallError(
            f"Detectron2 is there ({spec.origin}) but does not import: {type(e).__name__}: {e}. "
            "Mend or uninstall it first; it is not replaced."
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
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        print(f"Detectron2 {VERSION}: downloading {PROJECT} {VERSION}", flush=True)
        source = unpack(download(tmp), tmp / "source")
        mend(source)
        files = len({m.file for m in MENDS})
        print(f"Detectron2 {VERSION}: sha256 as expected, {files} files mended, installing", flush=True)
        wheel = build_wheel(source, tmp)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        if subprocess.run(pip).returncode != 0:
            raise InstallError(f"pip could not install {wheel.name} (see above).")
    print(f"Detectron2 {VERSION}: installed in {sys.prefix}, without compiled operators.")


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"install_detectron2: {error}")
