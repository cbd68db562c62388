"""LSTM and GRU over many lenses at once: batched matrix products, with the backward pass written out.

Both directions of all lenses are one batch. The forward direction takes token s at step s, the backward direction token
T - 1 - s; a token beyond a sequence's true length leaves the state as it is, so padding enters neither. torch has no
batching rule for its LSTM, and its autograd would add up the recurrent weights' gradient step by step; here it is one
product over all steps. Equal to `torch.nn.LSTM` and `torch.nn.GRU`, lens by lens.

Axes: N lenses, B sequences, T tokens (and steps), 2 directions, M = 2N, H hidden units, G gate units (4H or 3H).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Steps = list[Tensor | None]


def final_states(fed_NBT2G: Tensor, w_hh_N2GH: Tensor, bias_n_N2H: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Last state of both directions, [N, B, 2H] in float32, from what each token gives to the gates.

    Args:
        fed_NBT2G: what the inputs give to the gates, bias included; any strides. Its type is what is computed in.
        w_hh_N2GH: recurrent weights, gates in the order of torch (LSTM: i, f, g, o; GRU: r, z, n).
        bias_n_N2H: recurrent bias of a GRU's candidate; None makes the cell an LSTM.
        lengths: true lengths, [B] or [N, B]; None where all tokens count.

    Source: Hochreiter & Schmidhuber 1997, Long short-term memory; Cho et al. 2014, Learning phrase representations
    using RNN encoder-decoder; Schuster & Paliwal 1997, Bidirectional recurrent neural networks.
    """
    fed_N2BTG = torch.stack([fed_NBT2G[..., 0, :], fed_NBT2G[..., 1, :].flip(2)], dim=1)
    return _run(fed_N2BTG.flatten(0, 1).transpose(1, 2).contiguous(), w_hh_N2GH, bias_n_N2H, lengths)


