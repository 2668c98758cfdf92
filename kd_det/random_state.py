"""The random states of a process: Python's, NumPy's and PyTorch's."""

import contextlib
import random

import numpy as np
import torch

__all__ = ["get_random_state", "preserved_random_state", "seed_everything", "set_random_state"]


def get_random_state() -> dict:
    """All random states, in types that ``torch.load(weights_only=True)`` accepts."""
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()
    ret = {
        "python": random.getstate(),
        "numpy": (numpy_name, torch.from_numpy(numpy_keys.astype(np.int64)), *numpy_rest),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        ret["cuda"] = torch.cuda.get_rng_state()
    return ret


def set_random_state(state: dict) -> None:
    """Set what :func:`get_random_state` returned."""
    random.setstate(state["python"])
    numpy_name, numpy_keys, *numpy_rest = state["numpy"]
    np.random.set_state((numpy_name, numpy_keys.numpy().astype(np.uint32), *numpy_rest))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state():
    """A context that leaves the random states as it found them, whatever is drawn in it."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


def seed_everything(*entropy: int) -> None:
    """Seed the CPU's random states from numbers of any size, such as a run's seed and an image's place."""
    words = np.random.SeedSequence(entropy).generate_state(8)
    random.seed(int.from_bytes(words.tobytes(), "little"))
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[:2].view(np.int64)[0]) & (2**63 - 1))
