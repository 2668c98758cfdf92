"""
How well the features of a backbone without a head tell classes apart: k-NN and a linear probe, as an evaluator of
Detectron2.

Shapes: M images with labels to learn from, N to classify, C features an image, K classes.
"""

from collections import OrderedDict
from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from kd_det.classification.evaluator import accuracy, ranks
from kd_det.errors import DatasetError

__all__ = ["FeatureCollector", "ProbeEvaluator", "knn_scores", "linear_scores"]


@torch.no_grad()
def knn_scores(
    features: Tensor, known: Tensor, labels: Tensor, num_classes: int, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """
    Weighted k-NN (arXiv 1805.01978, section 3.4; k as DINO's, arXiv 2104.14294): the k nearest images by cosine
    similarity s vote for their class with exp(s / temperature).

    Args:
        features: (N, C).
        known: (M, C), with ``labels``, (M,) in 0..K-1.

    Returns:
        (N, K), the sums of the votes.
    """
    known = F.normalize(known, dim=1)
    scores = []
    for part in F.normalize(features, dim=1).split(1024):
        similarity, nearest = (part @ known.T).topk(min(k, len(known)))
        votes = part.new_zeros(len(part), num_classes)
        scores.append(votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp()))
    return torch.cat(scores) if scores else features.new_zeros(0, num_classes)


def linear_scores(
    features: Tensor, known: Tensor, labels: Tensor, num_classes: int, *, decay: float = 1e-3, steps: int = 100
) -> Tensor:
    """
    Logistic regression by L-BFGS, as CLIP's linear probe (arXiv 2103.00020, section 3.2), on features standardised by
    the known images' mean and deviation. Convex and begun at 0: nothing is drawn at random.

    Args:
        features, known, labels: see :func:`knn_scores`.
        decay: factor of half the squared norm of the weights.
        steps: at most so many of L-BFGS.

    Returns:
        (N, K), the logits.
    """
    mean, std = known.mean(0), known.std(0, correction=0)
    # A feature that is constant tells nothing, and has no unit.
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std, 0)
    known, features = (known - mean) * scale, (features - mean) * scale
    weight = known.new_zeros(num_classes, known.shape[1], requires_grad=True)
    bias = known.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(known, weight, bias), labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return F.linear(features, weight, bias).detach()


class FeatureCollector(DatasetEvaluator):
    """A data set's pooled ``features``, (M, C), and ``labels``, (M,), of all processes, for the main one."""

    def reset(self):
        self._features: List[Tensor] = []
        self._labels: List[int] = []

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        self._labels += [x["label"] for x in inputs]
        self._features += [x["features"].float() for x in outputs]

    def evaluate(self) -> Optional[Dict[str, Tensor]]:
        device = self._features[0].device if self._features else None
        own = [(torch.stack(self._features).cpu(), torch.tensor(self._labels))] if self._features else []
        gathered = [part for parts in comm.gather(own) for part in parts]
        if not comm.is_main_process():
            return None
        if not gathered:
            raise DatasetError("no image of a data set to be evaluated could be read")
        features, labels = (torch.cat(parts).to(device) for parts in zip(*gathered))
        return {"features": features, "labels": labels}


class ProbeEvaluator(FeatureCollector):
    """Percentages of images whose class is the first (``top1``) or among the first five (``top5``) by each probe."""

    def __init__(self, known: Dict[str, Tensor], num_classes: int, *, neighbours: int = 20):
        """
        Args:
            known: what a :class:`FeatureCollector` found in the images to learn from; read on the main process.
            num_classes: K.
            neighbours: k of k-NN.
        """
        self._known, self._num_classes, self._neighbours = known, num_classes, neighbours

    def evaluate(self):
        found = super().evaluate()
        if found is None:
            return None
        learnt = (self._known["features"], self._known["labels"], self._num_classes)
        scores = {
            "knn": knn_scores(found["features"], *learnt, k=self._neighbours),
            "linear": linear_scores(found["features"], *learnt),
        }
        return OrderedDict((probe, accuracy(ranks(x, found["labels"]))) for probe, x in scores.items())
