"""k-NN and the linear probe against their definitions, and on two processes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from kd_det.classification.probe import FeatureCollector, ProbeEvaluator, knn_scores, linear_scores
from kd_det.errors import DatasetError
from tests.classification.test_distributed import storage  # noqa: F401
from tests.engine.test_distributed import on_two_ranks


def clusters(per_class: int, spread: float, seed: int = 0):
    """Three classes around three directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_class)
    return torch.eye(3, 5)[labels] * 4 + spread * torch.randn(len(labels), 5, generator=generator), labels


def test_the_nearest_vote_by_their_similarity():
    # Cosines with the query: 1, 0.6 and 0. Of the two nearest, class 1 has exp(1 / 0.5) and class 0 exp(0.6 / 0.5).
    known, labels = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 5.0]]), torch.tensor([1, 0, 2])
    found = knn_scores(torch.tensor([[7.0, 0.0]]), known, labels, 3, k=2, temperature=0.5)
    torch.testing.assert_close(found, torch.tensor([[1.2, 2.0, -torch.inf]]).exp())
    assert knn_scores(known[:0], known, labels, 3).shape == (0, 3)


def test_the_linear_probe_is_logistic_regression():
    known, labels = clusters(20, 2.0)
    features, _ = clusters(10, 2.0, seed=1)
    mean, std = known.mean(0), known.std(0, correction=0)
    # scikit-learn's C weighs the sum of the losses against half the squared norm.
    reference = LogisticRegression(C=1 / (1e-3 * len(known)), tol=1e-8, max_iter=10000)
    reference.fit(((known - mean) / std).double().numpy(), labels.numpy())
    expected = reference.predict_proba(((features - mean) / std).double().numpy())
    found = linear_scores(features, known, labels, 3, steps=1000).softmax(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


def test_a_constant_feature_tells_nothing():
    known, labels = clusters(20, 1.0)
    known[:, 4] = 0.1
    features, _ = clusters(5, 1.0, seed=1)
    other = features.clone()
    other[:, 4] = 1e6
    expected = linear_scores(features, known, labels, 3)
    assert expected.isfinite().all()
    torch.testing.assert_close(linear_scores(other, known, labels, 3), expected)


def evaluated(known, query):
    evaluator = ProbeEvaluator(known, 3, neighbours=5)
    evaluator.reset()
    inputs = [{"label": int(label)} for label in query[1]]
    evaluator.process(inputs, [{"features": x} for x in query[0]])
    return evaluator.evaluate()


def test_percentages_of_each_probe():
    known = dict(zip(("features", "labels"), clusters(20, 0.1)))
    results = evaluated(known, clusters(5, 0.1, seed=1))
    assert results == {"knn": {"top1": 100, "top5": 100}, "linear": {"top1": 100, "top5": 100}}
    features, labels = clusters(5, 0.1, seed=1)
    assert evaluated(known, (features, (labels + 1) % 3))["linear"]["top1"] == 0
    collector = FeatureCollector()
    collector.reset()
    with pytest.raises(DatasetError, match="no image of a data set to be evaluated could be read"):
        collector.evaluate()


def test_two_processes_evaluate_as_one(tmp_path):
    known = dict(zip(("features", "labels"), clusters(20, 3.0)))
    features, labels = clusters(5, 3.0, seed=1)
    whole = evaluated(known, (features, labels))
    first, second = on_two_ranks(tmp_path, split, known, features, labels)
    assert first == whole and second is None
    assert 0 < whole["knn"]["top1"] < 100


def split(known, features, labels):
    from detectron2.utils import comm

    # An image for the first process, the others for the second.
    own = slice(0, 1) if comm.get_rank() == 0 else slice(1, None)
    return evaluated(known, (features[own], labels[own]))
