"""Packs in fewer bytes: weights of another precision, or on a shared basis; and what that costs.

A basis of rank R is the one on which the first layers of all lenses lose least, in the metric of the states where there
are any: with C the states' second moment, the R leading right singular vectors of W C^1/2 (Eckart & Young 1936, "The
approximation of one matrix by another of lower rank").

Axes: N lenses, M rows of first layers (N, or N x hidden units), L layers, D model width, R rank, B states.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError, PackError
from ftw.hat.bank import normalise
from ftw.hat.basis import Basis
from ftw.hat.lens import Head, HeadConfig
from ftw.hat.store import LensStack, dequantised, head_of, quantised
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.installed import now
from ftw.map.metrics import auroc
from ftw.map.pack import LensPack, head_fields
from ftw.map.text_level import pooled_states, text_level_logits

PRECISIONS = ("float32", "bfloat16", "int8")
NUM_PROBES = 512  # random states, where there are no others
NUM_STATES = 20_000
RIDGE = 1e-4  # of the mean variance: directions that no state has would otherwise be amplified without bound


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a conversion did.

    Attributes:
        bytes_before, bytes_after: of weights, calibration and basis.
        judged_on: in words. auroc_before, auroc_after: means over the lenses that have figures, None without labels.
        largest_loss: of a lens's AUROC. correlation: least over lenses, of logits before and after.
    """

    bytes_before: int
    bytes_after: int
    judged_on: str
    correlation: float
    auroc_before: float | None = None
    auroc_after: float | None = None
    largest_loss: float | None = None

    def words(self) -> str:
        """In a sentence."""
        ratio = f"{self.bytes_before / 1e6:,.1f} -> {self.bytes_after / 1e6:,.1f} MB"
        if self.auroc_before is None or self.auroc_after is None:
            return f"{ratio}; least correlation of a lens's logits {self.correlation:.5f} on {self.judged_on}"
        return (
            f"{ratio}; mean AUROC {self.auroc_before:.4f} -> {self.auroc_after:.4f} "
            f"(largest loss of a lens {self.largest_loss:.4f}) on {self.judged_on}"
        )


def convert(
    pack: LensPack,
    *,
    precision: str | None = None,
    rank: int = 0,
    encyclopedia: Encyclopedia | None = None,
    seed: int = 0,
) -> tuple[LensPack, Change]:
    """A pack with its weights in another precision, on a shared basis, or both; and what changed.

    Args:
        precision: of the first layers on disk: float32, bfloat16 or int8; None keeps it. The rest stays float32.
        rank: of a shared basis; 0 keeps what there is. encyclopedia: states to fit it on and to judge the change by.

    Raises:
        ConfigError: no such precision or rank. PackError: the pack has a basis already, or the states are of another
            substrate or other layers.
    """
    precision = precision or pack.stored
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision} is none of {', '.join(PRECISIONS)}")
    if pack.stack.reads_sequences:
        raise PackError("lenses that read sequences have one form, in float32; convert packs of single states")
    if encyclopedia is not None:
        _check_states(pack, encyclopedia)
    stack = pack.stack
    if rank:
        stack = _rebased(stack, pack.recipe.width, rank, encyclopedia)
    stack = _rounded(stack, precision)
    words = " and ".join([f"to {precision}", *([f"onto a basis of rank {rank}"] if rank else [])])
    change = _judge(pack, stack, precision, encyclopedia, seed)
    made = replace(
        pack,
        stack=stack,
        stored=precision,
        recipe=replace(pack.recipe, basis_rank=rank or pack.recipe.basis_rank, **head_fields(stack)),
        provenance={
            **pack.provenance,
            "based_on": {"pack_id": pack.pack_id, "version": pack.version},
            "conversion": f"{words}, {now()}: {change.words()}",
            "change": asdict(change),
        },
    )
    return made, change


def _rounded(stack: LensStack, precision: str) -> LensStack:
    """The stack with the numbers that a file of that precision gives back."""
    tensors = dequantised(quantised(stack.lens_tensors(), precision))
    return replace(stack, heads=_heads(stack, tensors))


def _heads(stack: LensStack, tensors: dict[str, Tensor]) -> list[Head]:
    config: HeadConfig = head_of(stack)
    width = tensors["weight" if "weight" in tensors else "w1"].shape[-1]
    with torch.device("meta"):
        heads = [config.build(len(stack.names), width) for _ in stack.layers]
    for layer, head in enumerate(heads):
        state = {name: tensor[:, layer].float().contiguous() for name, tensor in tensors.items()}
        head.load_state_dict(state, assign=True)
    return heads


def _rebased(stack: LensStack, width: int, rank: int, encyclopedia: Encyclopedia | None) -> LensStack:
    if stack.basis is not None:
        raise PackError(f"the pack is on a basis of rank {stack.basis.rank} already; convert the one it was made from")
    if stack.pooling is not None:
        raise PackError("lenses that read whole texts by pools of their own have no form on a basis yet; train on one")
    if not 1 <= rank < width:
        raise ConfigError(f"rank={rank} of a basis: choose 1 to {width - 1}, fewer than the {width} features")
    tensors = stack.lens_tensors()
    first, bias = ("weight", "bias") if "weight" in tensors else ("w1", "b1")
    means, components, weights, biases = [], [], [], []
    for layer in range(len(stack.layers)):
        weight = tensors[first][:, layer].double()
        mean_D, root_DD, inverse_DD = _metric(encyclopedia, stack.layers[layer], width)
        _, _, right = torch.linalg.svd(_square(weight.reshape(-1, width) @ root_DD), full_matrices=False)
        vectors_DR = right[:rank].T
        means.append(mean_D)
        components.append(inverse_DD @ vectors_DR)
        weights.append(weight @ root_DD @ vectors_DR)
        biases.append(tensors[bias][:, layer].double() + weight @ mean_D)
    tensors = {**tensors, first: torch.stack(weights, 1).float(), bias: torch.stack(biases, 1).float()}
    basis = Basis(torch.stack(means).float(), torch.stack(components).float().contiguous())
    return replace(stack, heads=_heads(stack, tensors), basis=basis)


