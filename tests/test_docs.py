"""docs/queries.md describes everything that may be asked, docs/tasks.md every task and hook, docs/methods.md every
method, docs/api.md the API. ARCHITECTURE.md names every room, and no file that does not exist."""

from __future__ import annotations

import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from gradtrace import Index, Task, tasks
from gradtrace.methods import METHODS
from gradtrace_client import Client
from gradtrace_client.comparison_schemas import CompareRequest
from gradtrace_client.request_schemas import (
    Condition,
    GroupsRequest,
    Include,
    InfluenceRequest,
    PairsRequest,
    Question,
    RowFilter,
    ScoresQuestion,
    Weights,
)
from gradtrace_service import cli

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "queries.md").read_text()


def test_every_field_of_a_question_has_a_section_with_an_example() -> None:
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(InfluenceRequest.model_fields)
    for name, text in sections.items():
        assert f'"{name}": ' in text, f"no example of {name}"


@pytest.mark.parametrize("name", [*RowFilter.model_fields, *get_args(Include)])
def test_every_part_of_a_filter_and_of_a_hit_is_listed(name: str) -> None:
    assert re.search(rf"^- [^:]*`{name}`[^:]*: ", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", [f.alias or n for n, f in Condition.model_fields.items()] + list(get_args(Weights)))
def test_every_condition_and_weight_is_named(name: str) -> None:
    assert f"`{name}`" in PAGE


def arguments(call: Callable[..., Any]) -> set[str]:
    """Their names; where a TypedDict types `**options`, its keys take the place of `options`."""
    names = set(inspect.signature(call).parameters) - {"self"}
    options = get_type_hints(call).get("options")
    return names if options is None else names - {"options"} | set(get_args(options)[0].__annotations__)


def test_the_sdk_takes_every_field_and_the_library_all_but_what_it_is_asked_with() -> None:
    fields = set(InfluenceRequest.model_fields)
    assert arguments(Client.influence) == fields
    sources = {"example", "examples", "query_rows", "train_rows", "index"}
    assert arguments(Index.influence) - {"examples"} == fields - sources


@pytest.mark.parametrize(
    ("heading", "request_type", "sdk", "library"),
    [
        ("Groups of rows", GroupsRequest, Client.groups, Index.group_influence),
        ("Pairs", PairsRequest, Client.pairs, Index.pairs),
    ],
)
def test_groups_and_pairs_are_described_and_taken(heading: str, request_type: Any, sdk: Any, library: Any) -> None:
    text = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    fields = set(request_type.model_fields)
    own = fields - set(Question.model_fields) - set(InfluenceRequest.model_fields)
    assert {name for name in own if f"`{name}`" in text and f'"{name}": ' in text} == own
    assert arguments(sdk) == fields
    examples = {"example", "examples", "query_rows", "train_rows", "index"}
    assert fields - examples <= arguments(library)


def test_comparisons_are_described_and_taken() -> None:
    text = PAGE.split("\n## Comparing\n")[1].split("\n## ")[0]
    assert {name for name in CompareRequest.model_fields if f'"{name}": ' in text} == set(CompareRequest.model_fields)
    assert arguments(Client.compare) == set(CompareRequest.model_fields)
    asked_with = {"example", "examples", "query_rows", "train_rows", "index"}
    assert arguments(Index.mean_scores) - {"examples"} == set(ScoresQuestion.model_fields) - asked_with


def test_the_command_line_has_the_options_that_the_page_shows() -> None:
    options = set(inspect.signature(cli.query).parameters) - {"row_filter"} | {"filter"}
    shown = set(re.findall(r"--([a-z-]+)", "\n".join(re.findall(r"gradtrace query.*", PAGE))))
    assert {name.replace("-", "_") for name in shown} <= options


def test_the_generated_pages_are_up_to_date() -> None:
    for path, text in runpy.run_path(str(DOCS / "reference" / "render.py"))["pages"]().items():
        assert path.read_text() == text, f"run `make reference` and commit {path.name}"


TASKS_PAGE = (DOCS / "tasks.md").read_text()


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.classifier = nn.Embedding(1000, 8), nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        sums = self.words(ids).masked_fill(~mask[..., None], 0).sum(1)
        return self.classifier(sums / mask.sum(1, keepdim=True))


def data_of_the_page() -> dict[str, Any]:
    """What its examples take for given."""
    random = np.random.default_rng(0)
    side = lambda: torch.from_numpy(random.normal(size=4).astype(np.float32))  # noqa: E731
    return {
        "images": random.integers(0, 256, (6, 8, 8), dtype=np.uint8),
        "labels": np.array([0, 1, 0, 1, 1, 0]),
        "make_image_model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
        "table": np.array([[5.0, 3.1, "coast"], [None, 2.0, "inland"]] * 3, dtype=object),
        "prices": np.array([300_000.0, 90_000.0] * 3),
        "make_table_model": lambda: nn.Linear(4, 1),
        "texts": ["a fine film", "dull", "fine", "a dull film indeed", "dull , dull", "fine !"],
        "make_text_model": TextModel,
        "pairs": [{"left": side(), "right": side(), "better": row % 2} for row in range(6)],
    }


BLOCKS = re.findall(r"```python\n(.*?)```", TASKS_PAGE, re.DOTALL)
PAYLOADS: list[dict[str, Any]] = [
    {"image": [[9] * 8] * 8, "label": "dog"},
    {"features": {"rooms": None, "income": 8.3, "place": "coast"}, "label": 452_600},
    {"text": "a fine film"},
    {"left": [1, 2, 3, 4], "right": [4, 3, 2, 1]},
]


@pytest.mark.parametrize(("code", "payload"), list(zip(BLOCKS, PAYLOADS, strict=True)))
def test_the_tasks_of_the_page_are_indexed_and_asked(code: str, payload: dict[str, Any], tmp_path: Path) -> None:
    names = data_of_the_page()
    exec(code, names)
    task: Task = names["TASK"] if "TASK" in names else names["Ranking"]()
    index = tiny.build(task, tmp_path)
    (result,) = index.influence([task.parse(payload)], k=3)
    assert len({hit.row for hit in [*result.proponents, *result.opponents]}) >= 3
    assert task.render(task.train[0])


def test_every_ready_made_task_and_its_arguments_are_described() -> None:
    for name in tasks.__all__:
        assert f"`{name}" in TASKS_PAGE
        ready = getattr(tasks, name)
        if isinstance(ready, type) and issubclass(ready, Task):
            for argument in inspect.signature(ready).parameters:
                assert f"`{argument}`" in TASKS_PAGE, f"{name}: {argument}"


def test_every_hook_of_a_task_has_a_line() -> None:
    lines = re.findall(r"^\| `(\w+)", TASKS_PAGE, re.MULTILINE)
    hooks = {name for name in {*vars(Task), *Task.__annotations__} if not name.startswith(("_", "has_"))}
    assert set(lines) == hooks - {"label_name"}


def test_every_method_has_a_line() -> None:
    table = (DOCS / "methods.md").read_text().split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z0-9-]+)` ", table, re.MULTILINE)) == {"method", *METHODS}


PACKAGES = {
    "gradtrace": ROOT / "attribution",
    "gradtrace_indexer": ROOT / "indexer",
    "gradtrace_service": ROOT / "service",
    "gradtrace_client": ROOT / "client",
}
NAMED = sorted(set(re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.toml))`", (ROOT / "ARCHITECTURE.md").read_text())))


@pytest.mark.parametrize("path", NAMED)
def test_every_path_of_the_architecture_exists(path: str) -> None:
    assert (PACKAGES.get(path.split("/")[0], ROOT) / path).exists()


def test_every_room_is_in_the_architecture() -> None:
    for package, folder in PACKAGES.items():
        rooms = {f"{package}/{init.parent.name}/" for init in (folder / package).glob("*/__init__.py")}
        assert rooms <= set(NAMED)


PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("notebooks/*.ipynb"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked.read_text()), target


def headings(text: str) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_make_target_exists(name: str) -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:`|^)make ([a-z -]+)", (ROOT / name).read_text(), re.MULTILINE)
    assert {target for command in commands for target in command.split()} <= rules
