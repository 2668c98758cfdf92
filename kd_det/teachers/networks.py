"""
Networks of torchvision and timm by name: whether a name exists, its trained weights, and the images that they expect.

A name is ``torchvision://NETWORK`` or ``timm://NETWORK``; behind a dot it may choose the weights among several
(``torchvision://resnet50.IMAGENET1K_V1``, ``timm://resnet50.a1_in1k``), by default the library's own choice.
"""

import os
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from kd_det.errors import one_line, unknown_name

__all__ = ["NETWORK_SOURCES", "default_weights", "expected_images", "import_timm", "read_default_weights"]

NETWORK_SOURCES = ("torchvision", "timm")


def expected_images(library: str, network: str) -> Tuple[List[float], List[float], int]:
    """
    Mean and std (RGB, 0 to 255) and side of the images that a classifier's trained weights expect; a ``ValueError`` for
    an unknown network, and where timm is not installed.
    """
    if library == "torchvision":
        from torchvision import models

        _check_torchvision_name(network, "classifier", models)
        trained = _torchvision_weights(network).transforms()
        size = trained.crop_size[0]
    else:
        trained = _timm_pretrained(network)
        size = trained.input_size[-1]
    return [255 * x for x in trained.mean], [255 * x for x in trained.std], size


def default_weights(name: str) -> str:
    """
    The full name of the weights that the library has for a network, for :func:`read_default_weights`; "" if it has
    none. Nothing is downloaded. A ``ValueError`` as :func:`expected_images` raises it.
    """
    library, _, network = name.partition("://")
    architecture = network.partition(".")[0]
    if library == "torchvision":
        return f"{library}://{architecture}.{_torchvision_weights(network).name}"
    trained = _timm_pretrained(network)
    return f"{library}://{architecture}.{trained.tag}".rstrip(".") if trained.has_weights else ""


def read_default_weights(name: str, **options: Any) -> Dict[str, Tensor]:
    """
    The weights of :func:`default_weights`, by the library's names, from its cache or downloaded into it.

    Args:
        options: further arguments of ``timm.create_model``.

    Raises:
        FileNotFoundError: they are not in the cache and cannot be downloaded; tells what to set.
    """
    library, _, network = name.partition("://")
    try:
        if library == "torchvision":
            return dict(_torchvision_weights(network).get_state_dict(check_hash=True, weights_only=True))
        return import_timm().create_model(network, pretrained=True, **options).state_dict()
    except (OSError, RuntimeError) as e:
        cache = os.path.join(torch.hub.get_dir(), "checkpoints")
        if library == "timm":
            cache = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")) + f" or {cache}"
        raise FileNotFoundError(
            f"The weights {name!r} are neither in the cache of {library} ({cache}) nor can they be downloaded: set "
            f"KD.TEACHER.WEIGHTS (--teacher-weights) to a file of them, or fill the cache. ({one_line(e)[:200]})"
        ) from e


def import_timm():
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed; install it with: pip install timm") from None
    return timm


def _torchvision_weights(network: str):
    from torchvision import models

    _check_torchvision_name(network, "network", models, models.detection)
    architecture, _, variant = network.partition(".")
    weights = models.get_model_weights(architecture)
    if variant and variant not in weights.__members__:
        raise ValueError(unknown_name(f"weights of torchvision's {architecture!r}", variant, weights.__members__))
    return weights[variant] if variant else weights.DEFAULT


def _check_torchvision_name(network: str, kind: str, *modules) -> None:
    from torchvision import models

    architecture = network.partition(".")[0]
    known = [name for module in modules for name in models.list_models(module=module)]
    if architecture not in known:
        raise ValueError(unknown_name(f"{kind} of torchvision", architecture, known))


def _timm_pretrained(network: str):
    timm = import_timm()
    architecture = network.partition(".")[0]
    if architecture not in timm.list_models():
        raise ValueError(unknown_name("model of timm", network, timm.list_models()))
    try:
        return timm.get_pretrained_cfg(network)
    except RuntimeError:
        tags = [name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)]
        variant = network.partition(".")[2]
        raise ValueError(unknown_name(f"weights of timm's {architecture!r}", variant, filter(None, tags))) from None
