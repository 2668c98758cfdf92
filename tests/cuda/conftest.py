"""
What only a GPU shows. Without one these tests are skipped; KD_DET_CUDA_TESTS_ON_CPU=1 runs them on the CPU, as far as
they make sense there, to try the tests themselves.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("KD_DET_CUDA_TESTS_ON_CPU") == "1":
        return "cpu"
    pytest.skip("needs a GPU")


@pytest.fixture
def gpu(device) -> str:
    """For tests of what a CPU does not have."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(autouse=True)
def exact_float32():
    """Values are compared with the CPU's: products and convolutions are not rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
