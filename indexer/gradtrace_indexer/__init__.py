"""The offline room: the only one that writes an index."""

from gradtrace_indexer.build.build import build_index
from gradtrace_indexer.derived import add_kernels, fit_representer
from gradtrace_indexer.evaluation.ground_truth import (
    ShapleyValues,
    SubsetOutputs,
    downsampling,
    leave_one_out,
    shapley,
    subset_outputs,
)
from gradtrace_indexer.evaluation.retraining import Retrainings
from gradtrace_indexer.generations import discard, kept_generations, prune, roll_back
from gradtrace_indexer.searchers import set_searcher
from gradtrace_indexer.update.add_checkpoints import add_checkpoints, add_run
from gradtrace_indexer.update.compact import compact
from gradtrace_indexer.update.rows import append_rows, delete_rows
from gradtrace_indexer.verify import verify

__all__ = [
    "Retrainings",
    "ShapleyValues",
    "SubsetOutputs",
    "add_checkpoints",
    "add_kernels",
    "add_run",
    "append_rows",
    "build_index",
    "compact",
    "delete_rows",
    "discard",
    "downsampling",
    "fit_representer",
    "kept_generations",
    "leave_one_out",
    "prune",
    "roll_back",
    "set_searcher",
    "shapley",
    "subset_outputs",
    "verify",
]
