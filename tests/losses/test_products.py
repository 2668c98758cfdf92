import pytest
import torch

from kd_det.losses._products import self_product


@pytest.mark.parametrize("channels", [1, 64, 65, 150])
def test_product_of_every_pair_of_rows(channels):
    x = torch.randn(2, channels, 33, dtype=torch.float64)
    torch.testing.assert_close(self_product(x), torch.einsum("nip,njp->nij", x, x))
