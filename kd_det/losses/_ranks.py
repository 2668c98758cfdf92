"""What losses exchange between ranks, so that a batch split over GPUs has the loss that one GPU would compute."""

from typing import List, Union

import torch
import torch.distributed as dist
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_gather, differentiable_all_reduce
from torch import Tensor

__all__ = ["gather_samples", "max_over_ranks", "share_of_samples", "sum_over_ranks"]


def gather_samples(*samples: Tensor) -> List[Tensor]:
    """
    Each tensor's samples of all ranks along the first axis, with gradients to the local ones. If every rank computes
    the same loss from them, DDP's average over ranks is the gradient of one large batch.

    Args:
        samples: each (b, ...); b may differ between ranks. All ranks must pass as many tensors, of equal trailing
            shapes.
    """
    if comm.get_world_size() == 1:
        return list(samples)
    own = torch.stack([torch.full((), len(x), device=x.device) for x in samples])
    counts = [torch.empty_like(own) for _ in range(comm.get_world_size())]
    dist.all_gather(counts, own)
    counts = torch.stack(counts, dim=1).tolist()  # the only wait for the device
    gathered = []
    for x, count in zip(samples, counts):
        padded = torch.cat([x, x.new_zeros(max(count) - len(x), *x.shape[1:])])
        ranks = differentiable_all_gather(padded)
        gathered.append(torch.cat([rank[:n] for rank, n in zip(ranks, count)]))
    return gathered


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of equally shaped tensors of all ranks, with its gradient."""
    if comm.get_world_size() == 1:
        return x
    # The backward reduces the gradient in place, so it must not be an expanded one, nor another operation's.
    return differentiable_all_reduce(x.contiguous()) * 1


def max_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum of equally shaped tensors of all ranks, in place, without gradient."""
    if comm.get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def share_of_samples(count: Union[int, Tensor], device: torch.device) -> Union[float, Tensor]:
    """
    This rank's number of samples, divided by the average of all ranks. If each rank multiplies the mean over its own
    samples by this factor, DDP's average over ranks is the mean over the samples of all ranks.

    Args:
        count: how many samples this rank has; a scalar tensor where only the device knows it.
        device: of the samples.
    """
    if comm.get_world_size() == 1:
        return 1.0
    total = count.float().clone() if isinstance(count, Tensor) else torch.full((), float(count), device=device)
    dist.all_reduce(total)
    return count * comm.get_world_size() / total.clamp(min=1)
