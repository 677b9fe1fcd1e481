"""Draw a house and its comparables on the map of California, as in section 5.1 of the TracIn paper.

The method is `cosine`: by inner products, the rows with the largest errors, wherever they lie, come first everywhere.

`make demo DATASET=california ONCE=1` first, then `python examples/california/map.py` (with `gradtrace[plots]`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from task import TASK

import gradtrace as gt

MARKERS = {"proponents": ("o", "black"), "opponents": ("s", "red")}  # shape and edge
PRICES = {"cmap": "viridis", "norm": Normalize(50, 500)}  # in thousands of dollars


def draw(result: gt.InfluenceResult, place: np.ndarray, out: Path) -> None:
    """`place`: longitude and latitude of the query. Left the state, right the surroundings of query and hits."""
    figure, (state, nearby) = plt.subplots(1, 2, figsize=(10.5, 5.2), width_ratios=(2, 3), layout="constrained")
    draw_map(state, result, place, size=0.3)
    points = draw_map(nearby, result, place, size=1)
    hits = [hit.row for hit in (*result.proponents, *result.opponents)]
    away = np.abs(places()[hits] - place).max(1)  # degrees
    reach = 1.15 * float(np.quantile(away, 0.85)) + 0.02
    nearby.set(xlim=place[0] + np.array([-reach, reach]) * 1.2, ylim=place[1] + np.array([-reach, reach]))
    nearby.legend(loc="upper right")
    figure.colorbar(points, ax=nearby, label="price, thousands of dollars", extend="both", pad=0.02)
    label, prediction = result.label or 0, result.prediction or 0
    figure.suptitle(
        f"Worth {label:,.0f} dollars, predicted {prediction:,.0f}: rows that pull it to its price, and away"
    )
    figure.savefig(out, dpi=80)


def draw_map(panel: Axes, result: gt.InfluenceResult, place: np.ndarray, size: float) -> PathCollection:
    prices = np.array(TASK.train.labels) / 1000
    panel.scatter(*places().T, c=prices, s=14 * size, alpha=0.25, linewidths=0, **PRICES)
    for name, (marker, edge) in MARKERS.items():
        rows = [hit.row for hit in getattr(result, name)]
        style = {"s": 90 * size, "marker": marker, "edgecolors": edge, "linewidths": 1.5 * size, "zorder": 3}
        points = panel.scatter(*places()[rows].T, c=prices[rows], label=name, **style, **PRICES)
    star = {"s": 260 * size, "marker": "*", "edgecolors": "black", "label": "query", "zorder": 4}
    panel.scatter(*place[:, None], c=[(result.label or 0) / 1000], **star, **PRICES)
    panel.set_aspect(1 / np.cos(np.radians(place[1])))
    panel.set(xlabel="longitude", ylabel="latitude")
    panel.locator_params(axis="x", nbins=6)
    return points


def places() -> np.ndarray:
    """Longitude and latitude of the training rows. [rows, 2]"""
    return TASK.train.inputs[:, :2].numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/california"), help="what the demo left")
    parser.add_argument("--row", type=int, default=21, help="of the held-out data")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/california/map.png"))
    arguments = parser.parse_args()
    query = TASK.query[arguments.row]
    found = gt.open_index(arguments.run / "index", TASK).influence([query], k=arguments.k, method="cosine")[0]
    draw(found, query[0][:2].numpy(), arguments.out)
    print(f"written: {arguments.out}")
