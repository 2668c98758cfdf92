import pytest
import torch
from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def storage():
    """Detectron2's heads log to the current storage when they train."""
    with EventStorage() as storage:
        yield storage
