"""Tasks whose every text is what somebody writes who wants a page to run it: for services that open them by name.

`HOSTILE` has a class, `TABLE` features and categories, `ELSEWHERE` a rendering that names another server.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tiny
from gradtrace.tasks import TabularRegression, TextClassification, Vocabulary

SCRIPT = '"\'><img src=x onerror="harmed=1"><script>harmed=1</script>${harmed=1}'
FILE_NAME = SCRIPT.replace("/", "")
INDEX_NAME = "<img src=x onerror=harmed=1>"  # an index's name is short
WORDS, LENGTH, ROWS = 80, 40, 12


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.classifier = nn.Embedding(WORDS, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.classifier((self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


_texts = [f"{SCRIPT} film {row} was {'fine' if row % 2 else 'dull'}" for row in range(ROWS)]
_labels = [row % 2 for row in range(ROWS)]
_vocabulary = Vocabulary(_texts, WORDS)
TEXTS = TextClassification(
    Bag,
    (_texts, _labels),
    (_texts, _labels),
    vocabulary_size=WORDS,
    encode=lambda text: _vocabulary.encode(text, LENGTH),
    class_names=(f"dull {SCRIPT}", f"fine {SCRIPT}"),
)

_houses = [[-122.0 + row, 37.0 + row % 5, float(row), (SCRIPT, "BAY")[row % 2]] for row in range(ROWS)]
TABLE = TabularRegression(
    lambda: nn.Linear(5, 1),
    (_houses, [float(row) for row in range(ROWS)]),
    (_houses[:4], [1.5, 2.0, 3.0, 4.0]),
    feature_names=("longitude", "latitude", f"age {SCRIPT}", f"place {SCRIPT}"),
    categories={f"place {SCRIPT}": (SCRIPT, "BAY")},
    mean=(-116.0, 39.0, 6.0),
    std=(4.0, 2.0, 4.0),
)

_SVG = "<svg xmlns='http://www.w3.org/2000/svg' onload='harmed=1'><script>harmed=1</script></svg>"
PICTURES: list[dict[str, Any]] = [
    {"image": f"https://elsewhere.example/picture.png{SCRIPT}"},
    {"image": f"data:image/svg+xml,{_SVG}"},
    {"image": "javascript:harmed=1"},
    {SCRIPT: SCRIPT},
]


class Elsewhere(tiny.ClassTask):
    """Its renderings are those of a task that nobody has looked through."""

    def __init__(self) -> None:
        super().__init__(tiny.mlp, tiny.classes(ROWS))
        self.query = tiny.classes(4, seed=1)

    def render(self, example: Any) -> dict[str, Any]:
        return PICTURES[int(example[0][0] > 0) + 2 * int(example[0][1] > 0)]


ELSEWHERE = Elsewhere()
