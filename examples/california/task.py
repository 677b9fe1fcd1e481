"""California housing (1990 census, a row a block group) and a network of three hidden layers: what is a house worth?"""

import numpy as np
import pyarrow.csv
from torch import nn

from gradtrace.tasks import TabularRegression, data_file

NUMBERS = ("longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms", "population", "households",
           "median_income")  # fmt: skip
PROXIMITY = ("<1H OCEAN", "INLAND", "ISLAND", "NEAR BAY", "NEAR OCEAN")


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(len(NUMBERS) + len(PROXIMITY), 128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 32), nn.ReLU(),
        nn.Linear(32, 1),
    )  # fmt: skip


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """A random four fifths to train, the rest to ask about: the file is sorted by place."""
    table = pyarrow.csv.read_csv(data_file("california_housing.csv"))
    order = np.random.default_rng(0).permutation(len(table))
    rows = order[: len(table) * 4 // 5] if split == "train" else order[len(table) * 4 // 5 :]
    columns = [table[name].to_pylist() for name in (*NUMBERS, "ocean_proximity")]
    return np.array(columns, dtype=object).T[rows], table["median_house_value"].to_numpy()[rows]


TASK = TabularRegression(
    model,
    train=lambda: load("train"),
    query=lambda: load("query"),
    feature_names=(*NUMBERS, "ocean_proximity"),
    categories={"ocean_proximity": PROXIMITY},
    fill={"total_bedrooms": 432},  # the median; this, and what follows, of the training rows
    mean=(-119.57, 35.63, 28.65, 2636.6, 537.6, 1423.7, 499.9, 3.872),
    std=(2.005, 2.136, 12.58, 2188.4, 422.5, 1094.9, 383.7, 1.897),
    label_mean=207_264,  # dollars
    label_std=116_021,
)
