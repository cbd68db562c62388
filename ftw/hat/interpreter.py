"""The interpreter: one transformer that reads states and says, for all concepts together, which one they are about.

Lenses ask of each concept whether it is present; the interpreter makes concepts compete, so its answer is a
distribution with a confidence. It reads any number of states as tokens: one pooled state, the states of several layers,
or every token of a text. Where a state comes from (its *slot*: layer and pool) is learnt; its place in a text is not,
since the states carry that themselves. So the answer does not depend on the order of the tokens, nor on padding.

1. Standardise each state by its slot, project it to the interpreter's width, add the slot's own vector.
2. Put a learnt query before them; encode all with pre-norm transformer blocks (Xiong et al. 2020).
3. The query's output, normed, gives a logit for every concept; with a tree, for every node of it.
4. With a similarity head it also gives an embedding; how near that lies to each concept's prototype adds to the logits.
5. With a direct path the mean state of each slot is projected onto directions in which concepts differ and texts about
   one concept do not, summed over the slots; its cosine to each concept's place there adds to the logits. Directions
   and places are computed, not trained (`ftw.map.training.interpreter_directions`).

Axes: B batch, T tokens (states), J slots, D model width of the substrate, W width, C concepts, K named nodes, Z width
of the similarity embedding, R directions.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftw.errors import ConceptError, ConfigError, PackError, SubstrateError
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.store import check_tensor, read_tensors, write_tensors
from ftw.paths import replace_folder

INFO, TENSORS = "interpreter.json", "interpreter.safetensors"
LARGEST_SIZE = 1 << 24  # of any size that a file gives: beyond it nothing was ever trained
MAX_INFO_BYTES = 64_000_000


@dataclass(kw_only=True)
class InterpreterConfig:
    """Size of an interpreter, and what it has beside the distribution over concepts.

    Attributes:
        width, num_blocks, num_heads, feedforward, dropout: of the transformer.
        hierarchical: probabilities along the tree of concepts, each node's children sharing what it has.
        similarity: width of an embedding that states of one concept share (trained contrastively); 0 for none.
        direct: most directions of the direct path (there are fewer with few concepts or features); 0 for no such path.
    """

    width: int = 512
    num_blocks: int = 4
    num_heads: int = 8
    feedforward: int = 2048
    dropout: float = 0.1
    hierarchical: bool = False
    similarity: int = 0
    direct: int = 0

    def check(self) -> None:
        """Raise ConfigError for sizes that cannot be."""
        for name in ("width", "num_blocks", "num_heads", "feedforward"):
            if not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise ConfigError(f"model.{name}={getattr(self, name)}: choose 1 or more")
        if self.width % self.num_heads:
            raise ConfigError(f"model.width={self.width} is no multiple of model.num_heads={self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout}: choose a share from 0 to below 1")
        for name in ("similarity", "direct"):
            if not 0 <= getattr(self, name) <= LARGEST_SIZE:
                raise ConfigError(f"model.{name}={getattr(self, name)}: choose 0 or more")


class Slot(NamedTuple):
    """Where a state comes from: a layer of the substrate, and "mean", "last", "tail" or "spread" of a text's tokens,
    or "token" for states of single tokens."""

    layer: int
    pool: str


class Interpreted(NamedTuple):
    """What the interpreter makes of its input.

    Attributes:
        logits_BC: of all its parts together. similarity_BZ: the unit embedding, if it has one.
        parts: logits [B, C] of the encoder, cosines to the prototypes and cosines of the direct path, where there are
            such; the logits are their sum, weighted by `mix` and `trust`.
    """

    logits_BC: Tensor
    similarity_BZ: Tensor | None
    parts: tuple[Tensor, Tensor | None, Tensor | None]


class Interpreter(nn.Module):
    """A distribution over C concepts from states of a substrate.

    Args:
        names: the concepts, in the order of the C axis. slots: what kinds of states it reads.
        state_width: D of the substrate. fingerprint: of the substrate.
        tree: of the concepts; needed by the hierarchical variant, and by `categories`.

    Raises:
        ConfigError: sizes that cannot be, fewer than two concepts, no slots, no tree where one is needed.
    """

    center_JD: Tensor
    scale_JD: Tensor
    temperature: Tensor
    prototypes_CZ: Tensor
    mix: Tensor
    directions_JDR: Tensor
    places_CR: Tensor
    trust: Tensor

    def __init__(
        self,
        config: InterpreterConfig,
        *,
        names: Sequence[str],
        slots: Sequence[Slot],
        state_width: int,
        fingerprint: str = "",
        tree: ConceptTree | None = None,
    ) -> None:
        super().__init__()
        config.check()
        if len(names) < 2 or not slots:
            raise ConfigError(f"an interpreter needs two concepts or more and a state to read; {len(names)} are given")
        if config.hierarchical and tree is None:
            raise ConfigError("the hierarchical interpreter needs a tree of the concepts; give a concept pack")
        self.config, self.names, self.slots = config, list(names), [Slot(*slot) for slot in slots]
        self.state_width, self.fingerprint, self.tree = state_width, fingerprint, tree
        width, num_slots = config.width, len(slots)
        self.register_buffer("center_JD", torch.zeros(num_slots, state_width))
        self.register_buffer("scale_JD", torch.ones(num_slots, state_width))
        self.register_buffer("temperature", torch.ones(()))
        bound = 1 / math.sqrt(state_width)
        self.project = nn.Parameter(torch.empty(num_slots, state_width, width).uniform_(-bound, bound))
        self.slot_vectors = nn.Parameter(torch.randn(num_slots, width) * 0.02)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width,
            config.num_heads,
            config.feedforward,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            block, config.num_blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.output = nn.Linear(width, tree.num_nodes if config.hierarchical and tree else len(names))
        self.similarity = nn.Linear(width, config.similarity) if config.similarity else None
        self.register_buffer("prototypes_CZ", torch.zeros(len(names) if config.similarity else 0, config.similarity))
        self.register_buffer("mix", torch.zeros(()))
        # The places of C concepts about their middle span C - 1 directions.
        num_directions = min(config.direct, len(names) - 1, num_slots * state_width)
        self.register_buffer("directions_JDR", torch.zeros(num_slots, state_width, num_directions))
        self.register_buffer("places_CR", torch.zeros(len(names) if num_directions else 0, num_directions))
        self.register_buffer("trust", torch.zeros(()))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the substrate that it reads, ascending."""
        return tuple(sorted({slot.layer for slot in self.slots}))

    def forward(self, x_BTD: Tensor, *, slots_T: Tensor | None = None, mask_BT: Tensor | None = None) -> Interpreted:
        """Logits for states that are layer-normed, as encyclopedias keep them.

        Args:
            slots_T: number of each token's slot; None: one token of every slot, in their order.
            mask_BT: True where there is a token, False where there is padding; None: no padding.

        Raises:
            SubstrateError: states of another width, or as many slots as there are no tokens.
        """
        encoded_BW = self.encode(x_BTD, slots_T=slots_T, mask_BT=mask_BT)
        encoded_BC = self.logits(encoded_BW)
        logits_BC, similarity_BZ, near_BC, direct_BC = encoded_BC, None, None, None
        if self.similarity is not None:
            similarity_BZ = nn.functional.normalize(self.similarity(encoded_BW).float(), dim=-1)
            near_BC = similarity_BZ @ self.prototypes_CZ.T
            logits_BC = logits_BC + self.mix * near_BC
        if self.config.direct:
            direct_BC = self.direct(x_BTD, slots_T=slots_T, mask_BT=mask_BT) @ self.places_CR.T
            logits_BC = logits_BC + self.trust * direct_BC
        return Interpreted(logits_BC, similarity_BZ, (encoded_BC, near_BC, direct_BC))

    def encode(self, x_BTD: Tensor, *, slots_T: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
        """What the query has gathered, [B, W] (see `forward`)."""
        x_BTD, slots_T = self._standardised(x_BTD, slots_T, mask_BT)
        tokens_BTW = self._projected(x_BTD, slots_T) + self.slot_vectors[slots_T]
        query_B1W = self.query.expand(len(x_BTD), 1, -1).to(tokens_BTW.dtype)
        padding_BT = None if mask_BT is None else nn.functional.pad(~mask_BT, (1, 0), value=False)
        encoded_BTW = self.encoder(torch.cat([query_B1W, tokens_BTW], dim=1), src_key_padding_mask=padding_BT)
        return encoded_BTW[:, 0]

    def direct(self, x_BTD: Tensor, *, slots_T: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
        """Where the states lie along the directions, of length one, [B, R] (see `forward`)."""
        # In float32: directions along which states hardly vary have large weights, and rounding would fill them.
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTD, slots_T = self._standardised(x_BTD, slots_T, mask_BT)
            share_BTJ = nn.functional.one_hot(slots_T, len(self.slots)).to(x_BTD.dtype).expand(len(x_BTD), -1, -1)
            if mask_BT is not None:
                share_BTJ = share_BTJ * mask_BT.unsqueeze(-1)
            share_BTJ = share_BTJ / share_BTJ.sum(1, keepdim=True).clamp_min(1)
            means_BJD = share_BTJ.transpose(1, 2) @ x_BTD
            return nn.functional.normalize(means_BJD.flatten(1) @ self.directions_JDR.flatten(0, 1), dim=-1)

    def _standardised(self, x_BTD: Tensor, slots_T: Tensor | None, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states in units of their slots, padding empty, and the slots' numbers."""
        if slots_T is None:
            slots_T = torch.arange(len(self.slots), device=x_BTD.device)
        if x_BTD.ndim != 3 or x_BTD.shape[1:] != (len(slots_T), self.state_width) or not len(slots_T):
            raise SubstrateError(
                f"states of shape {tuple(x_BTD.shape)} for an interpreter of {len(slots_T)} tokens "
                f"(slots {[f'{slot.layer}/{slot.pool}' for slot in self.slots]}) and width {self.state_width}"
            )
        # Padding may hold anything, and nothing times zero is not always zero.
        x_BTD = x_BTD.float() if mask_BT is None else x_BTD.float().masked_fill(~mask_BT.unsqueeze(-1), 0)
        return (x_BTD - self.center_JD[slots_T]) / self.scale_JD[slots_T], slots_T

    def _projected(self, x_BTD: Tensor, slots_T: Tensor) -> Tensor:
        """Every token through the projection of its slot, [B, T, W]."""
        used = slots_T.unique().tolist()
        if len(used) == len(slots_T):
            return torch.einsum("btd,tdw->btw", x_BTD, self.project[slots_T])
        order, parts = list[Tensor](), list[Tensor]()
        for slot in used:
            places = (slots_T == slot).nonzero()[:, 0]
            order.append(places)
            parts.append(x_BTD[:, places] @ self.project[slot])
        return torch.cat(parts, dim=1)[:, torch.cat(order).argsort()]

    def logits(self, encoded_BW: Tensor) -> Tensor:
        """Logits [B, C] of what `encode` gave; log-probabilities where there is a hierarchy."""
        logits = self.output(encoded_BW).float()
        if self.config.hierarchical and self.tree is not None:
            return self.tree.log_probabilities(logits)
        return logits

    @torch.no_grad()
    def probabilities(self, x_BTD: Tensor, **options: Any) -> Tensor:
        """Calibrated probability of every concept, [B, C], each row summing to one (arguments of `forward`)."""
        return calibrated(self(x_BTD, **options).logits_BC, self.temperature)

    def categories(self, probabilities_BC: Tensor) -> Mapping[str, Tensor]:
        """Probability of every category, [B] each: the sum over its concepts.

        Raises:
            ConfigError: there is no tree.
        """
        if self.tree is None:
            raise ConfigError("this interpreter was trained without a tree of concepts, so it knows no categories")
        nodes_BK = self.tree.node_probabilities(probabilities_BC)
        first = len(self.tree.concepts)
        return {name: nodes_BK[:, first + place] for place, name in enumerate(self.tree.categories)}

    def save(self, folder: Path | str) -> Path:
        """Write the interpreter into a folder, whole or not at all: JSON and safetensors.

        Raises:
            DiskFullError: no room; what was there before is as it was.
        """
        info = {
            "format": 1,
            "config": asdict(self.config),
            "concepts": self.names,
            "slots": [list(slot) for slot in self.slots],
            "state_width": self.state_width,
            "fingerprint": self.fingerprint,
            "parents": None if self.tree is None else self.tree.parents,
        }
        with replace_folder(Path(folder)) as temporary:
            write_tensors(temporary / TENSORS, self.state_dict())
            (temporary / INFO).write_text(json.dumps(info, ensure_ascii=False), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str) -> "Interpreter":
        """The interpreter of a folder, ready to read.

        Raises:
            PackError: none is there, or it is damaged.
        """
        folder = Path(folder)
        info = _read_info(folder)
        try:
            names, parents = [str(name) for name in info["concepts"]], info["parents"]
            config = InterpreterConfig(**info["config"])
            slots = [Slot(int(layer), str(pool)) for layer, pool in info["slots"]]
            width = int(info["state_width"])
            if not 1 <= width <= LARGEST_SIZE:
                raise ValueError(f"state_width {width}")
            tree = None if parents is None else ConceptTree(names, dict(parents))
            options = {"names": names, "slots": slots, "state_width": width, "tree": tree}
            with torch.device("meta"):
                shapes = {name: tuple(one.shape) for name, one in cls(config, **options).state_dict().items()}
        except (KeyError, TypeError, ValueError, AttributeError, ConceptError, ConfigError) as error:
            raise PackError(f"{folder / INFO} is not that of an interpreter ({error!r}); train it again") from error
        tensors = read_tensors(folder / TENSORS)
        checked = {name: check_tensor(tensors, name, shape, TENSORS) for name, shape in shapes.items()}
        interpreter = cls(config, **options, fingerprint=str(info.get("fingerprint", "")))
        interpreter.load_state_dict(checked)
        return interpreter.eval().requires_grad_(False)


def calibrated(logits_BC: Tensor, temperature: Tensor | float) -> Tensor:
    """Probabilities of logits at a temperature (Guo et al. 2017, On calibration of modern neural networks)."""
    return (logits_BC.float() / temperature).softmax(-1)


def confidence(probabilities_BC: Tensor) -> Tensor:
    """How sure a distribution over C concepts is, [B]: 1 - H / ln C; 0 for a uniform one, 1 for certainty."""
    entropy_B = torch.special.entr(probabilities_BC).sum(-1)
    return (1 - entropy_B / math.log(probabilities_BC.shape[-1])).clamp(0, 1)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        if path.stat().st_size > MAX_INFO_BYTES:
            raise PackError(f"{path} has {path.stat().st_size:,} bytes, over the limit of {MAX_INFO_BYTES:,}")
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackError(
            f"no interpreter at {folder}; train one with `ftw train experiment=interpreter`, or name one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PackError(f"{path} is not JSON ({error}); train the interpreter again") from error
    if not isinstance(info, dict) or info.get("format") != 1:
        raise PackError(f"{path} is not an interpreter of format 1; train it again")
    return info
