"""Networks of torchvision and timm by name: whether a name exists, and the images that its trained weights expect."""

from typing import List, Tuple

from kd_det.errors import unknown_name

__all__ = ["NETWORK_SOURCES", "import_timm"]


def _torchvision_images(network: str) -> Tuple[List[float], List[float], int]:
    from torchvision import models

    known = models.list_models(module=models)
    if network not in known:
        raise ValueError(unknown_name("classifier of torchvision", network, known))
    preset = models.get_model_weights(network).DEFAULT.transforms()
    return list(preset.mean), list(preset.std), preset.crop_size[0]


def _timm_images(network: str) -> Tuple[List[float], List[float], int]:
    timm = import_timm()
    known = timm.list_models()
    if network.partition(".")[0] not in known:
        raise ValueError(unknown_name("model of timm", network, known))
    try:
        trained = timm.get_pretrained_cfg(network)
    except RuntimeError:
        raise ValueError(f"timm has no variant {network!r} of {network.partition('.')[0]!r}.") from None
    return list(trained.mean), list(trained.std), trained.input_size[-1]


def import_timm():
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed; install it with: pip install timm") from None
    return timm


NETWORK_SOURCES = {"torchvision": _torchvision_images, "timm": _timm_images}
