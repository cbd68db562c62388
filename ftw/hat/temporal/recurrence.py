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
    """Last state of both directions, [N, B, 2H] in float32.

    Args:
        fed_NBT2G: what the inputs give to the gates, bias included; any strides. Its type is what is computed in.
        w_hh_N2GH: recurrent weights, gates in the order of torch (LSTM: i, f, g, o; GRU: r, z, n).
        bias_n_N2H: recurrent bias of a GRU's candidate; None makes the cell an LSTM.
        lengths: true lengths, [B] or [N, B]; None where all tokens count.

    Source: Hochreiter & Schmidhuber 1997, Long short-term memory; Cho et al. 2014, Learning phrase representations
    using RNN encoder-decoder; Schuster & Paliwal 1997, Bidirectional recurrent neural networks.
    """
    num_lenses, steps = len(fed_NBT2G), _steps(fed_NBT2G, lengths)
    if bias_n_N2H is None:
        state_MBH: Any = _LSTM.apply(fed_NBT2G, w_hh_N2GH.flatten(0, 1), steps)
    else:
        state_MBH = _GRU.apply(fed_NBT2G, w_hh_N2GH.flatten(0, 1), bias_n_N2H.flatten(0, 1), steps)
    return state_MBH.unflatten(0, (num_lenses, 2)).transpose(1, 2).flatten(2)


def _steps(fed_NBT2G: Tensor, lengths: Tensor | None) -> Steps:
    """For each step which sequences it moves, bool [M, B, 1]; None where it moves all."""
    num_lenses, batch, num_tokens = fed_NBT2G.shape[:3]
    if lengths is None or int(lengths.min()) >= num_tokens:
        return [None] * num_tokens
    lengths_NB = lengths.view(-1, batch).expand(num_lenses, -1)
    steps: Steps = []
    for step in range(num_tokens):
        moves_N2B = torch.stack([lengths_NB > step, lengths_NB > num_tokens - 1 - step], dim=1)
        steps.append(None if bool(moves_N2B.all()) else moves_N2B.flatten(0, 1).unsqueeze(-1))
    return steps


