"""SST-2 and a small transformer encoder, trained from nothing: does a film critic like it?"""

import gzip
import json
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.tasks import TextClassification, Vocabulary, data_file

WORDS, LENGTH, WIDTH, HEADS = 10_000, 64, 64, 4


class Block(nn.Module):
    """Attention and two fully connected layers, each normalised first and added to its input.

    The projections are plain layers: nn.MultiheadAttention's are no modules, so that their gradients would be slow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_hidden = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.mixed = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [batch, length, width], [batch, length]
        parts = self.query_key_value(self.before_attention(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None])  # [batch, heads, length, part]
        x = x + self.dropout(self.mixed(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.hidden(self.before_hidden(x)))


class Encoder(nn.Module):
    """Words and their positions, two blocks, and the mean over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.classifier, self.dropout = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2), nn.Dropout(0.2)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.dropout(self.words(ids) + self.positions(positions))
        for block in self.blocks:
            x = block(x, mask)
        mean = self.norm(x).masked_fill(~mask[:, :, None], 0).sum(1) / mask.sum(1, keepdim=True)
        return self.classifier(mean)


@cache
def load(split: str) -> tuple[list[str], list[int]]:
    with gzip.open(data_file(f"sst2-{split}.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"] for row in rows], [row["label"] for row in rows]


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(load("train-sentences")[0], WORDS)


TASK = TextClassification(
    Encoder,
    train=lambda: load("train-sentences"),
    query=lambda: load("validation"),
    vocabulary_size=WORDS,
    encode=lambda text: vocabulary().encode(text, LENGTH),
    decode=lambda ids: vocabulary().decode(ids),
    max_length=LENGTH,
    class_names=("negative", "positive"),
)
