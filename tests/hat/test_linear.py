"""A linear head is N logistic regressions, and folding, choosing and sharing lenses change no logit."""

import pytest
import torch

from ftw.errors import ConfigError
from ftw.hat.lens import HeadConfig
from ftw.hat.linear import LinearHead


def random_head(num: int = 5, width: int = 8) -> LinearHead:
    torch.manual_seed(0)
    head = LinearHead(num, width)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(head.bias)
    return head


def test_logit_is_dot_product_plus_bias():
    head, x_BW = random_head(), torch.randn(3, 8)
    for n in range(5):
        expected_B = torch.stack([(head.weight[n] * x_W).sum() + head.bias[n] for x_W in x_BW])
        torch.testing.assert_close(head(x_BW)[:, n], expected_B)


def test_folding_the_standardisation_changes_no_logit():
    head, x_BW = random_head(), torch.randn(7, 8)
    center_W, scale_W = torch.randn(8), torch.rand(8) + 0.1
    torch.testing.assert_close(head.fold_inputs(center_W, scale_W)(x_BW), head((x_BW - center_W) / scale_W))


def test_chosen_lenses_keep_their_logits_in_the_given_order_and_share_no_memory():
    head, x_BW = random_head(), torch.randn(7, 8)
    before_BN = head(x_BW)
    chosen = head.rows(torch.tensor([3, 0]))
    torch.testing.assert_close(chosen(x_BW), before_BN[:, [3, 0]])
    with torch.no_grad():
        chosen.weight.zero_()
    torch.testing.assert_close(head(x_BW), before_BN)


def test_a_part_reads_the_same_and_follows_the_whole():
    head, x_BW = random_head(), torch.randn(7, 8)
    part = head.part(1, 4)
    torch.testing.assert_close(part(x_BW), head(x_BW)[:, 1:4])
    with torch.no_grad():
        head.weight.zero_()
    torch.testing.assert_close(part(x_BW), head.bias[1:4].expand(7, 3))
    assert head.num_lenses == 5


def test_copying_rows_overwrites_exactly_those():
    head, other, mask_N = random_head(), LinearHead(5, 8), torch.tensor([True, False, True, False, False])
    before_NW = head.weight.clone()
    head.copy_rows(other, mask_N)
    assert (head.weight[mask_N] == 0).all()
    assert torch.equal(head.weight[~mask_N], before_NW[~mask_N])


def test_an_untrained_lens_has_no_opinion():
    assert (HeadConfig().build(4, 8)(torch.randn(3, 8)) == 0).all()


@pytest.mark.parametrize(
    "config",
    [HeadConfig(family="tree"), HeadConfig(hidden=-1), HeadConfig(family="mlp", hidden=1), HeadConfig(dropout=1)],
)
def test_a_head_that_cannot_be_is_refused_with_its_key(config: HeadConfig):
    with pytest.raises(ConfigError, match=r"hat\.lens"):
        config.build(2, 8)
