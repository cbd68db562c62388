"""`ftw bench bank`: what reading N lenses costs a token.

Linear lenses of First Light's number on one layer and on three, as `ftw monitor` reads them (product, the strongest,
percentiles, watch list); MLP lenses of the ancestor's shape against the same lenses one by one; reduced precisions with
what they change; lenses that come and go; and the cost from a hundred to a hundred thousand lenses.

Axes: N lenses, S states, L layers, D model width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from ftw.bench.measure import Call, Row, Stopwatch
from ftw.bench.synthetic import LAYERS, NUM_LENSES, WIDTH, made_up_stack, states
from ftw.bench.token import substrate_token, without_gradients
from ftw.hat.bank import LensBank, normalise
from ftw.hat.readout import Readout
from ftw.hat.store import LensStack
from ftw.map import metrics
from ftw.map.pack import load_pack

TOP_K, WATCHED = 5, 3
REDUCED = ("float16", "int8")
JUDGED_STATES, JUDGED_LENSES = 512, 64  # that the change of AUROC is taken on
# The ancestor's lens, for the smaller and the larger bank of the original study, on a small and on a wide model.
MLP_SHAPES = ((200, 576), (200, 2560), (1349, 576), (1349, 2560))
CURVE = (100, 316, 1000, 3162, 10_000, 31_623, 100_000)


def bank_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    yield from _linear(watch)
    yield from _mlp(watch)
    yield from _slots(watch)
    yield from _curve(watch)


def _linear(watch: Stopwatch) -> Iterator[Row]:
    """The whole pack on one layer and on all, in each precision; then as a share of the substrate's time."""
    whole = _linear_stack(watch)
    token = substrate_token(watch)
    for layers in (1, len(whole.layers)):
        stack = _of_layers(whole, layers)
        exact = stack.bank()
        weights = exact.slots.tensors["0.weight"].to(watch.device)
        state_1LD = states(1, layers=layers, width=exact.width).to(watch.device)
        flat_1W, bias_N = normalise(state_1LD).flatten(1), torch.zeros(len(exact), device=watch.device)
        product = ("torch's product, float32", lambda x=flat_1W, w=weights, b=bias_N: linear(x, w, b))
        for precision in ("float32", *REDUCED):
            bank = exact.stored(precision).to(watch.device)
            call, num_bytes = detection(bank, state_1LD), _weight_bytes(bank)
            changed = {} if precision == "float32" else auroc_change(exact, bank, layers=layers)
            case = f"linear, {layers} layer{'s' * (layers > 1)}, {precision}"
            sizes: dict[str, Any] = {"n": len(bank), "d": bank.width, "layers": layers, "precision": precision}
            note = {"resident_mb": round(bank.num_bytes / 1e6, 1), **changed}
            yield watch.row(case, call, baseline=product, num_bytes=num_bytes, **sizes, **note)
            yield watch.row(f"{case}: share of a token", call, baseline=token, **sizes)


