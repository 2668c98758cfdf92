"""Weights of losses that set themselves by the size of their gradient."""

import copy
import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from kd_det import add_kd_config
from kd_det.config_file import merge_config_file, merge_options
from kd_det.engine.loss_sizes import measure_losses
from kd_det.errors import UserError
from kd_det.losses.auto_weight import AutoWeight, gradient_sizes
from tests.engine.test_distributed import on_two_ranks
from tests.engine.test_resume import load, resume_from
from tests.test_accelerator import retinanet
from tests.tiny import (
    KEYPOINT,
    LOSSES,
    MASK,
    RCNN_LOSSES,
    batch,
    distillation_cfg,
    tiny_cfg,
    tiny_retinanet_cfg,
    with_keypoints,
    with_masks,
)
from tests.tiny_run import differing, run_cfg, train

FROZEN = {"MODEL__BACKBONE__FREEZE_AT": 5, "KD__NST__STUDENT_TAPS": ["res3"]}


def auto_cfg(tmp_path, *losses, batches=3, **opts):
    opts = {"KD__AUTO_WEIGHT": 0.25, "KD__AUTO_WEIGHT_BATCHES": batches, **opts}
    return distillation_cfg(tmp_path, *losses, **opts)


def run(model, batches, lr: float = 0.0):
    """SGD, one batch a step; what each step returned."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    ret = []
    for inputs in batches:
        ret.append(model(inputs))
        optimizer.zero_grad()
        sum(ret[-1].values()).backward()
        optimizer.step()
    return ret


def without_momentum(model):
    """Batch norms without state: a forward is the same each time."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    return model.train()


class TestSizes:
    def test_by_hand(self):
        a, b, c, d = (torch.tensor([x], requires_grad=True) for x in (1.0, 2.0, 3.0, 4.0))
        task = (3 * a + 4 * b + 0 * c).sum()  # the gradient is (3, 4, 0)
        losses = [(4 * a - 3 * b).sum(), (6 * a + 8 * b + 9 * d).sum(), (5 * d).sum(), torch.tensor(1.0), (2 * c).sum()]
        found = gradient_sizes(task, losses, [a, b, c, d])
        expected = [[5, 1, 1], [5, 0, 1], [10, 1, 1], [0, 0, 0], [0, 0, 0], [2, 0, 1]]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
        assert all(x.grad is None for x in (a, b, c, d))

    def test_weight(self):
        auto = AutoWeight(0.5, 4)
        assert auto.weight is None
        auto.add(task=8.0, loss=0.0)
        assert auto.weight is None
        auto.add(task=float("nan"), loss=3.0)  # counted, and left out of the sums
        auto.add(task=2.0, loss=float("inf"))
        assert auto.weight is None and auto.is_measuring
        auto.add(task=2.0, loss=4.0)
        assert auto.weight == 0.5 * 10 / 4 and not auto.is_measuring

    @pytest.mark.parametrize("share, batches", [(-1.0, 2), (float("inf"), 2), (float("nan"), 2), (0.5, 0)])
    def test_out_of_range(self, tmp_path, share, batches):
        with pytest.raises(ValueError, match="keys of KD.NST or of KD: AUTO_WEIGHT must be a positive"):
            build_model(auto_cfg(tmp_path, "NST", batches=batches, KD__AUTO_WEIGHT=share))


