"""Losses that compare samples with each other compare those of all ranks: a large batch may be split over GPUs."""

import torch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["gather_samples", "mean_over_ranks", "peak_over_ranks", "share_of_samples"]


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


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of (C, P) over P and over all ranks, (C, 1), with its gradient; P may differ from rank to rank."""
    if comm.get_world_size() == 1:
        return x.mean(1, keepdim=True)
    sums = differentiable_all_reduce(torch.cat([x.sum(1), x.new_tensor([x.shape[1]])]))
    return sums[:-1, None] / sums[-1]


def peak_over_ranks(x: Tensor) -> Tensor:
    """The largest magnitude in (C, P) over P and over all ranks, (C, 1), without gradient."""
    peak = x.detach().abs().amax(1, keepdim=True)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return peak


def share_of_samples(count: Tensor) -> Tensor:
    """
    The factor of this rank's sum over its samples, a scalar: averaged over ranks, as DDP does, the sums times this are
    the mean over the samples of all ranks.

    Args:
        count: (), how many samples this rank has.
    """
    total = count.float()
    if comm.get_world_size() > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return comm.get_world_size() / total.clamp(min=1)