def _square(rows_MD: Tensor) -> Tensor:
    """A matrix with the same right singular vectors as a tall one, and no more rows than columns."""
    return rows_MD if len(rows_MD) <= rows_MD.shape[1] else torch.linalg.qr(rows_MD, mode="r").R


def _metric(encyclopedia: Encyclopedia | None, layer: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the states of a layer, the root of their covariance, and its inverse; without states 0, 1, 1."""
    if encyclopedia is None:
        unit = torch.eye(width, dtype=torch.float64)
        return torch.zeros(width, dtype=torch.float64), unit, unit
    states_BD = _states(encyclopedia, layer).double()
    mean_D = states_BD.mean(0)
    centred_BD = states_BD - mean_D
    values_D, vectors_DD = torch.linalg.eigh(centred_BD.T @ centred_BD / len(centred_BD))
    root_D = (values_D.clamp_min(0) + RIDGE * values_D.mean()).sqrt()
    return mean_D, (vectors_DD * root_D) @ vectors_DD.T, (vectors_DD / root_D) @ vectors_DD.T


def _states(encyclopedia: Encyclopedia, layer: int) -> Tensor:
    """Layer-normed pooled states of training rows, at most 20,000, evenly over the rows."""
    rows = encyclopedia.table.where("train")
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), NUM_STATES)).astype(int)]
    return torch.from_numpy(np.asarray(encyclopedia.pooled(layer, "mean", np.unique(chosen)), dtype=np.float32))


def _check_states(pack: LensPack, encyclopedia: Encyclopedia) -> None:
    spec = encyclopedia.spec
    encyclopedia.check_substrate(pack.recipe.substrate, pack.recipe.fingerprint)
    if missing := set(pack.recipe.layers) - set(spec.layers):
        raise PackError(f"the encyclopedia has no states of layer {min(missing)}; it has {list(spec.layers)}")


def _judge(pack: LensPack, stack: LensStack, precision: str, encyclopedia: Encyclopedia | None, seed: int) -> Change:
    sizes = {
        "bytes_before": stack_bytes(pack.stack, pack.stored),
        "bytes_after": stack_bytes(stack, precision),
    }
    banks = pack.stack.bank(), stack.bank()
    if encyclopedia is None:
        states = torch.randn(
            NUM_PROBES, len(stack.layers), pack.recipe.width, generator=torch.Generator().manual_seed(seed)
        )
        before, after = (bank.logits(normalise(states)) for bank in banks)
        words = f"{NUM_PROBES} random states (no encyclopedia= was given, so no AUROC)"
        return Change(**sizes, judged_on=words, correlation=_correlation(before, after))
    return Change(**sizes, **_auroc_change(pack, stack, encyclopedia))


def _auroc_change(pack: LensPack, stack: LensStack, encyclopedia: Encyclopedia) -> dict[str, Any]:
    table, rows = encyclopedia.table, encyclopedia.table.where("test")
    known = [name for name in table.concepts if name in set(pack.names)]
    if not known or not len(rows):
        raise PackError("the encyclopedia has no test texts about the pack's concepts; give another, or none")
    columns = [table.concepts.index(name) for name in known]
    labels_SN, weights_SN = (matrix[:, columns] for matrix in table.matrices(rows))
    pool = "mean" if pack.stack.pooling is not None else pack.recipe.pooling
    x_SLD = pooled_states(encyclopedia, pack.stack.layers, "mean", rows)
    areas, logits = [], []
    for part in (pack.stack.rows(known), stack.rows(known)):
        logits.append(part.bank().logits(x_SLD))
        read_SN = text_level_logits(part, encyclopedia, rows, pool=pool, wanted_SN=weights_SN > 0)
        areas.append(auroc(read_SN, labels_SN, weights_SN))
    judged_N = np.isfinite(areas[0]) & np.isfinite(areas[1])
    if not judged_N.any():
        raise PackError("the encyclopedia has test texts of both labels for none of the pack's concepts")
    before, after = (area[judged_N] for area in areas)
    return {
        "judged_on": f"{len(rows):,} test texts of the encyclopedia, {int(judged_N.sum()):,} concepts",
        "correlation": _correlation(*logits),
        "auroc_before": float(before.mean()),
        "auroc_after": float(after.mean()),
        "largest_loss": float((before - after).max()),
    }


def _correlation(before_BN: Tensor, after_BN: Tensor) -> float:
    """Least over lenses, of those whose logits vary."""
    before_BN, after_BN = (logits.double() - logits.double().mean(0) for logits in (before_BN, after_BN))
    norm_N = before_BN.norm(dim=0) * after_BN.norm(dim=0)
    varied_N = norm_N > 0
    products_N = (before_BN * after_BN).sum(0)[varied_N] / norm_N[varied_N]
    return float(products_N.min()) if len(products_N) else 1.0


def stack_bytes(stack: LensStack, precision: str) -> int:
    """Bytes of a stack's tensors on disk."""
    parts = [*quantised(stack.lens_tensors(), precision).values(), *stack.calibration_tensors().values()]
    if stack.basis is not None:
        parts += stack.basis.state_dict().values()
    if stack.pooling is not None:
        parts += stack.pooling.tensors().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in parts)
