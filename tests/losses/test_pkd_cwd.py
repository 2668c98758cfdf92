import pytest
import torch

from kd_det.losses.cwd import cwd_loss
from kd_det.losses.pkd import pkd_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_pkd(student, teacher):
    """1 - Pearson's correlation of each channel, averaged: half the error of standardised values is the same."""
    pairs = zip(student.transpose(0, 1).flatten(1), teacher.transpose(0, 1).flatten(1))
    return 1 - sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs) / student.shape[1]


def naive_cwd(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1)):
        p_s, p_t = (torch.exp(x.flatten() / temperature) for x in (s, t))
        p_s, p_t = p_s / p_s.sum(), p_t / p_t.sum()
        total += (p_t * (p_t / p_s).log()).sum()
    return temperature**2 * total / (student.shape[0] * student.shape[1])


LOSSES = {"pkd": (pkd_loss, naive_pkd), "cwd": (cwd_loss, lambda s, t: naive_cwd(s, t, 1.0))}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_definition(name):
    loss_fn, naive = LOSSES[name]
    student, teacher = randn(2, 5, 4, 7).requires_grad_(), 3 * randn(2, 5, 4, 7, seed=1) + 1
    found, expected = loss_fn(student, teacher), naive(student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: loss_fn(s, teacher), student, fast_mode=True)


def test_pkd_ignores_the_scale_and_shift_of_channels():
    student, teacher = randn(2, 5, 4, 7), randn(2, 5, 4, 7, seed=1)
    scale, shift = randn(5, 1, 1, seed=2).abs() + 0.1, randn(5, 1, 1, seed=3)
    torch.testing.assert_close(pkd_loss(scale * student + shift, 1e4 * teacher), pkd_loss(student, teacher))
    assert pkd_loss(student, scale * student + shift) < 1e-12
    torch.testing.assert_close(pkd_loss(student, -student), torch.tensor(2.0).double())  # correlation -1


def test_cwd_by_hand_with_temperature():
    # One channel, two positions: softmax (3/4, 1/4) against (1/2, 1/2).
    teacher, student = torch.tensor([3.0, 1.0]).log().view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    kl = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(cwd_loss(student, teacher), kl)
    torch.testing.assert_close(cwd_loss(student, 2 * teacher, temperature=2.0), 4 * kl)
    x, y = randn(2, 5, 4, 7), randn(2, 5, 4, 7, seed=1)
    torch.testing.assert_close(cwd_loss(x, y, temperature=3.0), naive_cwd(x, y, 3.0))


def test_padding_never_counts():
    alone = [[randn(1, 5, *size, seed=i) for i in range(2)] for size in [(6, 9), (4, 5)]]
    student, teacher = torch.full((2, 5, 6, 9), 1e6).double(), torch.full((2, 5, 6, 9), float("nan")).double()
    valid = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    for i, (s, t) in enumerate(alone):
        h, w = s.shape[2:]
        student[i, :, :h, :w], teacher[i, :, :h, :w], valid[i, :, :h, :w] = s[0], t[0], True
    student.requires_grad_()

    loss = cwd_loss(student, teacher, valid=valid)
    torch.testing.assert_close(loss, sum(cwd_loss(s, t) for s, t in alone) / 2)
    assert not torch.autograd.grad(loss, student)[0].masked_fill(valid, 0).any()

    # PKD's statistics are those of the batch: its valid positions in one row are the same batch.
    rows = [torch.cat([pair[side].flatten(2) for pair in alone], dim=2)[:, :, None] for side in range(2)]
    loss = pkd_loss(student, teacher, valid=valid)
    torch.testing.assert_close(loss, pkd_loss(*rows))
    assert not torch.autograd.grad(loss, student)[0].masked_fill(valid, 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_sizes_types_empty_and_extreme_inputs(name):
    loss_fn, _ = LOSSES[name]
    student, teacher = randn(2, 4, 6, 5), randn(2, 4, 3, 5, seed=1)
    torch.testing.assert_close(loss_fn(student, teacher), loss_fn(student.view(2, 4, 3, 2, 5).mean(3), teacher))
    for scale in (0, 1e-20, 1e4):
        for s in (randn(1, 3, 4, 5) * scale, torch.full((1, 3, 4, 5), scale), torch.full((1, 3, 1, 1), scale)):
            s = s.float().requires_grad_()
            loss = loss_fn(s, randn(*s.shape, seed=1).float() * scale)
            loss.backward()
            assert loss.isfinite() and s.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss_fn(student.half(), teacher.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss_fn(student.half().float(), teacher.half().float()))
    empty = torch.zeros(0, 4, 6, 5, requires_grad=True)
    loss = loss_fn(empty, torch.zeros(0, 4, 3, 5))
    loss.backward()
    assert loss == 0


def test_constant_channel_has_no_gradient_in_pkd():
    student = randn(2, 3, 4, 5).float()
    student[:, 1] = 0.1
    student.requires_grad_()
    loss = pkd_loss(student, randn(2, 3, 4, 5, seed=1).float())
    loss.backward()
    assert not student.grad[:, 1].any() and student.grad[:, 0].any()


def test_errors():
    x = randn(1, 2, 3, 3)
    for loss_fn in (pkd_loss, cwd_loss):
        with pytest.raises(ValueError, match="found 2 and 1; put a connector on the student"):
            loss_fn(x, x[:, :1])
    with pytest.raises(ValueError, match="positive number, found -1"):
        cwd_loss(x, x, temperature=-1)
