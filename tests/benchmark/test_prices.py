"""What each loss alone costs a step, from tools/benchmark.py prices."""

import json

import pytest

from kd_det.benchmark import main
from tests.tiny import distillation_cfg


def prices(tmp_path, *arguments: str, losses=("NST", "SoftTarget")) -> list[dict]:
    cfg = distillation_cfg(tmp_path, *losses, MODEL__DEVICE="cpu", INPUT__MIN_SIZE_TEST=64)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    command = ["prices", "--config-file", f"{tmp_path}/config.yaml", *arguments]
    main([*command, "--batch", "1", "--threads", "1", "--repeat", "1", "--json", f"{tmp_path}/prices.json"])
    with open(f"{tmp_path}/prices.json") as file:
        return json.load(file)["prices"]


def test_a_row_for_each_loss_alone(tmp_path):
    rows = prices(tmp_path)
    assert [row["loss"] for row in rows] == ["NST", "SoftTarget"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["distillation"] / (row["plain"] + row["teacher"]))
    # Both are measured beside the same plain step, whose memory is no matter of chance but for sampled regions.
    assert rows[0]["plain MiB"] == pytest.approx(rows[1]["plain MiB"], rel=0.1)


def test_a_config_without_losses_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prices(tmp_path, losses=())
    assert "--losses" in capsys.readouterr().err
