"""What an index holds, and what a dry run of a task shows, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gradtrace.dry_run import TaskReport
from gradtrace.errors import CorruptIndexError, IncompleteIndexError, StoreError
from gradtrace.results.display import describe
from gradtrace.store.manifest import CheckpointKind, Manifest, SearcherEntry
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace_indexer.build.bad_rows import skipped_lines
from gradtrace_indexer.generations import earlier_generations, read_pending

_KINDS: dict[CheckpointKind, str] = {
    "weights": "",
    "average": ", the average of a segment's weights",
    "recorded": ", the recording of the training up to it",
}

_MOST_CHARACTERS = 300  # of a stretch of text
_MOST_LAYERS = 40  # lines of a table; of longer models the first and the last layers are shown


def describe_searcher(manifest: Manifest, entry: SearcherEntry) -> str:
    """One line: a searcher's parameters, size and recall."""
    if manifest.searcher_is_stale():
        return f"searcher {entry.name} is of earlier rows: exact search answers until `gradtrace build` sets it again"
    recall = ", ".join(f"{name} {share.top:.3f} / {share.bottom:.3f}" for name, share in entry.recall.items())
    return (
        f"searcher {entry.name} ({entry.parameters}), {entry.file.bytes / 1e6:,.1f} MB, by {entry.library}; "
        f"recall@{entry.k} at the top / bottom on {entry.queries} {entry.split} rows: {recall}"
    )


def details(directory: Path) -> Iterator[str]:
    """Line by line: the current generation, what is unfinished, and the earlier ones that are kept.

    Raises:
        StoreError: there is no index.
        CorruptIndexError: the manifest of the current or of the unfinished generation is damaged.
    """
    pending = read_pending(directory)
    try:
        current = read_manifest(directory)
    except IncompleteIndexError:
        assert pending is not None
        yield f"unfinished: run the build again; {describe(pending)}"
        return
    yield describe(current)
    yield from (f"  {line}" for line in (*_contents(current), *_rows(directory, current)))
    if pending is not None:
        written = sum(shard.stop - shard.start for shard in pending.shards)
        share = written / (pending.rows * len(pending.checkpoints))
        yield f"  unfinished: {pending.made_by}, {share:.0%} written; run it again, or `gradtrace discard` it"
    for number, kept in reversed(earlier_generations(directory).items()):
        yield f"  kept: generation {number} {_kept(kept)}"


def _kept(kept: Manifest | StoreError) -> str:
    if isinstance(kept, StoreError):
        return f"cannot be read: {kept}"
    return f"({kept.made_by}), {kept.rows:,} rows x {len(kept.checkpoints)} checkpoints, {_megabytes(kept)}"


def _contents(manifest: Manifest) -> Iterator[str]:
    """The checkpoints, and what was computed beside the rows."""
    for checkpoint in manifest.checkpoints:
        total = checkpoint.learning_rate_sum
        rate = f"learning rate {checkpoint.learning_rate:g}" + ("" if total is None else f" (sum so far {total:g})")
        yield f"{checkpoint.name}: step {checkpoint.step}, {rate}{_KINDS[checkpoint.kind]}"
    if manifest.fisher is not None:
        yield f"curvature: {manifest.fisher.sentence}"
    if manifest.searcher is not None:
        yield describe_searcher(manifest, manifest.searcher)
    if manifest.representations is not None:
        yield f"representations: {manifest.representations.dimensions} features, {_refit(manifest)}"
    if manifest.kernels is not None:
        lacking = len(manifest.lacking_kernels())
        remedy = f", {lacking} checkpoint(s) lack theirs: run `gradtrace kernels`" if lacking else ""
        yield f"{len(manifest.kernels.files)} kernel(s) for trak, damping {manifest.kernels.damping:g}{remedy}"


