"""Networks of torchvision and timm by name: whether a name exists, and the images that its trained weights expect."""

from typing import List, Tuple

from kd_det.errors import unknown_name

__all__ = ["NETWORK_SOURCES", "expected_images", "import_timm"]

NETWORK_SOURCES = ("torchvision", "timm")


def expected_images(library: str, network: str) -> Tuple[List[float], List[float], int]:
    """
    Mean and std (RGB, 0 to 255) and side of the images that a classifier's trained weights expect; a ``ValueError`` for
    an unknown network, and where timm is not installed.
    """
    if library == "torchvision":
        from torchvision import models

        known = models.list_models(module=models)
        if network not in known:
            raise ValueError(unknown_name("classifier of torchvision", network, known))
        trained = models.get_model_weights(network).DEFAULT.transforms()
        size = trained.crop_size[0]
    else:
        timm = import_timm()
        architecture = network.partition(".")[0]
        if architecture not in timm.list_models():
            raise ValueError(unknown_name("model of timm", network, timm.list_models()))
        try:
            trained = timm.get_pretrained_cfg(network)
        except RuntimeError:
            raise ValueError(f"timm has no variant {network!r} of {architecture!r}.") from None
        size = trained.input_size[-1]
    return [255 * x for x in trained.mean], [255 * x for x in trained.std], size


def import_timm():
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed; install it with: pip install timm") from None
    return timm
