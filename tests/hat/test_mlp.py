"""N stacked networks compute what N separate networks of torch compute."""

import torch
from torch import nn

from ftw.hat.mlp import MLPHead


def separate(head: MLPHead, n: int) -> nn.Sequential:
    """Lens n as an ordinary torch network."""
    first, second = head.w1.shape[1], head.w2.shape[1]
    network = nn.Sequential(
        nn.Linear(head.width, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
    )
    names = ("w1", "b1", "w2", "b2", "w3", "b3")
    values = [getattr(head, name)[n].detach() for name in names]
    values[4], values[5] = values[4].unsqueeze(0), values[5].unsqueeze(0)
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    return network


def random_head() -> MLPHead:
    torch.manual_seed(0)
    head = MLPHead(4, 8, hidden=6)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head


def test_every_lens_is_its_own_network():
    head, x_BW = random_head(), torch.randn(5, 8)
    for n in range(4):
        torch.testing.assert_close(head(x_BW)[:, n], separate(head, n)(x_BW)[:, 0], rtol=1e-5, atol=1e-5)


def test_folding_the_standardisation_changes_no_logit():
    head, x_BW = random_head(), torch.randn(7, 8)
    center_W, scale_W = torch.randn(8), torch.rand(8) + 0.5
    torch.testing.assert_close(
        head.fold_inputs(center_W, scale_W)(x_BW), head((x_BW - center_W) / scale_W), rtol=1e-4, atol=1e-4
    )


def test_chosen_lenses_and_parts_keep_their_logits():
    head, x_BW = random_head(), torch.randn(7, 8)
    torch.testing.assert_close(head.rows(torch.tensor([2, 0]))(x_BW), head(x_BW)[:, [2, 0]])
    torch.testing.assert_close(head.part(1, 3)(x_BW), head(x_BW)[:, 1:3])


def test_choosing_lenses_leaves_the_random_generator_alone():
    head, before = random_head(), torch.get_rng_state()
    head.rows(torch.tensor([0]))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_every_parameter():
    head = random_head()
    head(torch.randn(64, 8)).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1 if parameter.ndim > 1 else 0).abs().sum(-1) > 0).all(), name


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    head, x_BW = MLPHead(3, 8, hidden=16, dropout=0.5), torch.randn(5, 8)
    assert not torch.equal(head.train()(x_BW), head(x_BW))
    assert torch.equal(head.eval()(x_BW), head(x_BW))
    assert not head.rows(torch.tensor([0])).training
