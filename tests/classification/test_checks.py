import pytest

from kd_det.classification.checks import check_input
from tests.classification.tiny_classifier import classifier_cfg


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("EMA_DECAY", 1.0, "EMA_DECAY must be in 0 to 0.99"),
        ("INPUT_SIZE", -1, "INPUT_SIZE must be at least 0, found -1"),
        ("TEST_BATCH_SIZE", 0, "TEST_BATCH_SIZE must be at least 1, found 0"),
        ("PREFETCH_FACTOR", 0, "PREFETCH_FACTOR must be at least 1, found 0"),
        ("CORRUPT_IMAGES", "ignore", "CORRUPT_IMAGES must be 'stop' or 'skip', found 'ignore'"),
        ("AUG__TRAIN_SIZE", 0, "AUG.TRAIN_SIZE must be at least 1, found 0"),
        ("AUG__TEST_SIZE", 0, "AUG.TEST_SIZE must be at least 1, found 0"),
        ("AUG__FLIP", 2.0, "AUG.FLIP must be in 0 to 1, found 2.0"),
        ("AUG__MIXUP", -1.0, "AUG.MIXUP must be at least 0, found -1.0"),
        ("AUG__CUTMIX", float("nan"), "AUG.CUTMIX must be at least 0, found nan"),
        ("AUG__RAND_AUGMENT_MAGNITUDE", 31, "AUG.RAND_AUGMENT_MAGNITUDE must be in 0 to 30, found 31"),
        ("AUG__SCALE", (1.0, 0.08), r"AUG.SCALE must be two positive numbers in order, found \(1.0, 0.08\)"),
        ("AUG__SCALE", (1.0,), "AUG.SCALE must be two positive numbers"),
        ("AUG__RATIO", ("a", "b"), "AUG.RATIO must be two positive numbers"),
        ("AUG__COLOR_JITTER", (0.1, 0.1, 0.1), "AUG.COLOR_JITTER must be four numbers"),
        ("AUG__COLOR_JITTER", (0.1, 0.1, 0.1, 0.6), "the hue at most 0.5, found"),
        ("AUG__COLOR_JITTER", (-0.1, 0.1, 0.1, 0.1), "none negative"),
    ],
)
def test_numbers_that_cannot_be(key, value, message):
    with pytest.raises(ValueError, match=message):
        check_input(classifier_cfg(**{f"CLASSIFICATION__{key}": value}))


def test_the_channel_order_must_be_one():
    with pytest.raises(ValueError, match="INPUT.FORMAT must be RGB or BGR"):
        check_input(classifier_cfg(INPUT__FORMAT="L"))


def test_the_ends_of_the_ranges():
    ends = {"FLIP": 1.0, "RAND_AUGMENT_OPS": 2, "RAND_AUGMENT_MAGNITUDE": 30, "SCALE": (0.5, 0.5)}
    check_input(classifier_cfg(**{f"CLASSIFICATION__AUG__{key}": value for key, value in ends.items()}))