def _mlp(watch: Stopwatch) -> Iterator[Row]:
    """MLP banks against their lenses one by one, and reduced precisions against float32."""
    for num, width in MLP_SHAPES:
        num, width = watch.size(num, num // 50), watch.size(width, 64)
        if not watch.fits(3 * num * 128 * width * 4):
            continue
        exact = made_up_stack(num, layers=(0,), width=width, hidden=128).bank().hot(num).to(watch.device)
        state_1LD = states(1, layers=1, width=width).to(watch.device)
        one_by_one = ("lenses one by one, float32", _one_by_one(exact, state_1LD))
        sizes: dict[str, Any] = {"n": num, "d": width}
        whole = _reading(exact, state_1LD)
        case = "mlp 128-64-1"
        yield watch.row(
            f"{case}, float32", whole, baseline=one_by_one, num_bytes=_weight_bytes(exact), precision="float32", **sizes
        )
        for precision in REDUCED:
            bank = exact.stored(precision)
            changed = auroc_change(exact, bank)
            yield watch.row(
                f"{case}, {precision}", _reading(bank, state_1LD), baseline=("the bank in float32", whole),
                num_bytes=_weight_bytes(bank), precision=precision, **sizes, **changed,
            )  # fmt: skip


def _slots(watch: Stopwatch) -> Iterator[Row]:
    """Sixty-four lenses of a thousand change, against building the bank of the new set."""
    num, changing = watch.size(1000, 100), watch.size(64, 8)
    for kind, hidden, layers in (("linear", 0, LAYERS), ("mlp 128-64-1", 128, LAYERS[:1])):
        width = watch.size(WIDTH, 64)
        stack = made_up_stack(num + changing, layers=layers, width=width, hidden=hidden)
        old, new = stack.names[:changing], stack.names[num:]
        hot = stack.rows(stack.names[:num]).bank().hot(num).to(watch.device)
        coming = [stack.rows(names).bank().to(watch.device) for names in (new, old)]

        def exchange(hot: LensBank = hot, coming: list[LensBank] = coming) -> None:
            hot.put(coming[0], drop=coming[1].names)
            coming.reverse()

        def rebuild(stack: LensStack = stack, changing: int = changing) -> None:
            stack.rows(stack.names[changing:]).bank().to(watch.device)

        yield watch.row(f"{changing} of {num} change, {kind}", exchange, n=num, d=width, baseline=("rebuild", rebuild))


def _curve(watch: Stopwatch) -> Iterator[Row]:
    """One layer of linear lenses, from a hundred to a hundred thousand."""
    width = watch.size(WIDTH, 64)
    for num in CURVE[: watch.size(len(CURVE), 3)]:
        exact = made_up_stack(num, layers=(0,), width=width).bank().to(watch.device)
        state_1LD = states(1, layers=1, width=width).to(watch.device)
        flat_1W, weights = normalise(state_1LD).flatten(1), exact.slots.tensors["0.weight"]
        product = ("torch's product, float32", lambda x=flat_1W, w=weights, b=exact.offset: linear(x, w, b))
        for precision in ("float32", "float16"):
            bank = exact.stored(precision)
            num_bytes, call = _weight_bytes(bank), detection(bank, state_1LD)
            case = f"curve, {precision}"
            yield watch.row(case, call, n=num, d=width, baseline=product, num_bytes=num_bytes, precision=precision)


def detection(bank: LensBank, state_1LD: Tensor) -> Call:
    """Everything the monitor asks of a bank at a token: the strongest, their percentiles, the watch list."""
    readout = Readout(bank, top_k=TOP_K, watch=bank.names[:WATCHED])
    return without_gradients(lambda: readout(bank(state_1LD)))


def auroc_change(exact: LensBank, near: LensBank, *, layers: int = 1, seed: int = 0) -> dict[str, Any]:
    """What another precision does to AUROC and order, on states that the exact lenses separate but for some noise.

    Returns:
        auroc: mean over lenses, exact. auroc_change: of the mean. auroc_change_largest: of any lens, as a size.
        order_kept: share of states with the same strongest lens.
    """
    normed_SLD, lenses = normalise(states(JUDGED_STATES, layers=layers, width=exact.width)), slice(0, JUDGED_LENSES)
    with torch.inference_mode():
        exact_SN, near_SN = (bank.logits(normed_SLD.to(bank.offset.device), lenses).cpu() for bank in (exact, near))
    random = torch.Generator().manual_seed(seed)
    noisy_SN = exact_SN + exact_SN.std() * torch.randn(exact_SN.shape, generator=random)
    labels_SN = (noisy_SN > noisy_SN.median(0).values).numpy()
    areas = [metrics.auroc(x_SN.numpy(), labels_SN, np.ones(labels_SN.shape)) for x_SN in (exact_SN, near_SN)]
    return {
        "auroc": float(areas[0].mean()),
        "auroc_change": float((areas[1] - areas[0]).mean()),
        "auroc_change_largest": float(np.abs(areas[1] - areas[0]).max()),
        "order_kept": float((exact_SN.argmax(1) == near_SN.argmax(1)).float().mean()),
    }


def _linear_stack(watch: Stopwatch) -> LensStack:
    """The pack that is given, or as many made-up lenses as First Light has."""
    if watch.config.pack is not None:
        return load_pack(watch.config.pack).stack
    return made_up_stack(watch.size(NUM_LENSES, 300), width=watch.size(WIDTH, 64))


def _of_layers(stack: LensStack, num: int) -> LensStack:
    """The same lenses on the first layers only."""
    return LensStack(
        names=stack.names,
        layers=stack.layers[:num],
        heads=stack.heads[:num],
        scale_NL=stack.scale_NL[:, :num],
        offset_NL=stack.offset_NL[:, :num],
        quantiles_NQ=stack.quantiles_NQ,
        levels_Q=stack.levels_Q,
    )


def _reading(bank: LensBank, state_1LD: Tensor) -> Call:
    return without_gradients(lambda: bank(state_1LD))


def _one_by_one(bank: LensBank, state_1LD: Tensor, tell: Callable[[Tensor], object] = id) -> Call:
    """The lenses of an MLP bank as networks of their own, over the same weights, each telling its logit."""
    tensors = [bank.heads[0].state_dict()[name] for name in ("w1", "b1", "w2", "b2", "w3", "b3")]
    lenses = list(zip(*(tensor.unbind() for tensor in tensors), strict=True))

    def read() -> None:
        x_1D = normalise(state_1LD)[:, 0]
        for w1, b1, w2, b2, w3, b3 in lenses:
            tell(linear(linear(linear(x_1D, w1, b1).relu(), w2, b2).relu(), w3[None], b3[None]))

    return without_gradients(read)


def _weight_bytes(bank: LensBank) -> int:
    """Bytes of the weights that a reading goes through once."""
    return sum(weight.numel() * weight.element_size() for weight in bank.parameters())
