import pytest
import torch
from torch import nn

from kd_det.weights.average import WeightAverage


def model(value: float = 0.0) -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        net[0].weight.fill_(value)
    return net


def test_updates_follow_the_formula():
    net = model(1.0)
    average = WeightAverage(net, decay=0.5)
    expected = 1.0
    for n, value in enumerate([2.0, 4.0, 8.0], start=1):
        with torch.no_grad():
            net[0].weight.fill_(value)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))  # 2/11, 3/12, 4/13
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert net[0].weight.item() == pytest.approx(expected, rel=1e-6)
    assert net[0].weight.item() == 8


def test_batch_norm_statistics_are_averaged_and_its_counter_is_not():
    net = model()
    average = WeightAverage(net, decay=0.9)
    net[1].running_mean.fill_(11.0)
    net[1].num_batches_tracked.fill_(7)
    average.update()
    with average.applied():
        assert net[1].running_mean.item() == pytest.approx(9.0)  # (1 - 2/11) * 11
        assert net[1].num_batches_tracked.item() == 7


def test_weights_come_back_after_an_error():
    net = model(3.0)
    average = WeightAverage(net, decay=0.9)
    with torch.no_grad():
        net[0].weight.fill_(5.0)
    with pytest.raises(RuntimeError), average.applied():
        assert net[0].weight.item() == 3
        raise RuntimeError
    assert net[0].weight.item() == 5


def test_state_goes_through_a_file(tmp_path):
    net = model(1.0)
    average = WeightAverage(net, decay=0.9)
    with torch.no_grad():
        net[0].weight.fill_(2.0)
    average.update()
    torch.save(average.state_dict(), tmp_path / "ema.pth")
    other = WeightAverage(model(7.0), decay=0.9)
    other.load_state_dict(torch.load(tmp_path / "ema.pth", weights_only=True))
    assert other.updates == 1
    with other.applied(), average.applied():
        assert other._model[0].weight.item() == net[0].weight.item()


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_wrong_decay(decay):
    with pytest.raises(ValueError, match="EMA_DECAY must be in"):
        WeightAverage(model(), decay)