def _rows(directory: Path, manifest: Manifest) -> Iterator[str]:
    try:
        ids = read_row_ids(directory, manifest)
    except CorruptIndexError as error:
        yield f"damaged: {error}"
        return
    yield (
        f"row numbers 0 to {ids.rows - 1}: {len(ids.live_ids()):,} present, {len(ids.deleted):,} deleted, "
        f"{ids.rows - len(ids.ids):,} deleted and compacted"
    )
    if manifest.skipped:
        yield from skipped_lines(manifest, sorted(manifest.skipped))
    sizes = [stop - start for start, stop in manifest.stretches()]
    yield (
        f"{len(sizes)} shard(s) a checkpoint, of {min(sizes):,} to {max(sizes):,} rows; {_megabytes(manifest)}, built "
        f"with {manifest.libraries}"
    )


def _refit(manifest: Manifest) -> str:
    if manifest.representer is None:
        return "no last layer refitted on them"
    if manifest.representer_is_stale():
        return "last layer refitted on other ones: run `gradtrace representer` again"
    return f"last layer refitted on them with l2 {manifest.representer.l2:g}"


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(entry.bytes for entry in manifest.files()) / 1e6:,.1f} MB"


def print_report(report: TaskReport, console: Console) -> None:
    """Of a dry run: tables of the layers and the task's hooks, the cost of a build, and every problem."""
    console.print(
        f"[bold]{escape(report.task)}[/bold]: {report.rows:,} training rows, {report.checkpoints} checkpoints, "
        f"{report.parameters:,} parameters"
    )
    if report.layers:
        console.print(_layers(report))
        console.print(f"[bold]Labels of the eigenbasis[/bold] ({report.labels}): {escape(report.law)}")
        console.print(f"[bold]Rows[/bold]: {report.kind_of_rows}")
        console.print(f"[bold]Curvature[/bold]: {escape(report.curvature)}")
    for sentence in report.tokens:
        console.print(f"[bold]Tokens[/bold]: {escape(sentence)}")
    if report.examples:
        marks = "underlined" if console.is_terminal else "between ⟦ and ⟧"
        console.print(f"[bold]Training rows[/bold], the tokens that count in the loss {marks}:")
    for example in report.examples:
        console.print(_marked(example, console.is_terminal))
    if report.hooks:
        console.print(_hooks(report))
    if report.estimate is not None:
        estimate, minutes = report.estimate, report.estimate.seconds / 60
        duration = f"{minutes:.0f} min" if minutes >= 2 else f"{estimate.seconds:.0f} s"
        console.print(
            f"[bold]A build[/bold] would take about {duration} ({estimate.rows_per_second:,.0f} rows a second and "
            f"checkpoint), {estimate.memory_bytes / 1e9:.1f} GB of memory and {estimate.disk_bytes / 1e6:,.0f} MB of "
            "disk"
        )
        if estimate.workers > 1:
            console.print(f"[bold]Sooner[/bold] with --workers {estimate.workers} (docs/scaling.md)")
    for note in report.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}")
    for problem in report.problems:
        console.print(f"[red]Problem:[/red] {escape(problem)}")
    if report.ok:
        console.print("[green]Ready to build.[/green]")


def _marked(example: Sequence[tuple[str, bool]], styled: bool) -> Text:
    """The tokens that count in the loss are green and underlined; between ⟦ and ⟧ where there are no styles."""
    text = Text("  ")
    for stretch, counts in example:
        shown = _shortened(stretch.replace("\n", "⏎"))
        text.append(f"⟦{shown}⟧" if counts and not styled else shown, "green underline" if counts else "dim")
    return text


def _shortened(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _layers(report: TaskReport) -> Table:
    table = Table(title="Layers", title_justify="left")
    for name in ("layer", "type", "parameters", "path", "why"):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    half = _MOST_LAYERS // 2
    omitted = range(half, len(report.layers) - half)
    for number, line in enumerate(report.layers):
        if number not in omitted:
            table.add_row(escape(line.name), line.kind, f"{line.parameters:,}", line.path, escape(line.reason))
        elif number == half:
            table.add_row(f"... {len(omitted)} more")
    return table


def _hooks(report: TaskReport) -> Table:
    table = Table(title="What the task gives", title_justify="left")
    table.add_column("hook")
    table.add_column("on three training examples", overflow="fold")
    for hook in report.hooks:
        table.add_row(hook.hook, escape(hook.outcome), style="red" if hook.problem else None)
    return table
