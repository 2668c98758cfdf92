import pytest
import torch

from kd_det.classification.evaluator import ClassificationEvaluator, ranks

# Rows: the label is the best, the second, the seventh, tied with all others, not a number.
SCORES = [
    [9, 1, 2, 3, 4, 5, 6],
    [5, 9, 1, 0, 0, 0, 0],
    [1, 2, 3, 4, 5, 6, 7],
    [1, 1, 1, 1, 1, 1, 1],
    [float("nan"), 0, 0, 0, 0, 0, 0],
]


def test_ranks():
    assert ranks(torch.tensor(SCORES, dtype=torch.float32), torch.zeros(5, dtype=torch.int64)).tolist() == [
        0,
        1,
        6,
        6,
        7,
    ]


def test_top_1_and_top_5():
    evaluator = ClassificationEvaluator()
    evaluator.reset()
    outputs = [{"scores": torch.tensor(row, dtype=torch.float32)} for row in SCORES]
    inputs = [{"label": 0}] * 5
    evaluator.process(inputs[:2], outputs[:2])
    evaluator.process([], [])
    evaluator.process(inputs[2:], outputs[2:])
    assert evaluator.evaluate() == {"classification": {"top1": pytest.approx(20), "top5": pytest.approx(40)}}
    evaluator.reset()
    evaluator.process(inputs[:1], outputs[:1])
    assert evaluator.evaluate()["classification"]["top1"] == 100
