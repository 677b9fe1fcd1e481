"""Why test texts are taken for another class, and which training rows may be mislabelled.

`make demo DATASET=dbpedia ONCE=1` first, then `python examples/dbpedia/explain_errors.py`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from task import CLASSES, TASK
from torch.utils.data import DataLoader

import gradtrace as gt
from gradtrace.checkpoints import load_into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/dbpedia"), help="what the demo left")
    parser.add_argument("--errors", type=int, default=3, help="how many are explained one by one")
    parser.add_argument("--k", type=int, default=3, help="opponents of each")
    arguments = parser.parse_args()
    console = Console()
    errors = misclassified(arguments.run / "checkpoints")
    console.print(
        f"{1 - len(errors) / len(TASK.query):.2%} of {len(TASK.query):,} test texts right, {len(errors)} wrong"
    )
    index = gt.open_index(arguments.run / "index", TASK)
    for row, predicted in list(errors.items())[: arguments.errors]:
        text, label = TASK.query[row]
        console.print(f"\n[bold]{escape(text)}[/bold]\n{CLASSES[label]}, taken for {CLASSES[predicted]}")
        filters = {
            "opponents": None,
            f"opponents among {CLASSES[predicted]} rows classified rightly": gt.RowFilter(
                [predicted], correct_only=True
            ),
        }
        for title, row_filter in filters.items():
            found = index.influence([TASK.query[row]], k=arguments.k, filter=row_filter)[0].opponents
            console.print(table(title, [(hit, f"{hit.score:+.3g}") for hit in found], "score"))
    console.print(suspects(index, list(errors)))


def misclassified(checkpoints: Path) -> dict[int, int]:
    """The predicted class of every test row that the last checkpoint gets wrong."""
    model = TASK.model()
    load_into(model, gt.load_checkpoints(checkpoints)[-1])
    with torch.no_grad():
        batches = DataLoader(TASK.query, 500, collate_fn=TASK.collate)
        found = torch.cat([TASK.predict(model.eval(), batch).argmax(1) for batch in batches]).tolist()
    return {row: predicted for row, predicted in enumerate(found) if predicted != TASK.query[row][1]}


def suspects(index: gt.Index, errors: list[int], k: int = 10, most: int = 10) -> Table:
    """The misclassified training rows that are most often among the k strongest opponents of a misclassified text."""
    results = index.influence([TASK.query[row] for row in errors], k=k)
    opponents = [hit for result in results for hit in result.opponents if not hit.correct]
    times, hits = Counter(hit.row for hit in opponents), {hit.row: hit for hit in opponents}
    chosen = [(hits[row], str(count)) for row, count in times.most_common(most)]
    return table(f"Misclassified rows most often among the {k} strongest opponents of an error", chosen, "errors")


def table(title: str, hits: list[tuple[gt.Hit, str]], measured: str) -> Table:
    found = Table(title=title, title_justify="left")
    for name in ("row", measured, "label", "prediction"):
        found.add_column(name, justify="right" if name in ("row", measured) else "left", no_wrap=True)
    found.add_column("text", min_width=24)
    for hit, value in hits:
        text = TASK.train[hit.row][0]
        shown = text if len(text) <= 160 else f"{text[:159]}…"
        found.add_row(str(hit.row), value, CLASSES[hit.label], CLASSES[hit.prediction], escape(shown))
    return found


if __name__ == "__main__":
    main()
