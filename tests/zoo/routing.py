"""Layers that see only some examples or positions, flat batches, graphs, control flow that depends on data."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import ZooTask, right
from zoo.data import CLASSES, VOCABULARY, generator, labelled, lengths, mlp, pad, texts

ROWS = labelled(6)
NEGATIVE_FIRST = sorted(ROWS, key=lambda row: bool(row[0][0] > 0))
POSITIVE_FIRST = NEGATIVE_FIRST[::-1]


class Branch(nn.Module):
    """A second layer for examples whose first feature is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = self.all(x), x[:, 0] > 0
        if chosen.any():
            h = h.clone()
            h[chosen] = self.some(h[chosen])
        return self.head(h.relu())


for name, rows in {
    "taken_by_the_first_rows": POSITIVE_FIRST,
    "not_taken_by_the_first_rows": NEGATIVE_FIRST,
    "taken_by_the_second_row": [NEGATIVE_FIRST[0], *POSITIVE_FIRST[:-1]],
}.items():
    right(f"branch_{name}")(lambda rows=rows: ZooTask(Branch, rows))


class RareBranch(Branch):
    """Hardly any example takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x[:, :1] - 1.6, x[:, 1:]], dim=1))


@right()
def branch_taken_by_few() -> ZooTask:
    return ZooTask(RareBranch, NEGATIVE_FIRST)


class Experts(nn.Module):
    """Tokens are routed to their best experts; each expert gets only its tokens."""

    def __init__(self, best: int, gather: str) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(VOCABULARY, 6, padding_idx=0), nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList([mlp(6, 6) for _ in range(4)])
        self.head, self.best, self.gather = nn.Linear(6, 3), best, gather

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(0, 1)
        weights, chosen = self.router(h).softmax(-1).topk(self.best)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            if self.gather == "mask":
                for place in range(self.best):
                    mask = chosen[:, place] == number
                    out = out.masked_scatter(mask[:, None], out[mask] + weights[mask, place, None] * expert(h[mask]))
                continue
            token, place = torch.where(chosen == number)
            if len(token):
                out = out.index_add(0, token, weights[token, place, None] * expert(h.index_select(0, token)))
        keep = (x != 0).float()[..., None]
        return self.head((out.view(*x.shape, -1) * keep).sum(1) / keep.sum(1))


for best, gather in ((1, "index"), (2, "index"), (1, "mask"), (2, "mask")):
    right(f"experts_top_{best}_by_{gather}", rotates=gather == "index")(
        partial(lambda best, gather: ZooTask(lambda: Experts(best, gather), texts(), collate=pad), best, gather)
    )


class DenseExperts(nn.Module):
    """All experts at once: parameters [experts, in, out] in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,bi,eio->bo", self.gate(x).softmax(-1), x, self.weight)


@right()
def experts_as_one_parameter() -> ZooTask:
    return ZooTask(DenseExperts, ROWS)


class GroupedHeads(nn.Module):
    """Each domain has a head of its own; the examples of the batch are grouped by it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(6, 5), nn.ModuleDict({str(domain): nn.Linear(5, 3) for domain in range(3)})

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        h = self.body(x).relu()
        out = h.new_zeros(len(x), 3)
        for number in domain.unique().tolist():
            mask = domain == number
            out[mask] = self.heads[str(number)](h[mask])
        return out


@right()
def a_head_for_each_domain() -> ZooTask:
    rows = [(x, row % 7 % 3, y) for row, (x, y) in enumerate(ROWS)]
    return ZooTask(GroupedHeads, rows, lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2], reduction="none"))


class EarlyExit(nn.Module):
    """Examples that are sure enough leave after the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.exit, self.head = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        out = self.exit(h)
        unsure = (out.softmax(-1).amax(-1) < 0.5).nonzero().flatten()
        if not len(unsure):
            return out
        return out.index_copy(0, unsure, self.head(self.b(h.index_select(0, unsure)).relu()))


@right()
def early_exit() -> ZooTask:
    return ZooTask(EarlyExit, ROWS)


class Recursive(nn.Module):
    """How often a layer is used depends on the example, through .item()."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for h in x.split(1):
            for _ in range(1 + int(h.abs().sum().item()) % 3):
                h = self.step(h).tanh()
            outputs.append(self.head(h))
        return torch.cat(outputs)


@right()
def loops_whose_length_depends_on_the_example() -> ZooTask:
    return ZooTask(Recursive, ROWS)


class Trees(nn.Module):
    """A tree-structured network: examples are nested tuples, computed one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf, self.join, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(12, 6), nn.Linear(6, 3)

    def vector(self, tree: Any) -> Tensor:
        if isinstance(tree, int):
            return self.leaf(torch.tensor(tree))
        return self.join(torch.cat([self.vector(part) for part in tree])).tanh()

    def forward(self, trees: list[Any]) -> Tensor:
        return self.head(torch.stack([self.vector(tree) for tree in trees]))


def tree(words: list[int]) -> Any:
    half = len(words) // 2
    return words[0] if len(words) == 1 else (tree(words[:half]), tree(words[half:]))


