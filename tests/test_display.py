"""How indexes and results show themselves: as text, in notebooks, as DataFrames."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from gradtrace import Hit, Index, InfluenceResult, MissingLibraryError, Recall
from gradtrace.results.token_scores import RowTokens, TokenScores
from gradtrace_indexer import delete_rows
from tiny import ClassTask

pytestmark = pytest.mark.unit

ROWS, QUERIES = tiny.classes(30), tiny.classes(3, seed=5)
EVIL = "<script>alert(1)</script>"


class Named(ClassTask):
    class_names = ("cat", EVIL, "dog")

    def render(self, example: Any) -> dict[str, Any]:
        return {"text": f"{EVIL} {example[1]}"}


class Broken(Named):
    def render(self, example: Any) -> dict[str, Any]:
        raise ValueError(EVIL)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return tiny.build(Named(tiny.mlp, ROWS), tmp_path_factory.mktemp("run"), basis="spectral", dimensions=20)


@pytest.fixture(scope="module")
def result(index: Index) -> InfluenceResult:
    return index.influence(QUERIES, k=4, include=["layers"])[1]


def test_a_result_reads_as_two_tables(result: InfluenceResult) -> None:
    shown = repr(result).splitlines()
    assert shown[0].startswith("tracin of query: label ")
    assert shown[0].endswith("explained: loss; exact search of 30 rows")
    assert shown[1].startswith("proponents:")
    assert shown[2].split() == ["row", "score", "label", "prediction", "loss"]
    assert [line.split()[:2] for line in shown[3:7]] == [[str(h.row), f"{h.score:+.4g}"] for h in result.proponents]
    assert [line.split()[:2] for line in shown[9:]] == [[str(h.row), f"{h.score:+.4g}"] for h in result.opponents]
    assert "opponents: none" in repr(replace(result, opponents=[]))
    assert repr(result.proponents[0]).startswith(f"Hit(row={result.proponents[0].row}, score=+")
    assert repr(Recall(0.5, 1.0)) == "Recall(top=0.5, bottom=1.0)"


def test_tables_of_texts_have_no_columns_of_labels(result: InfluenceResult) -> None:
    def bare(hits: list[Hit]) -> list[Hit]:
        return [replace(hit, label=None, prediction=None) for hit in hits]

    ends = {"proponents": bare(result.proponents), "opponents": bare(result.opponents)}
    texts = replace(result, label=None, prediction=None, **ends)
    shown = repr(texts).splitlines()
    assert shown[0].startswith("tracin of query: loss ")
    assert shown[2].split() == ["row", "score", "loss"]
    assert {len(line.split()) for line in shown[3:7]} == {3}
    page = texts._repr_html_()
    assert "<th>label</th>" not in page
    assert page.count("<th>example</th>") == 2
    assert page.count("<td>") == 4 * len(result.proponents + result.opponents)


def test_tokens_are_coloured_by_their_scores() -> None:
    training = TokenScores([EVIL, " a", "b"], [2.0, -1.0, 0.0], 0.5)
    page = RowTokens(3, 1.5, "loss", training, TokenScores(["c"], [0.0], 1.5))._repr_html_()
    assert "row 3, score +1.5" in page
    assert EVIL not in page
    pattern = r'<span title="(.*?)" style="[^"]*rgba\(([\d, ]+), ([\d.]+)\)">'
    green, red = "0, 150, 80", "210, 40, 60"
    expected = [("+2", green, "0.60"), ("-1", red, "0.30"), ("+0", green, "0.00"), ("+0", green, "0.00")]
    assert re.findall(pattern, page) == expected


def test_results_are_a_list_that_shows_itself(index: Index) -> None:
    results = index.influence(QUERIES, k=2)
    assert isinstance(results, list)
    assert repr(results).count("proponents:") == 3
    assert results._repr_html_().count("Proponents") == 3
    table = results.to_pandas()
    assert table["query"].tolist() == [number for number in range(3) for _ in range(4)]


def test_a_notebook_shows_classes_and_examples_and_nothing_of_them_is_markup(result: InfluenceResult) -> None:
    page = result._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; ") == 8
    assert page.count("<tr>") == 10
    broken = replace(result, task=Broken(tiny.mlp, ROWS))._repr_html_()
    assert broken.count("not shown: ValueError: &lt;script&gt;") == 8
    assert "example" not in replace(result, task=None)._repr_html_()


def test_images_are_shown_and_other_addresses_are_not(result: InfluenceResult) -> None:
    class Pictures(Named):
        def render(self, example: Any) -> dict[str, Any]:
            return {"image": "data:image/png;base64,AA" if example[1] else "https://elsewhere/a.png"}

    page = replace(result, task=Pictures(tiny.mlp, ROWS))._repr_html_()
    hits = [*result.proponents, *result.opponents]
    assert page.count('<img src="data:image/png;base64,AA"') == sum(bool(hit.label) for hit in hits)
    assert "elsewhere" not in page


def test_a_line_for_each_hit(result: InfluenceResult) -> None:
    table = result.to_pandas()
    hits: list[Hit] = [*result.proponents, *result.opponents]
    assert table["row"].tolist() == [hit.row for hit in hits]
    assert table["side"].tolist() == ["proponent"] * 4 + ["opponent"] * 4
    assert table["rank"].tolist() == [1, 2, 3, 4] * 2
    parts = table[[name for name in table if str(name).startswith("part:")]]
    assert list(parts) == ["part:1.pt", "part:2.pt"]
    assert parts.sum(axis=1).tolist() == pytest.approx(table["score"].tolist(), rel=1e-4)
    assert any(str(name).startswith("layer:") for name in table)


def test_groups_show_themselves(index: Index) -> None:
    (groups, *_) = index.group_influence(QUERIES)
    assert repr(groups).splitlines()[0].split() == ["group", "rows", "sum", "mean"]
    assert groups.to_pandas()["sum"].tolist() == [group.sum for group in groups]
    assert groups._repr_html_().count("<tr>") == len(groups) + 1


def test_an_index_shows_itself(index: Index, tmp_path: Path) -> None:
    assert f"<Index {index.directory}: 30 rows x 2 checkpoints x 20 spectral dimensions in float16" in repr(index)
    assert "methods tracin, graddot" in repr(index)
    table = index.to_pandas()
    assert list(table) == ["row", "present", "label", "prediction", "loss", "correct", "norm"]
    assert table["label"].tolist() == [label for _, label in ROWS]
    page = replace_name(index)._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    built = tiny.build(Named(tiny.mlp, ROWS), tmp_path)
    delete_rows(tmp_path / "index", [3])
    assert not built.to_pandas().equals(tiny.build(Named(tiny.mlp, ROWS), tmp_path).to_pandas())


def replace_name(index: Index) -> Index:
    """The index with a checkpoint of an evil name."""
    entries = [entry.model_copy(update={"name": EVIL}) for entry in index.manifest.checkpoints]
    changed = Index(index.contents)
    changed.manifest = index.manifest.model_copy(update={"checkpoints": entries})
    return changed


def test_without_pandas_its_remedy_is_told(result: InfluenceResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingLibraryError, match=r"pandas is not installed; pip install 'gradtrace\[pandas\]'"):
        result.to_pandas()
