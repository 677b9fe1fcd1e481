"""A dry run of a task before a build: how it would be attributed, what the build would cost, and its problems."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gradtrace.basis import two_sided_basis
from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.data.dataset import fetch
from gradtrace.data.guards import check_dataset
from gradtrace.data.sample import varied_rows
from gradtrace.devices import pick_device, threads
from gradtrace.errors import GradtraceError
from gradtrace.fitted.gauss_newton import coordinates_before, rows_drawn
from gradtrace.models.gradient_model import GradientModel, R
from gradtrace.models.loss_output import row_fisher
from gradtrace.models.path_report import LayerLine, layer_lines, slow_path
from gradtrace.sparse.defaults import DEFAULT_DIMENSIONS, RowsOption, default_rows
from gradtrace.sparse.segments import MEMORY_OF_POSTING, default_segment_rows
from gradtrace.sparse.strongest import StrongestOfEach
from gradtrace.sparse.whitening import WEIGHT_FISHER
from gradtrace.store.manifest import Precision
from gradtrace.store.shards import ShardLayout, default_levels
from gradtrace.task import Task
from gradtrace.tasks.hooks import HookCheck, check_hooks
from gradtrace.tasks.language import LanguageTask, token_summary

_HOOK_EXAMPLES = 3  # on which the task's hooks are tried
_SHOWN_EXAMPLES = 10  # of a language task
_COUNTED_ROWS = 2000  # whose tokens are counted
_TIMED_SECONDS = 2.0  # for which rows are timed
_SHARED_SECONDS = 120.0  # of a build, from which it may be worth to start processes for it
_FASTER = 1.3
_FITTED_ROWS = 2048  # on which a build fits basis and curvature; about two passes at each checkpoint
_KINDS_OF_ROWS: dict[RowsOption, str] = {
    "dense": "dense, {} coordinates in a common basis",
    "sparse": "sparse, each with the {} strongest weights of its own",
}
_POSTING_BYTES, _LIST_BYTES = 3, 8  # of a coordinate of a sparse row; of one that any row has
_COLUMN_BYTES = 32  # of a row's label, prediction, loss and norm


@dataclass(frozen=True)
class BuildEstimate:
    """An estimate of the cost of building the index.

    rows_per_second: gradient rows at one checkpoint, in batches of the build's size
    workers: processes by which it is done soonest (`--workers`, docs/scaling.md); 1: this one alone
    """

    rows_per_second: float
    seconds: float
    memory_bytes: int
    disk_bytes: int
    workers: int = 1


@dataclass
class TaskReport:
    """The result of a dry run.

    rows, checkpoints, parameters: numbers of training rows, of checkpoints and of attributed parameters
    labels: where the labels that the eigenbasis is fitted with come from: "loss", "predict" or "empirical", see
        docs/methods.md
    law: a description of these labels
    kind_of_rows: a description of the rows that would be stored
    curvature: a description of the curvature that influence and source would use
    tokens: of a language task, what its rows hold, in sentences
    examples: of a language task, decoded training rows, in stretches of tokens that count in the loss or do not
    hooks: results of the task's optional methods on training examples, or their problems
    notes: what is slow or unusual
    problems: what a build would refuse, each with its remedy
    """

    task: str
    rows: int = 0
    checkpoints: int = 0
    parameters: int = 0
    layers: list[LayerLine] = field(default_factory=list)
    labels: str = ""
    law: str = ""
    kind_of_rows: str = ""
    curvature: str = ""
    tokens: list[str] = field(default_factory=list)
    examples: list[list[tuple[str, bool]]] = field(default_factory=list)
    hooks: list[HookCheck] = field(default_factory=list)
    estimate: BuildEstimate | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            **asdict(self),
            "layers": [line._asdict() for line in self.layers],
            "hooks": [hook._asdict() for hook in self.hooks],
            "ok": self.ok,
        }


def check(
    task: Task,
    checkpoints: Sequence[Checkpoint] | str | Path,
    *,
    rows: RowsOption | None = None,
    dimensions: int | None = None,
    precision: Precision = "int8",
    batch_size: int = 128,
    device: str = "auto",
) -> TaskReport:
    """Try a task on a sample of its rows at its last checkpoint, in seconds. Nothing is written.

    What a build would refuse is not raised, but reported in `problems`. The other arguments are those of `build_index`.
    """
    if isinstance(checkpoints, str | Path):
        checkpoints = load_checkpoints(checkpoints)
    report = TaskReport(type(task).__name__, checkpoints=len(checkpoints))
    try:
        report.rows = check_dataset(task)
        probe_rows = varied_rows(task)
        examples = fetch(task.train, probe_rows)
        if not checkpoints:
            raise GradtraceError("there is no checkpoint: record some with CheckpointRecorder")
        if isinstance(task, LanguageTask):
            report.tokens = list(token_summary(task, _COUNTED_ROWS).sentences())
            report.examples = [task.stretches(example) for example in examples[:_SHOWN_EXAMPLES]]
            if (too_large := weights_that_do_not_fit(task)) is not None:
                raise GradtraceError(too_large)
        where = torch.device(pick_device(device))
        model = GradientModel(task, checkpoints[-1], where, examples, rows=probe_rows)
        hook_examples = examples[:_HOOK_EXAMPLES]
        report.hooks = [*check_hooks(task, hook_examples), *_model_hooks(model, hook_examples)]
        _describe(report, model, examples)
        report.estimate = _estimated(report, model, rows, dimensions, precision, batch_size)
        report.notes += _room(report.estimate)
    except GradtraceError as error:
        report.problems.append(str(error))
    except Exception as error:  # from the user's code
        report.problems.append(f"the task fails on a training row: {type(error).__name__}: {error}")
    report.problems += [hook.outcome for hook in report.hooks if hook.problem]
    return report


def weights_that_do_not_fit(task: Task) -> str | None:
    """Of a language model, told before it is loaded: that its weights alone exceed the free memory, and the remedy."""
    if not isinstance(task, LanguageTask):
        return None
    needed, free = task.weights_in_a_build, psutil.virtual_memory().available
    if needed <= free:
        return None
    return (
        f"the model's weights alone do not fit: a build holds {needed / 1e9:,.1f} GB of them, and {free / 1e9:,.1f} GB "
        "of memory are free; take --dtype bfloat16, which halves them, or a larger machine"
    )


def _describe(report: TaskReport, model: GradientModel, examples: Sequence[Any]) -> None:
    report.layers = layer_lines(model)
    report.parameters = sum(line.parameters for line in report.layers)
    report.labels, report.law = model.outputs.source, model.outputs.description
    report.curvature = row_fisher(model, examples).sentence
    slow = slow_path(model, examples)
    report.notes += [] if slow is None else [slow]
    if report.labels == "empirical":
        report.notes.append(
            f"the rows' own labels are taken for those that the model would give: {report.law}. Influence and source "
            "predict less well then; compute the loss by a function of torch.nn.functional, or define predict"
        )


def _model_hooks(model: GradientModel, examples: Sequence[Any]) -> list[HookCheck]:
    """Results of predict, measurement and representation."""
    batch, checks = model.batch(examples), []
    if model.predicts:
        source = "predict" if model.task.has_predict else "predictions (from the loss)"
        checks.append(HookCheck(source, ", ".join(map(str, model.predict(batch).tolist()))))
    if model.task.has_measurement:
        with torch.no_grad():
            measured = model.task.measurement(model.model, batch.collated)
        checks.append(HookCheck("measurement", ", ".join(f"{value:.4g}" for value in measured.tolist())))
    representation = model.representation
    outcome = "none" if representation is None else f"{representation.dimensions} features of {representation.source}"
    return [*checks, HookCheck("representation", outcome)]


def _estimated(
    report: TaskReport,
    model: GradientModel,
    rows: RowsOption | None,
    dimensions: int | None,
    precision: Precision,
    batch_size: int,
) -> BuildEstimate:
    """The estimate for the kind of rows that a build would write, which the report then describes."""
    kind = rows or default_rows(model.task)
    count = DEFAULT_DIMENSIONS[kind] if dimensions is None else dimensions
    report.kind_of_rows = _KINDS_OF_ROWS[kind].format(count)
    if kind == "dense":
        estimate = _estimate(report, model, count, precision, batch_size)
    else:
        report.curvature = WEIGHT_FISHER.sentence
        estimate = _sparse_estimate(report, model, count, batch_size)
    return replace(estimate, workers=_workers(estimate, model, batch_size))


def _workers(estimate: BuildEstimate, model: GradientModel, batch_size: int) -> int:
    """As many as there are threads, if rows then come clearly faster for long enough, and memory suffices."""
    count = torch.get_num_threads()
    if model.device.type != "cpu" or count == 1 or estimate.seconds < _SHARED_SECONDS:
        return 1
    if count * estimate.memory_bytes > _free_memory():
        return 1
    basis = two_sided_basis(model.plan.layers, len(model.plan.layers), 0)
    together = _rows_per_second(model, partial(model.encode, basis), batch_size)
    with threads(1):
        alone = _rows_per_second(model, partial(model.encode, basis), batch_size)
    return count if count * alone > _FASTER * together else 1


def _estimate(
    report: TaskReport, model: GradientModel, dimensions: int, precision: Precision, batch_size: int
) -> BuildEstimate:
    dimensions = max(len(report.layers), min(dimensions, report.parameters))
    basis = two_sided_basis(model.plan.layers, dimensions, 0).to(model.device)
    rate = _rows_per_second(model, partial(model.encode, basis), batch_size)
    fitted, rotated = min(report.rows, _FITTED_ROWS), min(coordinates_before(dimensions), report.parameters)
    layout = ShardLayout(1024, tuple(default_levels(basis.dimensions)), precision)
    return BuildEstimate(
        rows_per_second=rate,
        seconds=(report.checkpoints * (2 * report.rows + fitted) + fitted) / rate
        + _rotation_products(report, rotated, dimensions) / _products_per_second(model.device),
        memory_bytes=_model_memory(model) + 16 * rotated**2,
        disk_bytes=report.checkpoints * report.rows * (layout.bytes // 1024 + _COLUMN_BYTES) + 4 * rotated * dimensions,
    )


def _sparse_estimate(report: TaskReport, model: GradientModel, count: int, batch_size: int) -> BuildEstimate:
    count = min(count, report.parameters)
    kind = StrongestOfEach(torch.ones(report.parameters, device=model.device), count)
    rate = _rows_per_second(model, partial(kind.encode, model), batch_size)
    fitted, segment = min(report.rows, _FITTED_ROWS), min(report.rows, default_segment_rows(count))
    weights = report.parameters
    lists = -(-report.rows // segment) * _LIST_BYTES * min(weights, segment * count)
    return BuildEstimate(
        rows_per_second=rate,
        seconds=report.checkpoints * (report.rows + fitted) / rate,
        memory_bytes=_model_memory(model) + MEMORY_OF_POSTING * segment * count + 12 * report.parameters,
        disk_bytes=report.checkpoints * (report.rows * (_POSTING_BYTES * count + _COLUMN_BYTES) + lists + 4 * weights),
    )


def _rows_per_second(
    model: GradientModel, encode: Callable[[ExampleBatch, Measure | None], tuple[R, Tensor]], batch_size: int
) -> float:
    rows = len(model.task.train)
    batch = model.batch(fetch(model.task.train, [row % rows for row in range(batch_size)]))
    started, timed_rows = time.perf_counter(), 0
    while not timed_rows or time.perf_counter() - started < _TIMED_SECONDS:
        model.encode_and_predict(partial(encode, batch), batch)
        timed_rows += batch_size
    return timed_rows / (time.perf_counter() - started)


def _model_memory(model: GradientModel) -> int:
    """Of a copy of the model in each thread, beside what this process has taken so far."""
    weights: int = sum(value.numel() * value.element_size() for value in model.model.state_dict().values())
    return _peak_memory() + weights * torch.get_num_threads()


def _peak_memory() -> int:
    """The most memory that this process has had, in bytes: that of its batches, which it has given back."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, psutil.Process().memory_info().rss)


def _room(estimate: BuildEstimate) -> list[str]:
    """A note where a build needs more memory than is free."""
    free = _free_memory()
    if estimate.memory_bytes <= free:
        return []
    return [
        f"a build needs about {estimate.memory_bytes / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: give "
        "it a smaller batch size, fewer dimensions, or fewer layers (Task.layers)"
    ]


def _free_memory() -> int:
    """Bytes, with what this process has."""
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def _rotation_products(report: TaskReport, coordinates: int, dimensions: int) -> float:
    """Number of multiplications of a Gauss-Newton basis: second moments of drawn rows, eigenvectors, rotated rows."""
    drawn = report.checkpoints * rows_drawn(report.rows, coordinates) * coordinates**2
    eigenvectors = 10 * coordinates**2 * dimensions
    return drawn + eigenvectors + report.checkpoints * report.rows * coordinates * dimensions


def _products_per_second(device: torch.device) -> float:
    """Of a product of float32 matrices."""
    size = 1024
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])  # the first one warms up
    started = time.perf_counter()
    float((matrix @ matrix)[0, 0])
    return size**3 / (time.perf_counter() - started)
