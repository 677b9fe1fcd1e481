"""DBpedia-14 and pooled word embeddings (SWEM, Shen et al. 2018), as in the TracIn paper: what is a text about?"""

import gzip
import json
from functools import cache

import torch
from torch import Tensor, nn

from gradtrace.tasks import TextClassification, Vocabulary, data_file

CLASSES = ("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building",
           "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork")  # fmt: skip
WORDS, LENGTH = 20_000, 128


class Swem(nn.Module):
    """The mean and the maximum of a text's word embeddings, then two fully connected layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.classifier = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, len(CLASSES)))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        words, padding = self.embedding(ids), ~mask[:, :, None]  # [batch, length, width], [batch, length, 1]
        mean = words.masked_fill(padding, 0).sum(1) / mask.sum(1, keepdim=True)
        return self.classifier(torch.cat([mean, words.masked_fill(padding, -torch.inf).amax(1)], 1))


@cache
def load(split: str) -> tuple[list[str], list[int]]:
    with gzip.open(data_file(f"dbpedia14-{split}.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"] for row in rows], [row["label"] for row in rows]


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(load("train")[0], WORDS)


TASK = TextClassification(
    Swem,
    train=lambda: load("train"),
    query=lambda: load("test"),
    vocabulary_size=WORDS,
    encode=lambda text: vocabulary().encode(text, LENGTH),
    decode=lambda ids: vocabulary().decode(ids),
    max_length=LENGTH,
    class_names=CLASSES,
)
