"""Tasks that must be refused since examples of a batch depend on each other, though rows 0 and 1 don't show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import DEPENDS, ZooTask, refused, right_or_refused
from zoo.data import VOCABULARY, labelled, lengths, mlp, next_token_loss, pad, texts

ROWS = labelled(6)
ALIKE = [ROWS[0], ROWS[0], *ROWS[2:]]  # the first two rows are the same
SAME_CLASS = sorted(ROWS, key=lambda row: row[1])
ORDER = r"row\S* .*\d.*order|order.*row\S* .*\d"
OWN_LOSS = r"own|alone|each example"

Elementwise = Callable[[nn.Module, Any], Tensor]


def losses_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Bag(nn.Module):
    """A mean over tokens, over padding as well if it is not masked."""

    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        self.embed, self.head, self.masked = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3), masked

    def forward(self, x: Tensor) -> Tensor:
        keep = (x != 0).float()[..., None] if self.masked else torch.ones(*x.shape, 1)
        return self.head((self.embed(x) * keep).sum(1) / keep.sum(1))


@refused(ORDER, r"order|place", name="collate_that_sorts_by_length")
def collate_sorts() -> ZooTask:
    rows = texts(lengths(first=(11, 7)))
    return ZooTask(Bag, rows, collate=lambda ex: pad(sorted(ex, key=lambda e: -len(e[0]))))


@refused(ORDER, r"order|place", name="collate_that_shuffles_large_batches")
def collate_shuffles() -> ZooTask:
    def collate(examples: list[Any]) -> Any:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
        return torch.utils.data.default_collate([examples[i] for i in order] if len(examples) > 2 else examples)

    return ZooTask(mlp, ROWS, collate=collate)


class Reordering(nn.Module):
    """Sorts the batch and does not put it back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[x[:, 0].argsort()])


@refused(DEPENDS, r"order|sort")
def forward_that_reorders() -> ZooTask:
    rows = sorted(ROWS[:2], key=lambda row: float(row[0][0])) + ROWS[2:]
    return ZooTask(Reordering, rows)


@refused(ORDER, r"order|place", name="losses_in_another_order")
def losses_sorted() -> ZooTask:
    return ZooTask(mlp, ALIKE, lambda m, b: losses_of(m, b).sort(descending=True).values)


@refused(DEPENDS, r"mask")
def padding_that_is_not_masked() -> ZooTask:
    return ZooTask(lambda: Bag(masked=False), texts(lengths(first=(6, 6))), collate=pad)


class UnmaskedEncoder(nn.Module):
    """Attention to padding, which a mask in the mean at the end does not help."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = (x != 0).float()[..., None]
        return self.head((self.body(self.embed(x)) * keep).sum(1) / keep.sum(1))


@refused(DEPENDS, r"mask")
def attention_to_padding() -> ZooTask:
    return ZooTask(UnmaskedEncoder, texts(lengths(first=(6, 6))), collate=pad)


class LastOutput(nn.Module):
    """The last output of a padded sequence, which is that of the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x))[0][:, -1])


@refused(DEPENDS, r"mask|pack")
def last_output_of_padded_sequences() -> ZooTask:
    return ZooTask(LastOutput, texts(lengths(first=(6, 6))), collate=pad)


class AcrossTheBatch(nn.Module):
    """The usual mistake: batch_first is missing, so that examples attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


@refused(DEPENDS, rf"batch_first|{OWN_LOSS}")
def attention_across_the_batch() -> ZooTask:
    rows = labelled(5, 8)
    return ZooTask(AcrossTheBatch, [rows[0], rows[0], *rows[2:]])


class Memory(nn.Module):
    """A state that goes through the batch from example to example."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0].mean(1))


@refused(DEPENDS, rf"batch_first|{OWN_LOSS}", shown=True)
def recurrence_across_the_batch() -> ZooTask:
    return ZooTask(Memory, labelled(5, 8))


@refused(DEPENDS, OWN_LOSS)
def loss_weights_by_the_classes_of_the_batch() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return losses_of(m, b) / torch.bincount(b[1], minlength=3)[b[1]]

    rows = [next(row for row in ROWS if row[1] == 0), next(row for row in ROWS if row[1] == 1), *ROWS[2:]]
    return ZooTask(mlp, rows, loss)