def _fed(fed_NBT2G: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """What goes into either direction at a step, [N, B, G] each."""
    return fed_NBT2G[:, :, step, 0], fed_NBT2G[:, :, fed_NBT2G.shape[2] - 1 - step, 1]


def _add_fed(fed_NBT2G: Tensor, step: int, recurred_MBG: Tensor, out: Tensor) -> Tensor:
    for direction, fed_NBG in enumerate(_fed(fed_NBT2G, step)):
        torch.add(recurred_MBG[direction::2], fed_NBG, out=out[direction::2])
    return out


def _by_token(steps_MTBG: Tensor) -> Tensor:
    """What stands by step, by token: [N, B, T, 2, G]."""
    lenses, (tokens, batch, gates) = len(steps_MTBG) // 2, steps_MTBG.shape[1:]
    # In the order of the tokens from the start: the product with the inputs that follows takes it without a copy.
    found_NBT2G = steps_MTBG.new_empty(lenses, batch, tokens, 2, gates)
    found_NBT2G[..., 0, :] = steps_MTBG[0::2].transpose(1, 2)
    for step in range(tokens):
        found_NBT2G[:, :, tokens - 1 - step, 1] = steps_MTBG[1::2, step]
    return found_NBT2G


def _weight_gradient(grad_MTBG: Tensor, before_MTBH: Tensor) -> Tensor:
    """Gradient of the recurrent weights: every gate's gradient with the state before it, summed over steps at once."""
    return torch.bmm(grad_MTBG.flatten(1, 2).transpose(1, 2), before_MTBH.flatten(1, 2))


class _LSTM(Function):
    @staticmethod
    def forward(ctx: Any, fed_NBT2G: Tensor, w_hh_MGH: Tensor, steps: Steps) -> Tensor:
        (lenses, batch, tokens), units = fed_NBT2G.shape[:3], w_hh_MGH.shape[-1]
        training = any(ctx.needs_input_grad)
        kept, states = (tokens, tokens + 1) if training else (1, 1)  # only the way back needs every step

        def room(slots: int, size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(2 * lenses, slots, batch, size, dtype=dtype, device=fed_NBT2G.device)

        gates_all, squashed_all = room(kept, 4 * units, fed_NBT2G.dtype), room(kept, units, fed_NBT2G.dtype)
        hidden_all = room(states, units, fed_NBT2G.dtype)
        cell_all = room(states, units, torch.float32)  # a sum over all steps: bfloat16 would lose the small terms
        hidden_all[:, 0], cell_all[:, 0] = 0, 0
        for step, moves in enumerate(steps):
            now, after = (step, step + 1) if training else (0, 0)
            hidden, cell = hidden_all[:, now], cell_all[:, now]
            gates = _add_fed(fed_NBT2G, step, torch.bmm(hidden, w_hh_MGH.transpose(1, 2)), gates_all[:, now])
            gates[..., : 2 * units].sigmoid_()
            gates[..., 2 * units : 3 * units].tanh_()
            gates[..., 3 * units :].sigmoid_()
            put, keep, new, out = gates.chunk(4, dim=-1)
            next_cell = torch.addcmul(cell * keep, put.float(), new.float())
            squashed = squashed_all[:, now].copy_(next_cell).tanh_()
            next_hidden = out * squashed
            cell_all[:, after] = next_cell if moves is None else torch.where(moves, next_cell, cell)
            hidden_all[:, after] = next_hidden if moves is None else torch.where(moves, next_hidden, hidden)
        if training:
            ctx.save_for_backward(w_hh_MGH, gates_all, squashed_all, hidden_all, cell_all)
            ctx.steps = steps
        return hidden_all[:, -1].float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        w_hh_MGH, gates_all, squashed_all, hidden_all, cell_all = ctx.saved_tensors
        d_hidden, dtype = grads[0], gates_all.dtype
        d_cell = torch.zeros_like(d_hidden)
        d_all = torch.empty_like(gates_all)
        for step in range(len(ctx.steps) - 1, -1, -1):
            moves, gates, squashed = ctx.steps[step], gates_all[:, step], squashed_all[:, step]
            put, keep, new, out = gates.chunk(4, dim=-1)
            d_short = d_hidden.to(dtype)
            d_next = torch.addcmul(d_cell, (d_short * out).float(), (1 - squashed * squashed).float())
            d_next_short = d_next.to(dtype)
            d_gates = d_all[:, step]
            d_put, d_keep, d_new, d_out = d_gates.chunk(4, dim=-1)
            torch.mul(d_next_short, new, out=d_put)
            torch.mul(d_next_short, cell_all[:, step].to(dtype), out=d_keep)
            torch.mul(d_next_short, put * (1 - new * new), out=d_new)
            torch.mul(d_short, squashed, out=d_out)
            for part in (slice(0, 2 * out.shape[-1]), slice(3 * out.shape[-1], None)):
                d_gates[..., part] *= gates[..., part] * (1 - gates[..., part])
            d_kept = d_next * keep
            if moves is not None:
                d_gates *= moves
                d_kept = torch.where(moves, d_kept, d_cell)
            d_before = torch.bmm(d_gates, w_hh_MGH).float()
            d_hidden = d_before if moves is None else torch.where(moves, d_before, d_hidden)
            d_cell = d_kept
        return _by_token(d_all), _weight_gradient(d_all, hidden_all[:, :-1]), None


class _GRU(Function):
    @staticmethod
    def forward(ctx: Any, fed_NBT2G: Tensor, w_hh_MGH: Tensor, bias_n_MH: Tensor, steps: Steps) -> Tensor:
        (lenses, batch), units = fed_NBT2G.shape[:2], w_hh_MGH.shape[-1]
        hidden = torch.zeros(2 * lenses, batch, units, device=fed_NBT2G.device)
        bias_M1H, kept = bias_n_MH.unsqueeze(1), list[tuple[Tensor, ...]]()
        for step, moves in enumerate(steps):
            recurred = torch.bmm(hidden.to(fed_NBT2G.dtype), w_hh_MGH.transpose(1, 2)).float()
            inner = recurred[..., 2 * units :] + bias_M1H
            recurred[..., 2 * units :] = 0
            fed = _add_fed(fed_NBT2G, step, recurred, recurred)
            reset, update = fed[..., : 2 * units].sigmoid().chunk(2, dim=-1)
            new = torch.addcmul(fed[..., 2 * units :], reset, inner).tanh_()
            if any(ctx.needs_input_grad):
                kept.append((hidden, reset, update, inner, new))
            next_hidden = torch.lerp(new, hidden, update)
            hidden = next_hidden if moves is None else torch.where(moves, next_hidden, hidden)
        ctx.save_for_backward(w_hh_MGH)
        ctx.steps, ctx.kept, ctx.dtype = steps, kept, fed_NBT2G.dtype
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
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
        return _by_token(d_fed), _weight_gradient(d_recurred, before_all), d_bias_MH, None
