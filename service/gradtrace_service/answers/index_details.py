"""What an index holds, and what may be asked of it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from gradtrace import Index
from gradtrace.methods import METHODS
from gradtrace.tasks.language.questions import WritingTask
from gradtrace_client.schemas import IndexDetails
from gradtrace_service.answers.documents import convention, index_info
from gradtrace_service.answers.inputs import Input, input_of
from gradtrace_service.answers.questions import split_size
from gradtrace_service.engine.work import each_alone

_inputs: WeakKeyDictionary[Index, Input] = WeakKeyDictionary()  # the ranges of a large table take a while


@each_alone
def index_details(index: Index, request: None, waited_ms: float) -> IndexDetails:
    """Answer GET /index."""
    names, query_rows = index.task.class_names, split_size(index, "query")
    if index not in _inputs:
        _inputs[index] = input_of(index.task, index.present)
    return IndexDetails(
        **dict(index_info(index)),
        methods=list(index.methods),
        class_names=None if names is None else list(names),
        query_rows=query_rows,
        conventions={
            method: convention(method, fisher=index.manifest.fisher, sparse=index.manifest.basis.is_sparse)
            for method in index.methods
        },
        splits={"train": index.rows, "query": query_rows},
        input=_inputs[index],
        columns=list(index.columns),
        layers=_layers(index),
        token_methods=[name for name in index.methods if METHODS[name].splits_by_token and index.task.has_tokens],
        can_retrain=index.task.has_fit,
        can_complete=isinstance(index.task, WritingTask),
    )


def _layers(index: Index) -> list[str]:
    """In the model's order; none where the basis mixes them."""
    contents = index.contents
    if contents.projects_all_layers:
        return []
    names = {name for basis in contents.bases for name in basis.layers}
    names |= {name for of_run in contents.coordinates for name in of_run.shapes}
    return [layer.name for layer in contents.last_model.plan.layers if layer.name in names]