def states_of(
    x_NBTW: Tensor,
    w_ih_N2GW: Tensor,
    bias_N2G: Tensor,
    w_hh_N2GH: Tensor,
    bias_n_N2H: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """The same from sequences of each lens's own: a product that gives step after step what the gates are fed.

    Computed in the type of `x_NBTW`; the weights are cast to it.
    """
    dtype = x_NBTW.dtype
    x_N2BTW = torch.stack([x_NBTW, x_NBTW.flip(2)], dim=1)
    x_MTBW = x_N2BTW.flatten(0, 1).transpose(1, 2)
    fed_MSG: Any = _Fed.apply(x_MTBW.flatten(1, 2), w_ih_N2GW.flatten(0, 1).to(dtype), bias_N2G.flatten(0, 1).to(dtype))
    return _run(fed_MSG.unflatten(1, x_MTBW.shape[1:3]), w_hh_N2GH, bias_n_N2H, lengths)


def moved_on(fed_NBTG: Tensor, w_hh_NGH: Tensor, bias_n_NH: Tensor | None, state_SNBH: Tensor | None) -> Tensor:
    """States of one direction after some more tokens, [S, N, B, H] in float32; None for the state before is zero.

    S is 2 for an LSTM, hidden state and cell, and 1 for a GRU. Every sequence has all the tokens. Nothing is
    differentiated.
    """
    fed_NTBG = fed_NBTG.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    with torch.no_grad():
        return _moved(fed_NTBG, w_hh_NGH.to(fed_NTBG.dtype), bias_n_NH, [None] * fed_NTBG.shape[1], state_SNBH)


def _run(fed_MTBG: Tensor, w_hh_N2GH: Tensor, bias_n_N2H: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Last states from what the gates are fed, step after step; the LSTM overwrites it."""
    num_lenses = len(w_hh_N2GH)
    steps, w_hh_MGH = _steps(fed_MTBG, lengths), w_hh_N2GH.to(fed_MTBG.dtype).flatten(0, 1)
    bias_n_MH = None if bias_n_N2H is None else bias_n_N2H.flatten(0, 1)
    state_MBH = _moved(fed_MTBG, w_hh_MGH, bias_n_MH, steps)[0]
    return state_MBH.unflatten(0, (num_lenses, 2)).transpose(1, 2).flatten(2)


def _moved(
    fed_MTBG: Tensor, w_hh_MGH: Tensor, bias_n_MH: Tensor | None, steps: Steps, state_SMBH: Tensor | None = None
) -> Tensor:
    """The state after all steps, [S, M, B, H] in float32: hidden, and for an LSTM the cell, which has no gradient."""
    if state_SMBH is None:
        size = 2 if bias_n_MH is None else 1, len(fed_MTBG), fed_MTBG.shape[2], w_hh_MGH.shape[-1]
        state_SMBH = torch.zeros(size, device=fed_MTBG.device)
    if bias_n_MH is None:
        states: Any = _LSTM.apply(fed_MTBG, w_hh_MGH, steps, state_SMBH)
        return torch.stack(states)
    hidden: Any = _GRU.apply(fed_MTBG, w_hh_MGH, bias_n_MH.float(), steps, state_SMBH[0])
    return hidden.unsqueeze(0)


def _steps(fed_MTBG: Tensor, lengths: Tensor | None) -> Steps:
    """For each step which sequences it moves, bool [M, B, 1]; None where it moves all."""
    num_lenses, num_tokens, batch = len(fed_MTBG) // 2, *fed_MTBG.shape[1:3]
    if lengths is None or int(lengths.min()) >= num_tokens:
        return [None] * num_tokens
    lengths_NB = lengths.view(-1, batch).expand(num_lenses, -1)
    steps: Steps = []
    for step in range(num_tokens):
        moves_N2B = torch.stack([lengths_NB > step, lengths_NB > num_tokens - 1 - step], dim=1)
        steps.append(None if bool(moves_N2B.all()) else moves_N2B.flatten(0, 1).unsqueeze(-1))
    return steps


def _weight_gradient(grad_MTBG: Tensor, before_MTBH: Tensor) -> Tensor:
    """Gradient of the recurrent weights: every gate's gradient with the state before it, summed over steps at once."""
    return torch.bmm(grad_MTBG.flatten(1, 2).transpose(1, 2), before_MTBH.flatten(1, 2))


class _Fed(Function):
    """x W^T + b of every network, [M, S, G], S being all tokens of all sequences.

    torch's own way back gives the weights' gradient transposed; to turn it costs as much as to compute it.
    """

    @staticmethod
    def forward(ctx: Any, x_MSW: Tensor, w_MGW: Tensor, bias_MG: Tensor) -> Tensor:
        ctx.save_for_backward(x_MSW, w_MGW)
        return torch.baddbmm(bias_MG.unsqueeze(1), x_MSW, w_MGW.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x_MSW, w_MGW = ctx.saved_tensors
        d_x_MSW = torch.bmm(grads[0], w_MGW) if ctx.needs_input_grad[0] else None
        return d_x_MSW, torch.bmm(grads[0].transpose(1, 2), x_MSW), grads[0].sum(1)


class _LSTM(Function):
    """Overwrites what it is fed with the gates: nothing else holds it, and no backward pass before it needs it."""

    @staticmethod
    def forward(
        ctx: Any, fed_MTBG: Tensor, w_hh_MGH: Tensor, steps: Steps, state_SMBH: Tensor
    ) -> tuple[Tensor, Tensor]:
        units, training = w_hh_MGH.shape[-1], any(ctx.needs_input_grad)
        # The cell is a sum over all steps: bfloat16 would lose the small terms.
        (hidden, cell), weight = (state_SMBH[0].to(fed_MTBG.dtype), state_SMBH[1]), w_hh_MGH.transpose(1, 2)
        kept = [hidden], [cell], list[Tensor]()  # only the way back needs every step
        for gates, moves in zip(fed_MTBG.detach().unbind(1), steps, strict=True):
            gates.baddbmm_(hidden, weight)
            new = gates[..., 2 * units : 3 * units].tanh()
            put, keep, by_new, out = gates.sigmoid_().chunk(4, dim=-1)
            next_cell = torch.addcmul(cell * keep, put.float(), new.float())
            squashed = next_cell.tanh().to(gates.dtype)
            next_hidden = out * squashed
            hidden = next_hidden if moves is None else torch.where(moves, next_hidden, hidden)
            cell = next_cell if moves is None else torch.where(moves, next_cell, cell)
            if training:
                by_new.copy_(new)
                for states, state in zip(kept, (hidden, cell, squashed), strict=True):
                    states.append(state)
        if training:
            hidden_all, cell_all, squashed_all = (torch.stack(states, dim=1) for states in kept)
            ctx.save_for_backward(w_hh_MGH, fed_MTBG.detach(), squashed_all, hidden_all, cell_all)
            ctx.steps = steps
        ctx.mark_non_differentiable(cell)
        return hidden.float(), cell

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w_hh_MGH, gates_all, squashed_all, hidden_all, cell_all = ctx.saved_tensors
        d_hidden, dtype = grads[0], gates_all.dtype
        d_cell = torch.zeros_like(d_hidden)
        # What does not hang on the way back is computed for all steps together; then, step by step, d_all is finished.
        d_all, through_all = _slopes(gates_all, squashed_all, cell_all[:, :-1].to(dtype))
        keep_all = gates_all.chunk(4, dim=-1)[1]
        for step in range(len(ctx.steps) - 1, -1, -1):
            moves, d_gates = ctx.steps[step], d_all[:, step]
            d_next = torch.addcmul(d_cell, d_hidden, through_all[:, step].float())
            by_gate = d_gates.unflatten(-1, (4, -1))
            by_gate[..., :3, :].mul_(d_next.to(dtype).unsqueeze(-2))
            by_gate[..., 3, :].mul_(d_hidden.to(dtype))
            d_kept = d_next * keep_all[:, step]
            if moves is not None:
                d_gates *= moves
                d_kept = torch.where(moves, d_kept, d_cell)
            d_before = torch.bmm(d_gates, w_hh_MGH).float()
            d_hidden = d_before if moves is None else torch.where(moves, d_before, d_hidden)
            d_cell = d_kept
        return d_all, _weight_gradient(d_all, hidden_all[:, :-1]), None, None


def _slopes(gates_all: Tensor, squashed_all: Tensor, cell_all: Tensor) -> tuple[Tensor, Tensor]:
    """How the cell hangs on what i, f and g are fed and the hidden state on what o is fed; the latter on the cell."""
    put, _, new, out = gates_all.chunk(4, dim=-1)
    slopes = 1 - gates_all
    slopes *= gates_all  # of i, f and o; g is a tanh
    by_put, by_keep, by_new, by_out = slopes.chunk(4, dim=-1)
    by_put *= new
    by_keep *= cell_all
    torch.mul(put, 1 - new * new, out=by_new)
    by_out *= squashed_all
    return slopes, out * (1 - squashed_all * squashed_all)


class _GRU(Function):
    @staticmethod
    def forward(
        ctx: Any, fed_MTBG: Tensor, w_hh_MGH: Tensor, bias_n_MH: Tensor, steps: Steps, hidden: Tensor
    ) -> Tensor:
        units = w_hh_MGH.shape[-1]
        bias_M1H, kept = bias_n_MH.unsqueeze(1), list[tuple[Tensor, ...]]()
        for step, moves in enumerate(steps):
            recurred = torch.bmm(hidden.to(fed_MTBG.dtype), w_hh_MGH.transpose(1, 2)).float()
            inner = recurred[..., 2 * units :] + bias_M1H
            recurred[..., 2 * units :] = 0
            fed = recurred.add_(fed_MTBG[:, step])
            reset, update = fed[..., : 2 * units].sigmoid().chunk(2, dim=-1)
            new = torch.addcmul(fed[..., 2 * units :], reset, inner).tanh_()
            if any(ctx.needs_input_grad):
                kept.append((hidden, reset, update, inner, new))
            next_hidden = torch.lerp(new, hidden, update)
            hidden = next_hidden if moves is None else torch.where(moves, next_hidden, hidden)
        ctx.save_for_backward(w_hh_MGH)
        ctx.steps, ctx.kept, ctx.dtype = steps, kept, fed_MTBG.dtype
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (w_hh_MGH,), d_hidden, dtype = ctx.saved_tensors, grads[0], ctx.dtype
        fed_all, recurred_all = list[Tensor](), list[Tensor]()
        d_bias_MH = torch.zeros_like(d_hidden[:, 0])
        for moves, kept in zip(reversed(ctx.steps), reversed(ctx.kept), strict=True):
            before, reset, update, inner, new = kept
            moved = d_hidden if moves is None else d_hidden * moves
            d_new = moved * (1 - update) * (1 - new * new)
            d_update = moved * (before - new) * update * (1 - update)
            d_reset = d_new * inner * reset * (1 - reset)
            d_inner = d_new * reset
            d_bias_MH += d_inner.sum(1)
            fed_all.append(torch.cat([d_reset, d_update, d_new], dim=-1).to(dtype))
            # The candidate's recurrent part stands behind the reset gate.
            recurred_all.append(torch.cat([d_reset, d_update, d_inner], dim=-1).to(dtype))
            d_before = d_hidden * update + torch.bmm(recurred_all[-1], w_hh_MGH).float()
            d_hidden = d_before if moves is None else torch.where(moves, d_before, d_hidden)
        d_fed, d_recurred = (torch.stack(parts[::-1], dim=1) for parts in (fed_all, recurred_all))
        before_all = torch.stack([kept[0].to(dtype) for kept in ctx.kept], dim=1)
        return d_fed, _weight_gradient(d_recurred, before_all), d_bias_MH, None, None
