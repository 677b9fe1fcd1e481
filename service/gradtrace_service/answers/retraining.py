"""Whether a model can be retrained as asked: told before a process is started for it."""

from __future__ import annotations

import numpy as np

from gradtrace import Index
from gradtrace_client.job_requests import RetrainRequest
from gradtrace_client.schemas import Split
from gradtrace_service.answers.questions import check_names, check_rows, split_size, why_absent
from gradtrace_service.engine.work import each_alone
from gradtrace_service.errors import FieldError


@each_alone
def check_retraining(index: Index, request: RetrainRequest, waited_ms: float) -> None:
    """Raises FieldError for what the job would fail on."""
    if not index.task.has_fit:
        raise FieldError(
            "index",
            f"{type(index.task).__name__} cannot be retrained: define fit(self, rows, seed) in it, which trains a new "
            "model on these rows and returns it",
        )
    if request.method is not None:
        check_names(index, request.method, None)
    check_rows(index, "without_rows", request.without_rows)
    if len(np.unique(request.without_rows)) == index.present.sum():
        raise FieldError("without_rows", "no row would be left to train on; leave out fewer")
    split: Split = "query" if split_size(index, "query") else "train"
    for position, row in enumerate(request.query_rows or ()):
        if (reason := why_absent(index, split, row)) is not None:
            raise FieldError(f"query_rows[{position}]", reason)
