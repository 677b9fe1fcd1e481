"""The offline room: the only one that writes an index."""

from gradtrace_indexer.add_checkpoints import add_checkpoints
from gradtrace_indexer.append import append_rows
from gradtrace_indexer.build import build_index
from gradtrace_indexer.compact import compact
from gradtrace_indexer.delete import delete_rows
from gradtrace_indexer.generations import discard, kept_generations, prune, roll_back
from gradtrace_indexer.ground_truth import (
    ShapleyValues,
    SubsetOutputs,
    downsampling,
    leave_one_out,
    shapley,
    subset_outputs,
)
from gradtrace_indexer.retraining import Retrainings
from gradtrace_indexer.searcher_build import set_searcher
from gradtrace_indexer.verify import verify

__all__ = [
    "Retrainings",
    "ShapleyValues",
    "SubsetOutputs",
    "add_checkpoints",
    "append_rows",
    "build_index",
    "compact",
    "delete_rows",
    "discard",
    "downsampling",
    "kept_generations",
    "leave_one_out",
    "prune",
    "roll_back",
    "set_searcher",
    "shapley",
    "subset_outputs",
    "verify",
]
