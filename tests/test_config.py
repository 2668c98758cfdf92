"""Defaults of the KD keys that must go together with Detectron2's."""

import re

from detectron2.config import get_cfg

from kd_det import add_kd_config


def stages(taps):
    return [int(match[1]) for tap in taps if (match := re.match(r"res(\d)", tap))]


def test_no_default_tap_of_ofd_is_in_a_stage_that_detectron2_freezes():  # D33
    cfg = get_cfg()
    add_kd_config(cfg)
    found = stages(cfg.KD.OVERHAUL.STUDENT_TAPS)
    assert found and min(found) > cfg.MODEL.BACKBONE.FREEZE_AT


def test_published_weights_stand_beside_the_levels_they_were_published_for():  # D43
    cfg = get_cfg()
    add_kd_config(cfg)
    for node, weight, levels in (("REVIEW_KD", 1.2, "23456"), ("CWD", 10.0, "23456"), ("PKD", 6.0, "2345")):
        assert cfg.KD[node].WEIGHT == weight and tuple(cfg.KD[node].STUDENT_TAPS) == tuple(f"p{i}" for i in levels)