class TestTraining:
    def test_the_first_batch_has_the_wanted_share_already(self, tmp_path):
        model = without_momentum(build_model(auto_cfg(tmp_path, "NST", "Hint", KD__HINT__AUTO_WEIGHT=0.5)))
        torch.manual_seed(0)
        losses = model(batch())
        terms = [losses.pop("loss_nst"), losses.pop("loss_hint")]
        sizes = gradient_sizes(sum(losses.values()), terms, [p for p in model.student.parameters() if p.requires_grad])
        assert (sizes[1:, 0] / sizes[0, 0]).tolist() == pytest.approx([0.25, 0.5], rel=1e-4)

    def test_the_weight_is_that_of_suggest_weights_and_stays(self, tmp_path):
        batches = [batch(seed=seed) for seed in range(5)]
        for lr, tolerance in ((0.0, 1e-4), (1e-3, 0.2)):  # at the same weights, and with training meanwhile
            torch.manual_seed(0)
            model = without_momentum(build_model(auto_cfg(tmp_path, "NST", "SoftTarget", "PKD")))
            torch.manual_seed(0)
            nst, soft, pkd = measure_losses(model, batches[:3], share=0.25)[1:]
            assert model.losses["nst"].weight == 20 and model.losses["nst"].auto.measured == 0
            torch.manual_seed(0)
            run(model, batches[:3], lr)
            for size in (nst, soft, pkd):
                assert model.losses[size.name].weight == pytest.approx(size.proposed, rel=tolerance)
            weights = [loss.weight for loss in model.losses.values()]
            run(model, batches[3:], lr)
            assert weights == [loss.weight for loss in model.losses.values()]

    def test_one_that_is_off_stays_off_and_one_with_a_weight_keeps_it(self, tmp_path):
        cfg = auto_cfg(tmp_path, "NST", "Hint", "PKD", KD__NST__WEIGHT=0.0, KD__PKD__AUTO_WEIGHT=0.0)
        model = build_model(cfg).train()
        run(model, [batch()])
        assert list(model.losses) == ["hint", "pkd"] and model.losses["pkd"].weight == 6

    def test_schedules_multiply_it(self, tmp_path):
        model = without_momentum(build_model(auto_cfg(tmp_path, "NST", batches=1, KD__WARMUP_ITERS=4)))
        values = []
        with EventStorage() as storage:
            for _ in range(3):
                torch.manual_seed(0)
                values.append(model(batch())["loss_nst"].item())
                storage.step()
        assert values == pytest.approx([values[0], 2 * values[0], 3 * values[0]])

    @pytest.mark.parametrize("name", [name for name in LOSSES if name != "GradientAttentionLoss"])
    def test_measuring_changes_neither_gradients_nor_random_states(self, tmp_path, name):
        found = []
        opts = {"batches": 1, "KD__OVERHAUL__CALIBRATION_IMAGES": 1, "KD__CROSS_KD__CUT": 1}
        inputs = with_keypoints(with_masks(batch()))
        heads = {"MaskSoftTargetLoss": MASK, "KeypointSoftTargetLoss": KEYPOINT}.get(name, {})
        if heads:
            cfg = auto_cfg(tmp_path, name, teacher=tiny_cfg(depth=50, width=8, **heads), **opts, **heads)
        elif name in RCNN_LOSSES:
            cfg = auto_cfg(tmp_path, name, **opts)
        else:
            cfg = retinanet(auto_cfg(tmp_path, name, teacher=tiny_retinanet_cfg(depth=50, width=8), **opts))
        model = without_momentum(build_model(cfg))
        for _ in range(2):  # measured, then with the weight that this gave
            model.zero_grad()
            model.student.loss_normalizer = 100.0  # RetinaNet's, which remembers
            torch.manual_seed(0)
            sum(model(inputs).values()).backward()
            found.append(({n: p.grad for n, p in model.named_parameters()}, torch.rand(1)))
        (measured, after_measuring), (plain, after) = found
        assert torch.equal(after_measuring, after)
        for key, value in plain.items():
            if value is not None:  # the order of sums may differ
                torch.testing.assert_close(measured[key], value, rtol=1e-4, atol=1e-6 + 1e-5 * value.abs().max().item())

    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
    def test_in_half_precision(self, tmp_path, precision):
        """Also of hints, whose gradient is 50 times the task's: neither vanishes nor overflows in float16."""
        weights = []
        for enabled in (False, True):
            torch.manual_seed(0)
            model = without_momentum(build_model(auto_cfg(tmp_path, "NST", "Hint", "MGD")))
            with torch.autocast("cpu", dtype=precision, enabled=enabled):
                torch.manual_seed(0)
                model(batch())
            weights.append([loss.weight for loss in model.losses.values()])
        assert weights[1] == pytest.approx(weights[0], rel=0.1)

    def test_a_loss_without_gradient_is_named(self, tmp_path):
        model = build_model(auto_cfg(tmp_path, "Hint", "NST", **FROZEN)).train()
        with pytest.raises(ValueError, match="loss_nst has no gradient at .* cannot set itself: set KD.NST"):
            model(batch())

    def test_in_a_default_trainer(self, tmp_path):
        cfg = run_cfg(tmp_path, "NST", KD__AUTO_WEIGHT=0.5, SOLVER__MAX_ITER=4, KD__AUTO_WEIGHT_BATCHES=2)
        trainer = DefaultTrainer(cfg)
        trainer.train()
        assert trainer.model.losses["nst"].auto.measured == 2 and trainer.model.losses["nst"].weight != 20


