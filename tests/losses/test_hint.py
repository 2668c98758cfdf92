import torch

from kd_det.losses.hint import hint_loss


def test_is_the_mean_squared_error_with_its_gradient():
    student, teacher = torch.randn(3, 5, 4, 7, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 4, 7)
    expected = torch.nn.functional.mse_loss(student, teacher.double())
    found = hint_loss(student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])


def test_every_image_counts_the_same_whatever_its_size():
    # Image 0 has one valid position with errors 1 and 3, image 1 two with errors 2 throughout: (5 + 4) / 2.
    student, teacher = torch.zeros(2, 2, 1, 2), torch.full((2, 2, 1, 2), 2.0)
    teacher[0, :, 0, 0] = torch.tensor([1.0, 3.0])
    valid = torch.tensor([[True, False], [True, True]]).view(2, 1, 1, 2)
    assert hint_loss(student, teacher, valid=valid) == 4.5
