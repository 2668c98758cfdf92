"""Losses that compare samples with each other compare those of all ranks: a large batch may be split over GPUs."""

import torch
from detectron2.utils import comm
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["gather_samples", "max_over_ranks", "share_of_samples", "sum_over_ranks"]


class _AllGather(Function):
    """
    The samples of all ranks, rank by rank. Every rank computes the same loss of them, and DDP averages gradients over
    ranks; so the local samples' gradient is multiplied by the number of ranks, to end as that of one large batch.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(comm.get_world_size())]
        torch.distributed.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.chunk(comm.get_world_size())[comm.get_rank()] * comm.get_world_size()


def gather_samples(samples: Tensor) -> Tensor:
    """
    The samples of all ranks along the first axis, with gradients to the local ones.

    Args:
        samples: (b, ...); b may differ from rank to rank.
    """
    if comm.get_world_size() == 1:
        return samples
    counts = comm.all_gather(len(samples))
    padded = torch.cat([samples, samples.new_zeros(max(counts) - len(samples), *samples.shape[1:])])
    chunks = _AllGather.apply(padded).chunk(len(counts))
    return torch.cat([chunk[:count] for chunk, count in zip(chunks, counts)])


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of equally shaped tensors of all ranks, in place, without gradient."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(x)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum of equally shaped tensors of all ranks, in place, without gradient."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX)
    return x


def share_of_samples(count: int, device: torch.device) -> Tensor:
    """
    How many times a rank's average number of samples this rank brings, a scalar. The mean over its own samples times
    this is, averaged over ranks as DDP does, the mean over the samples of all ranks.
    """
    total = torch.tensor(float(count), device=device)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    return count * comm.get_world_size() / total.clamp(min=1)