class TestCheckpoint:
    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path, caplog):
        cfg = run_cfg(tmp_path, "NST", "Hint", KD__AUTO_WEIGHT=0.5, KD__AUTO_WEIGHT_BATCHES=3)
        with caplog.at_level(logging.INFO, logger="kd_det"):
            train(cfg)
        whole = load(cfg.OUTPUT_DIR)
        lines = [r.getMessage() for r in caplog.records if "set by its gradient over 3 batches" in r.getMessage()]
        assert [line.split()[0] for line in lines] == ["loss_nst:", "loss_hint:"]
        for name in ("model_0000001.pth", "model_0000003.pth"):  # while and after they are measured
            resumed = resume_from(cfg, name, f"from_{name}")
            train(resumed, resume=True)
            found = load(resumed.OUTPUT_DIR)
            assert differing(found, whole) == []
            key = "kd_det.auto_weights"
            assert found["model"]._metadata[key] == whole["model"]._metadata[key]

    def test_one_from_before_measures_and_keeps_its_connectors(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "Hint")
        old = build_model(cfg)
        cfg.KD.AUTO_WEIGHT = 0.5
        torch.manual_seed(9)
        model = build_model(cfg)
        model.load_state_dict(old.state_dict())
        saved = old.losses.state_dict()
        assert all(torch.equal(saved[key], value) for key, value in model.losses.state_dict().items())
        assert model.losses["hint"].auto.measured == 0

    def test_the_share_is_the_configs_and_another_teachers_weight_is_not_kept(self, tmp_path):
        cfg = auto_cfg(tmp_path, "NST", batches=1)
        model = build_model(cfg).train()
        model(batch())
        cfg.KD.AUTO_WEIGHT = 0.5
        other = build_model(cfg)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert other.losses["nst"].weight == pytest.approx(2 * model.losses["nst"].weight)
        weights = torch.load(tmp_path / "teacher.pth")
        weights["model"]["backbone.fpn_output3.weight"] *= 2
        torch.save(weights, tmp_path / "teacher.pth")
        other = build_model(cfg)
        other.load_state_dict(model.state_dict())
        assert other.losses["nst"].weight == 20 and other.losses["nst"].auto.measured == 0


class TestConfig:
    @pytest.mark.parametrize("share, expected", [(0.0, 0.5), (0.3, 0.3)])
    def test_auto_as_a_weight(self, tmp_path, share, expected):
        (tmp_path / "run.yaml").write_text(f"KD:\n  AUTO_WEIGHT: {share}\n  NST:\n    WEIGHT: auto\n")
        cfg = get_cfg()
        add_kd_config(cfg)
        merge_config_file(cfg, str(tmp_path / "run.yaml"))
        merge_options(cfg, ["KD.HINT.WEIGHT", "auto"], where="KEY VALUE")
        for node in (cfg.KD.NST, cfg.KD.HINT):
            assert node.AUTO_WEIGHT == expected and isinstance(node.WEIGHT, float)
        again = get_cfg()
        add_kd_config(again)
        again.merge_from_other_cfg(type(cfg).load_cfg(cfg.dump()))
        assert again.KD == cfg.KD

    def test_another_word_is_refused(self):
        cfg = get_cfg()
        add_kd_config(cfg)
        with pytest.raises(ValueError, match="KD.NST.WEIGHT"):
            merge_options(cfg, ["KD.NST.WEIGHT", "automatic"], where="KEY VALUE")


def _weights(cfg, seeds):
    from detectron2.utils import comm

    torch.manual_seed(comm.get_rank())
    distiller = build_model(cfg).train()
    model = DistributedDataParallel(distiller, broadcast_buffers=False) if comm.get_world_size() > 1 else distiller
    for seed in seeds:
        model.zero_grad()
        sum(model(batch(seed=seed + 10 * comm.get_rank())).values()).backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return {"weights": {name: loss.weight for name, loss in distiller.losses.items()}, "gradients": gradients}


def test_two_ranks_have_the_same_weights(tmp_path):
    losses = ("NST", "SoftTarget", "Similarity", "FGD")  # with and without collectives of their own
    first, second = on_two_ranks(tmp_path, _weights, auto_cfg(tmp_path, *losses, batches=2), (1, 2))
    assert first["weights"] == second["weights"] and first["weights"]["nst"] != 20
    assert first["gradients"] and all(torch.equal(g, second["gradients"][n]) for n, g in first["gradients"].items())


def test_a_compiled_network_is_measured_or_refused():
    """For a second size, torch.compile builds a backward that reuses its buffers; without that, all is as it was."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    image, parameters = torch.rand(1, 3, 8, 8), list(network.parameters())

    def sizes():
        task, loss = network(image).square().mean((0, 2, 3))
        return gradient_sizes(task, [loss], parameters)

    expected = sizes()
    network.compile(backend="aot_eager", dynamic=True)
    with pytest.raises(UserError, match="KD.AUTO_WEIGHT.* torch._functorch.config.donated_buffer = False"):
        sizes()
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        torch.testing.assert_close(sizes(), expected)
