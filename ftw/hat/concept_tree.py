"""Concepts under their categories, and probabilities that agree along the way down.

Every node's children share its probability by a softmax of their own, so a leaf's probability is the product of the
choices on its path and a node's is the sum of what lies below it, exactly. A concept that has others below it gets a
leaf for itself beside them.

Axes: B batch, C concepts, M nodes that hold a logit, P nodes of the longest path, K named nodes (concepts, categories).

Source: Morin & Bengio 2005, Hierarchical probabilistic neural network language model (the product along a tree).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ftw.errors import ConceptError


class ConceptTree(nn.Module):
    """The tree over C concepts; its buffers go where the module goes.

    Args:
        concepts: in the order of the C axis. parents: of concepts and categories; one that is not listed, or None, is
            a root. Names that are only ever parents are categories.

    Raises:
        ConceptError: a concept twice, or a way up that comes back to where it began.
    """

    _paths_CP: Tensor
    _group_M: Tensor
    _below: Tensor

    def __init__(self, concepts: Sequence[str], parents: Mapping[str, str | None]) -> None:
        super().__init__()
        self.concepts = list(concepts)
        if len(set(self.concepts)) != len(self.concepts):
            raise ConceptError("a concept tree has a concept twice; give each once")
        paths = {name: _path(name, parents) for name in self.concepts}
        known = set(self.concepts)
        self.categories = sorted({up for path in paths.values() for up in path} - known)
        self.names = [*self.concepts, *self.categories]
        self.parents = {low: up for path in paths.values() for up, low in pairwise(path)}
        place = {name: number for number, name in enumerate(self.names)}
        inner = sorted(set(self.parents.values()) & known, key=place.__getitem__)
        own = {name: len(self.names) + number for number, name in enumerate(inner)}
        self.num_nodes = len(self.names) + len(own)
        # Group 0 holds the roots, group k + 1 the children of node k.
        group = [place[self.parents[name]] + 1 if name in self.parents else 0 for name in self.names]
        group += [place[name] + 1 for name in inner]
        longest = max(len(paths[name]) + (name in own) for name in self.concepts)
        rows = [[*map(place.__getitem__, paths[name]), *([own[name]] if name in own else [])] for name in self.concepts]
        # The number behind the last node stands for "no further step".
        padded = [row + [self.num_nodes] * (longest - len(row)) for row in rows]
        below = [(number, place[up]) for number, name in enumerate(self.concepts) for up in paths[name]]
        self.register_buffer("_paths_CP", torch.tensor(padded), persistent=False)
        self.register_buffer("_group_M", torch.tensor(group), persistent=False)
        self.register_buffer("_below", torch.tensor(below).T.contiguous(), persistent=False)

    @classmethod
    def of_categories(cls, concepts: Sequence[str], categories: Mapping[str, str]) -> "ConceptTree":
        """Two levels: every concept below its category, whose name is marked so that it is none of the concepts."""
        return cls(concepts, {name: f"[{categories[name]}]" for name in concepts if name in categories})

    def log_probabilities(self, logits_BM: Tensor) -> Tensor:
        """Log-probability of each concept itself, [B, C], from a logit for every node."""
        group_BM = self._group_M.expand(len(logits_BM), -1)
        size = (len(logits_BM), len(self.names) + 1)
        highest_BG = logits_BM.new_full(size, -torch.inf).scatter_reduce(1, group_BM, logits_BM.detach(), "amax")
        highest_BG = highest_BG.masked_fill(highest_BG.isinf(), 0)
        sums_BG = logits_BM.new_zeros(size).scatter_add(1, group_BM, (logits_BM - highest_BG.gather(1, group_BM)).exp())
        # Groups without nodes (below leaves) are never asked for; a one keeps their logarithm and its gradient finite.
        sums_BG = torch.where(sums_BG > 0, sums_BG, 1.0)
        steps_BM = logits_BM - (highest_BG + sums_BG.log()).gather(1, group_BM)
        steps_BM = torch.nn.functional.pad(steps_BM, (0, 1))
        return steps_BM[:, self._paths_CP].sum(-1)

    def node_probabilities(self, probabilities_BC: Tensor) -> Tensor:
        """Probability of each node or anything below it, [B, K] in the order of `names`: sums over its concepts."""
        nodes_BK = probabilities_BC.new_zeros(len(probabilities_BC), len(self.names))
        concepts, nodes = self._below
        return nodes_BK.index_add(1, nodes, probabilities_BC[:, concepts])


def _path(name: str, parents: Mapping[str, str | None]) -> list[str]:
    """From the root down to a concept."""
    path, up = [name], parents.get(name)
    while up is not None:
        if up in path:
            raise ConceptError(f"the way up from {name!r} comes back to {up!r}; mend the hierarchy")
        path.append(up)
        up = parents.get(up)
    return path[::-1]