@right()
def recursive_network_over_trees() -> ZooTask:
    rows = [(tree(x.tolist()), y) for x, y in texts(lengths(1, 7, first=(1, 2)))]
    collate = lambda ex: ([x for x, _ in ex], torch.tensor([y for _, y in ex]))  # noqa: E731
    return ZooTask(Trees, rows, collate=collate)


class Folded(nn.Module):
    """Positions are folded into the batch: [batch, length, width] -> [batch x length, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = (x != 0).float()[..., None]
        return (self.head(self.embed(x).reshape(-1, 8)).reshape(*x.shape, 3) * keep).sum(1) / keep.sum(1)


for name, first in {"of_length_one_first": (1, 1), "of_any_length": (5, 3)}.items():
    right(f"positions_folded_{name}", rotates=True)(
        lambda first=first: ZooTask(Folded, texts(lengths(1, 7, first=first)), collate=pad)
    )


class OnlyReal(nn.Module):
    """Only tokens that are no padding go through the layers, as one flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, 8), mlp(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = x != 0
        h = self.body(self.embed(x[keep]))
        owner = keep.nonzero()[:, 0]
        return self.head(h.new_zeros(len(x), 8).index_add(0, owner, h) / keep.sum(1, keepdim=True))


@right()
def padding_left_out_of_the_layers() -> ZooTask:
    return ZooTask(OnlyReal, texts(), collate=pad)


class TimeFirst(nn.Module):
    """[batch, time, width] is turned to [time, batch, width] for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x.transpose(0, 1)).relu())).mean(0)


for steps in (5, 2):  # 2: as many as in a batch of two
    right(f"time_first_{steps}_steps", rotates=steps == 5)(lambda steps=steps: ZooTask(TimeFirst, labelled(steps, 6)))


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCABULARY, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(tokens, offsets))


def flat(examples: list[Any]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """All tokens in one list, and where each example's start."""
    sizes = torch.tensor([0, *(len(x) for x, _ in examples[:-1])])
    return (torch.cat([x for x, _ in examples]), sizes.cumsum(0)), torch.tensor([y for _, y in examples])


def unpacked(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(*b[0]), b[1], reduction="none")


for mode in ("mean", "sum", "max"):
    right(f"embedding_bag_{mode}")(lambda mode=mode: ZooTask(lambda: Bags(mode), texts(), unpacked, flat))


class RectangularBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCABULARY, 8, padding_idx=0, mode="sum"), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


@right()
def embedding_bag_of_padded_rows() -> ZooTask:
    return ZooTask(RectangularBag, texts(), collate=pad)


class GraphNetwork(nn.Module):
    """All graphs of the batch are one: nodes [nodes, 4], edges [2, edges], and the graph of each node."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.edge, self.norm = nn.Linear(12, 6), nn.LayerNorm(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, graphs: int) -> Tensor:
        source, target = edges
        h = (self.own(nodes) + torch.zeros(len(nodes), 6).index_add(0, target, self.other(nodes)[source])).relu()
        messages = self.edge(torch.cat([h[source], h[target]], 1)).tanh()
        h = self.norm(h + torch.zeros_like(h).index_add(0, target, messages))
        return self.head(torch.zeros(graphs, 6).index_add(0, graph, h))


def graphs() -> list[tuple[Tensor, Tensor, int]]:
    drawn, rows = generator(), []
    for size in lengths(2, 7):
        edges = torch.randint(size, (2, 2 * size), generator=drawn)
        rows.append((torch.randn(size, 4, generator=drawn), edges, int(torch.randint(CLASSES, (), generator=drawn))))
    return rows


def joined(examples: list[Any]) -> dict[str, Any]:
    sizes = torch.tensor([len(nodes) for nodes, _, _ in examples])
    starts = (sizes.cumsum(0) - sizes).tolist()
    return {
        "nodes": torch.cat([nodes for nodes, _, _ in examples]),
        "edges": torch.cat([edges + start for (_, edges, _), start in zip(examples, starts, strict=True)], 1),
        "graph": torch.arange(len(examples)).repeat_interleave(sizes),
        "graphs": len(examples),
        "y": torch.tensor([y for _, _, y in examples]),
    }


def graph_loss(m: nn.Module, b: dict[str, Any]) -> Tensor:
    return F.cross_entropy(m(b["nodes"], b["edges"], b["graph"], b["graphs"]), b["y"], reduction="none")


for norm in (False, True):
    right(f"graph_network{'_with_norm' if norm else ''}")(
        lambda norm=norm: ZooTask(lambda: GraphNetwork(norm), graphs(), graph_loss, joined)
    )


@right()
def variable_numbers_of_boxes() -> ZooTask:
    """Detection: a list of targets for each image, the losses of an image's boxes summed over its own."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        owner = torch.arange(len(b[1])).repeat_interleave(torch.tensor([len(boxes) for boxes in b[1]]))
        losses = (m(b[0])[owner] - torch.cat(b[1])).square().sum(1)
        return losses.new_zeros(len(b[1])).index_add(0, owner, losses)

    rows = [(x, torch.randn(size, 3)) for (x, _), size in zip(ROWS, lengths(1, 5), strict=True)]
    return ZooTask(mlp, rows, loss, lambda ex: (torch.stack([x for x, _ in ex]), [boxes for _, boxes in ex]))
