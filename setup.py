import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OFFLINE_DATA = ["scikit-image>=0.20", "scikit-learn>=1.2"]


class BuildWithConfigs(build_py):
    """Ships configs/ as kd_det/configs; an editable install finds them in the checkout."""

    def run(self):
        super().run()
        configs = ROOT / "configs"
        if configs.is_dir() and not self.editable_mode:
            shutil.copytree(configs, Path(self.build_lib, "kd_det", "configs"), dirs_exist_ok=True)


setup(
    name="kd_det",
    version="0.1.0",
    description="Knowledge distillation for Detectron2: small detectors taught by large ones",
    license="Apache-2.0",
    packages=find_packages(include=["kd_det", "kd_det.*"]),
    py_modules=["kd_det_command"],
    package_data={"kd_det.visualization": ["report.html"]},
    entry_points={"console_scripts": ["kd-det = kd_det_command:main"]},
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.11",
    # Ranges, so that an environment that runs Detectron2 stays as it is. Left out on purpose:
    # - Detectron2: no release on PyPI under its own name (its INSTALL page, or tools/install_detectron2.py);
    # - torch and torchvision: Detectron2 was built for the pair that is there, and pip would replace the pair
    #   where it is older than a range or lacks one half (tested: torch 2.14.1 with torchvision 0.29.2). PyTorch must be
    #   2.6 or newer, which kd_det checks when it is imported;
    # - OpenCV: four PyPI projects provide cv2, and two of them side by side break each other.
    # requirements.txt has one tested set of everything.
    install_requires=[
        "fvcore>=0.1.5",
        "iopath>=0.1.7",
        "Jinja2>=3",
        "matplotlib>=3.7",
        "numpy>=1.23",
        "Pillow>=9.1",
        "pycocotools>=2.0.2",
        "tabulate",
        "tqdm",
        "yacs>=0.1.8",
    ],
    extras_require={
        "timm": ["timm>=0.9"],
        "transformers": ["transformers>=5"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "fast-eval": ["faster-coco-eval>=1.6"],
        "offline-data": OFFLINE_DATA,
        "docs": ["furo", "myst-parser>=4", "sphinx>=8", "sphinx-copybutton"],
        "dev": ["hypothesis", "import-linter>=2.0", "pytest>=7.4", "pytest-xdist>=3.3", "ruff>=0.6", *OFFLINE_DATA],
    },
)