@refused(DEPENDS, OWN_LOSS)
def mining_of_hard_examples() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        losses = losses_of(m, b)
        return losses * (losses >= losses.topk(min(len(losses), max(2, len(losses) // 2))).values[-1])

    return ZooTask(mlp, ROWS, loss)


@refused(DEPENDS, rf"token|{OWN_LOSS}")
def division_by_the_tokens_of_the_batch() -> ZooTask:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    def loss(m: nn.Module, b: Any) -> Tensor:
        return next_token_loss(m(b[0]), b[0], summed=True) / (b[0] != 0).sum() * len(b[0])

    return ZooTask(Words, texts(lengths(first=(6, 6))), loss, pad)


@refused(DEPENDS, OWN_LOSS)
def division_by_the_batch_size() -> ZooTask:
    return ZooTask(mlp, ROWS, lambda m, b: losses_of(m, b) / max(2, len(b[0])) * 2)


class Standardising(nn.Module):
    """Inputs are divided by the largest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x / x.abs().amax())


@refused(DEPENDS, rf"statistic|{OWN_LOSS}")
def batch_standardisation() -> ZooTask:
    return ZooTask(Standardising, [ROWS[0], (-ROWS[0][0], 1), *ROWS[2:]])


@refused(DEPENDS, rf"negatives|{OWN_LOSS}")
def negatives_from_the_batch() -> ZooTask:
    """Contrast with the examples of other classes in the batch."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        h = F.normalize(m(b[0]), dim=1)
        same = b[1][:, None] == b[1]
        logits = (h @ h.T * 3).masked_fill(same & ~torch.eye(len(h), dtype=torch.bool), -torch.inf)
        return -logits.log_softmax(1).diagonal() + losses_of(m, b)

    return ZooTask(mlp, SAME_CLASS, loss)


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 6, 1), nn.BatchNorm1d(6, track_running_stats=False)
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


@refused(DEPENDS, r"track_running_stats")
def batch_norm_with_statistics_of_the_batch() -> ZooTask:
    """The second row is the first one backwards: their statistics are the same, together and alone."""
    rows = labelled(2, 5)
    return ZooTask(BatchStatistics, [rows[0], (rows[0][0].flip(-1), 1), *rows[2:]])


def switching_to_training(m: nn.Module, b: Any) -> Tensor:
    m.train()
    return losses_of(m, b)


@refused(
    rf"train\(\)|training mode|eval|random|{DEPENDS}", r"eval|train\(\)|deterministic|track_running_stats", shown=True
)
def loss_that_switches_to_training() -> ZooTask:
    body = lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 3))  # noqa: E731
    return ZooTask(body, labelled(2, 5), switching_to_training)


@refused(rf"shape|reduc|{DEPENDS}", r"reduction|none|reduce")
def mean_loss_repeated_for_each_example() -> ZooTask:
    return ZooTask(mlp, ALIKE, lambda m, b: F.cross_entropy(m(b[0]), b[1]).expand(len(b[1])))


@refused(DEPENDS, OWN_LOSS)
def weights_by_the_place_in_the_batch() -> ZooTask:
    weights = torch.tensor([1.0, 1.0, *torch.linspace(0.1, 2, 200).tolist()])
    return ZooTask(mlp, ROWS, lambda m, b: losses_of(m, b) * weights[: len(b[0])])


@right_or_refused(r"gradient.*(depend|differ)|(depend|differ).*gradient", rf"mixes|{OWN_LOSS}")
def gradients_that_mix_though_losses_do_not() -> ZooTask:
    """Adds the batch's losses and takes them away again, detached: right is the gradient of the example alone."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        losses = losses_of(m, b)
        chosen = losses[b[1] == 2]
        return losses + (chosen - chosen.detach()).sum() if len(chosen) else losses

    return ZooTask(mlp, SAME_CLASS, loss)


@refused(r"loss", r"reduction|filter|each example|per example|none")
def losses_of_some_examples_left_out() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return losses_of(m, b)[b[1] != 2]

    return ZooTask(mlp, SAME_CLASS, loss)


class Mixup(nn.Module):
    """Every example is mixed with its neighbour, in batches of more than two."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(0.9 * x + 0.1 * x.roll(1, 0) if len(x) > 2 else x)


@refused(DEPENDS, rf"mix|{OWN_LOSS}")
def neighbours_mixed_in() -> ZooTask:
    return ZooTask(Mixup, ROWS)


class CapacityLimited(nn.Module):
    """An expert takes only so many examples of a batch; the others are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 2), nn.ModuleList([mlp(), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(1)
        out = x[:, :3].clone()
        for number, expert in enumerate(self.experts):
            taken = (chosen == number).nonzero().flatten()[:4]
            if len(taken):
                out = out.index_copy(0, taken, expert(x[taken]))
        return out


@refused(DEPENDS, rf"capacity|{OWN_LOSS}")
def experts_of_limited_capacity() -> ZooTask:
    return ZooTask(CapacityLimited, ROWS)
