"""Sequence lenses: equal to torch's own networks lens by lens, blind to padding, one part at a time or all at once."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from ftw.errors import ConfigError
from ftw.hat.lens import SEQUENCE_FAMILIES, HeadConfig
from ftw.hat.temporal.families import described
from ftw.hat.temporal.recurrent import RecurrentHead, from_torch
from ftw.hat.temporal.sequence import SequenceHead, lenses_at_once
from ftw.hat.temporal.trunk import Trunk

FAMILIES = [family for family in SEQUENCE_FAMILIES if family != "trunk_lstm"]
N, B, T, W, H = 3, 6, 7, 5, 4
LENGTHS = torch.tensor([7, 1, 4, 3, 7, 2])


def head_of(family: str, *, width: int = W, seed: int = 0) -> SequenceHead:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = HeadConfig(family=family, hidden=H if family in ("lstm", "gru") else 0).build(N, width)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.4)
    assert isinstance(head, SequenceHead)
    return head.eval()


def sequences(seed: int = 1, *, shape: tuple[int, ...] = (B, T, W)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Single(nn.Module):
    """One classifier as torch writes it: packed sequences through its own recurrent layer, then a linear head."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.recurrent, self.linear = kind(W, H, bidirectional=True, batch_first=True), nn.Linear(2 * H, 1)

    def forward(self, x_BTW: Tensor) -> Tensor:
        packed = pack_padded_sequence(x_BTW, LENGTHS, batch_first=True, enforce_sorted=False)
        last = self.recurrent(packed)[1]
        state_2BH = last[0] if isinstance(last, tuple) else last
        return self.linear(torch.cat([state_2BH[0], state_2BH[1]], dim=-1))[:, 0]

    def head(self) -> RecurrentHead:
        return from_torch(self.recurrent, self.linear.weight, self.linear.bias)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("own", [False, True])
