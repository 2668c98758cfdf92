"""How often the host waits for the GPU in what distillation adds to a step."""

import pytest
import torch

from kd_det import student_cfg
from kd_det.benchmark.measure import waits
from kd_det.features.position_weights import REGIONS
from tests.cuda.tiny_cuda import DETECTOR_LOSSES, build, faster_cfg, losses_of
from tests.tiny_run import ALL_LOSSES

pytestmark = pytest.mark.cuda


@pytest.fixture
def raise_where_the_host_waits(device):
    """Switches PyTorch's check on or off; a CPU has none."""

    def switch(on: bool):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


@pytest.mark.parametrize(
    "name, opts",
    [*((name, {}) for name in DETECTOR_LOSSES), *(("Hint", {"KD__HINT__REGIONS": regions}) for regions in REGIONS[1:])],
    ids=str,
)
def test_a_loss_waits_for_nothing(tmp_path, device, raise_where_the_host_waits, name, opts):
    model = build(faster_cfg(tmp_path, device, name, **opts))
    losses_of(model)  # handles and pinned memory are there from now on

    def before(loss, args):
        context = args[2]
        if loss.needs_regions:  # accepted, once a step: Detectron2's pooler waits at each level, its box targets once
            for stage in range(len(context.region_pairs())):
                context.region_targets(stage).deltas  # noqa: B018
        raise_where_the_host_waits(True)

    (loss,) = model.losses.values()
    loss.register_forward_pre_hook(before)
    loss.register_forward_hook(lambda *args: raise_where_the_host_waits(False), always_call=True)
    losses_of(model)


def test_the_teacher_waits_for_nothing(tmp_path, device, raise_where_the_host_waits):
    model = build(faster_cfg(tmp_path, device, "NST"))
    losses_of(model)
    model.teacher.backbone.register_forward_pre_hook(lambda *args: raise_where_the_host_waits(True))
    model.teacher.backbone.register_forward_hook(lambda *args: raise_where_the_host_waits(False), always_call=True)
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
