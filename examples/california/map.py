"""Draw a house and its comparables on the map of California, as in section 5.1 of the TracIn paper.

`make demo DATASET=california ONCE=1` first, then `python examples/california/map.py` (with `gradtrace[plots]`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from task import TASK

import gradtrace as gt

ENDS = {"proponents": "o", "opponents": "s"}
PRICES = {"cmap": "viridis", "norm": Normalize(50, 500)}  # in thousands of dollars


def draw(result: gt.InfluenceResult, place: np.ndarray, out: Path) -> None:
    """`place`: longitude and latitude of the query. Left the state, right the surroundings of the query."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for panel, span in zip(panels, (None, 0.6), strict=True):
        points = draw_map(panel, result, place, span)
    panels[0].set_title("California")
    panels[1].set_title("around the query")
    panels[0].legend(loc="upper right")
    figure.colorbar(points, ax=panels, label="price, thousands of dollars", extend="both", pad=0.01)
    label, prediction = result.label or 0, result.prediction or 0
    figure.suptitle(f"A house group worth ${label:,.0f}, predicted ${prediction:,.0f}: which rows taught the model so?")
    figure.savefig(out, dpi=80)


def draw_map(panel: Axes, result: gt.InfluenceResult, place: np.ndarray, span: float | None) -> object:
    everywhere = TASK.train.features[:, :2].numpy()  # [rows, 2]
    panel.scatter(*everywhere.T, s=2 if span is None else 8, color="0.85", linewidths=0, label="training rows")
    for name, marker in ENDS.items():
        hits = getattr(result, name)
        where = everywhere[[hit.row for hit in hits]]
        prices = [hit.label / 1000 for hit in hits]
        edge = {"proponents": "black", "opponents": "red"}[name]
        style = {"s": 70, "marker": marker, "edgecolors": edge, "linewidths": 1.2, "zorder": 3}
        points = panel.scatter(*where.T, c=prices, label=name, **style, **PRICES)
    price = [(result.label or 0) / 1000]
    panel.scatter(*place[:, None], c=price, s=320, marker="*", edgecolors="black", label="query", zorder=4, **PRICES)
    panel.set_aspect(1 / np.cos(np.radians(place[1])))
    panel.set(xlabel="longitude", ylabel="latitude")
    if span is not None:
        panel.set(xlim=place[0] + np.array([-span, span]) * 1.25, ylim=place[1] + np.array([-span, span]))
    return points


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/california"), help="what the demo left")
    parser.add_argument("--row", type=int, default=0, help="of the held-out data")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/california/map.png"))
    arguments = parser.parse_args()
    query = TASK.query[arguments.row]
    found = gt.open_index(arguments.run / "index", TASK).influence([query], k=arguments.k)[0]
    draw(found, query[0][:2].numpy(), arguments.out)
    print(f"written: {arguments.out}")
