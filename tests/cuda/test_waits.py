"""How often the host waits for the GPU in what distillation adds to a step."""

import pytest
import torch

from kd_det import student_cfg
from kd_det.benchmark.measure import waits
from tests.cuda.tiny_cuda import DETECTOR_LOSSES, build, faster_cfg, losses_of
from tests.tiny_run import ALL_LOSSES

pytestmark = pytest.mark.cuda


@pytest.fixture
def no_waits():
    """Calls of the modules given raise where the host waits."""

    def switch(mode):
        return lambda *args: torch.cuda.set_sync_debug_mode(mode)

    def watch(*modules):
        for module in modules:
            module.register_forward_pre_hook(switch("error"))
            module.register_forward_hook(switch("default"), always_call=True)

    yield watch
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", DETECTOR_LOSSES)
def test_a_loss_waits_for_nothing(tmp_path, gpu, no_waits, name):
    model = build(faster_cfg(tmp_path, gpu, name))
    losses_of(model)  # what is made once, such as handles of cuBLAS, is made
    no_waits(*model.losses.values())
    if name == "BoundedRegressionLoss":  # Detectron2 asserts that no region is empty
        with pytest.raises(RuntimeError, match="synchronizing"):
            losses_of(model)
        return
    losses_of(model)


def test_the_teacher_waits_for_nothing(tmp_path, gpu, no_waits):
    model = build(faster_cfg(tmp_path, gpu, "NST"))
    losses_of(model)
    no_waits(model.teacher.backbone)
    losses_of(model)


@pytest.mark.parametrize("names, most", [*(((name,), 6) for name in DETECTOR_LOSSES), (ALL_LOSSES, 12)], ids=str)
def test_waits_that_distillation_adds_to_a_step(tmp_path, gpu, names, most):
    cfg = faster_cfg(tmp_path, gpu, *names)

    def waits_of_a_step(cfg):
        model = build(cfg)
        step = lambda: sum(losses_of(model).values()).backward()  # noqa: E731
        step()
        return waits(step)

    added = waits_of_a_step(cfg)
    added.subtract(waits_of_a_step(student_cfg(cfg)))
    print(sorted(added.items()))
    assert sum(added.values()) <= most, {place: count for place, count in added.items() if count}