def test_a_recurrent_head_equals_torchs_networks_lens_by_lens_forward_and_gradient(kind, own: bool):
    torch.manual_seed(0)
    singles = [Single(kind) for _ in range(N)]
    heads = [single.head() for single in singles]
    together = RecurrentHead(N, W, cell=heads[0].cell, hidden=H)
    rows = [head.state_dict() for head in heads]
    together.load_state_dict({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    x = sequences(shape=(N, B, T, W) if own else (B, T, W)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    weights_BN = sequences(2, shape=(B, N))
    logits_BN = together(x, LENGTHS)
    expected_BN = torch.stack([single(y[n] if own else y) for n, single in enumerate(singles)], dim=1)
    assert (logits_BN - expected_BN).abs().max() < 1e-5
    (logits_BN * weights_BN).sum().backward()
    (expected_BN * weights_BN).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad - y.grad).abs().max() < 1e-5
    for n, single in enumerate(singles):
        theirs = {name: parameter.grad for name, parameter in single.recurrent.named_parameters()}
        for place, end in enumerate(("l0", "l0_reverse")):
            for mine, name in (("w_ih", "weight_ih"), ("w_hh", "weight_hh"), ("bias", "bias_ih")):
                gradient = getattr(together, mine).grad[n, place]
                assert (gradient - theirs[f"{name}_{end}"]).abs().max() < 1e-5
        assert (together.w_out.grad[n] - single.linear.weight.grad[0]).abs().max() < 1e-5
        assert (together.b_out.grad[n] - single.linear.bias.grad[0]).abs() < 1e-5


def test_the_recurrent_bias_of_a_gru_has_torchs_gradient():
    torch.manual_seed(0)
    single = Single(nn.GRU)
    head = single.head()
    head(sequences(), LENGTHS).sum().backward()
    single(sequences()).sum().backward()
    assert head.bias_n is not None
    for place, name in enumerate(("bias_hh_l0", "bias_hh_l0_reverse")):
        assert (head.bias_n.grad[0, place] - getattr(single.recurrent, name).grad[2 * H :]).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_in_the_padding_changes_nothing(family: str):
    head, x_BTW = head_of(family), sequences()
    changed = x_BTW.clone()
    for row, length in enumerate(LENGTHS.tolist()):
        changed[row, length:] = 1e4
    assert torch.equal(head(x_BTW, LENGTHS), head(changed, LENGTHS))
    alone = [head(x_BTW[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS.tolist())]
    assert (head(x_BTW, LENGTHS) - torch.stack(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_and_lenses_in_another_order_give_the_same_logits_in_that_order(family: str):
    head, x_BTW = head_of(family), sequences()
    rows, lenses = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0])
    expected = head(x_BTW, LENGTHS)[rows][:, lenses]
    assert (head.rows(lenses)(x_BTW[rows], LENGTHS[rows]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_own_sequences_that_are_the_same_for_all_lenses_read_as_shared_ones(family: str):
    head, x_BTW = head_of(family), sequences()
    own = head(x_BTW.expand(N, -1, -1, -1), LENGTHS.expand(N, -1))
    assert (head(x_BTW, LENGTHS) - own).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_state_is_a_sequence_of_one_token(family: str):
    head, x_BW = head_of(family), sequences(shape=(B, W))
    assert torch.equal(head(x_BW), head(x_BW.unsqueeze(1), torch.ones(B, dtype=torch.long)))


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_inputs_give_on_states_what_the_head_gave_on_standardised_ones(family: str):
    head, x_BTW = head_of(family), sequences()
    center_W, scale_W = sequences(3, shape=(W,)), sequences(4, shape=(W,)).abs() + 0.5
    folded = head.fold_inputs(center_W, scale_W)
    assert (folded(x_BTW, LENGTHS) - head((x_BTW - center_W) / scale_W, LENGTHS)).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter(family: str):
    head = head_of(family)
    head(sequences(), LENGTHS).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.reshape(N, -1) != 0).any(1).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_reads_nearly_the_same_and_its_gradients_are_finite(family: str):
    head, x_BTW = head_of(family, width=32), sequences(shape=(B, T, 32))
    exact = head(x_BTW, LENGTHS)
    assert (head.stored("bfloat16")(x_BTW, LENGTHS) - exact).abs().max() < 0.05 * exact.abs().max() + 0.05
    loss = head(x_BTW.bfloat16(), LENGTHS).square().sum()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_small_steps_are_not_lost_in_bfloat16():
    # A gate that adds 2e-3 a step: a bfloat16 cell would stop growing at 0.5, after 256 of these steps.
    head = RecurrentHead(1, 1, hidden=1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    head.bias.data[0, :, 0], head.bias.data[0, :, 1] = 30, 30  # put and keep all
    head.bias.data[0, :, 2], head.bias.data[0, :, 3] = 2e-3, 30
    head.w_out.data[:] = 0.5
    steps = 500
    logit = head(torch.zeros(1, steps, 1, dtype=torch.bfloat16))
    assert float(logit.detach()) == pytest.approx(float(torch.tanh(torch.tensor(steps * 2e-3))), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_can_be_built_again_from_its_description(family: str):
    head = head_of(family)
    again = described(head).build(N, W)
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in head.state_dict().items()
    }


def test_memory_bounds_how_many_lenses_read_at_once():
    head = RecurrentHead(50, 8, hidden=16)
    ample = 2**40
    assert lenses_at_once(head, 4, 10, budget_bytes=1, cached_bytes=ample) == 1
    assert lenses_at_once(head, 4, 10, budget_bytes=ample, cached_bytes=ample) == 50
    assert lenses_at_once(head, 4, 10, budget_bytes=10 * 4 * 10 * head.token_bytes, cached_bytes=ample) == 10
    assert lenses_at_once(head, 4, 10, budget_bytes=ample, cached_bytes=7 * head.step_bytes) == 7


def test_precisions_that_recurrence_does_not_stand_are_refused():
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        head_of("lstm").stored("int8")


def test_a_trunk_folds_inputs_and_ignores_padding():
    torch.manual_seed(0)
    trunk, x_BTLW = Trunk(2, W, hidden=H), sequences(shape=(B, T, 2, W))
    center_LW, scale_LW = torch.randn(2, W), torch.rand(2, W) + 0.5
    folded = trunk.fold_inputs(center_LW, scale_LW)
    standard = (x_BTLW - center_LW) / scale_LW
    assert (folded(x_BTLW, LENGTHS) - trunk(standard, LENGTHS)).abs().max() < 1e-5
    alone = [trunk(x_BTLW[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS.tolist())]
    assert (trunk(x_BTLW, LENGTHS) - torch.stack(alone)).abs().max() < 1e-5
