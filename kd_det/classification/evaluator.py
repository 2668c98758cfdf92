"""Top-1 and top-5 accuracy as a Detectron2 evaluator."""

from collections import OrderedDict
from typing import Dict, List

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

__all__ = ["ClassificationEvaluator", "accuracy", "ranks"]


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """
    How many classes score higher than each image's own, (N,), from scores (N, K) and labels (N,) in 0..K-1; a tie
    counts against it, so that equal scores for all classes are never right. Neither is NaN.
    """
    own = scores.gather(1, labels[:, None])
    return (~(scores < own)).sum(dim=1) - own[:, 0].isfinite().long()


def accuracy(found: Tensor) -> Dict[str, float]:
    """``top1`` and ``top5``, percentages, from the :func:`ranks` of the right classes."""
    return {f"top{k}": 100 * (found < k).double().mean().item() for k in (1, 5)}


class ClassificationEvaluator(DatasetEvaluator):
    """Percentages of images whose label is the highest (``top1``) or among the five highest scores (``top5``)."""

    def reset(self):
        self._ranks: List[Tensor] = []

    def process(self, inputs: List[Dict], outputs: List[Dict]):
        if inputs:
            scores = torch.stack([x["scores"] for x in outputs]).float().cpu()
            self._ranks.append(ranks(scores, torch.tensor([x["label"] for x in inputs])))

    def evaluate(self):
        own = torch.cat(self._ranks) if self._ranks else torch.zeros(0, dtype=torch.int64)
        gathered = comm.gather(own)
        if not comm.is_main_process():
            return None
        return OrderedDict(classification=accuracy(torch.cat(gathered)))
