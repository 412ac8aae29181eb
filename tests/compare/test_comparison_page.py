import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from customized_grpo.compare.page import verb, write_page
from customized_grpo.compare.results import Result, select
from customized_grpo.compare.runs import Cell, read_results

MakeGrid = Callable[..., list[Cell]]
VOID = {"meta", "img"}
FIGURES = {
    name: f'<svg viewBox="0 0 1 1"><text>{name}</text></svg>' for name in ("joint", "plane", "curves", "signals")
}


class Page(HTMLParser):
    """Tags with their attributes, and the visible text in one line."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.open, self.words = (
            html,
            list[tuple[str, dict[str, str | None]]](),
            list[str](),
            list[str](),
        )
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture
def drawn() -> None:
    """Asks for the true figures."""


@pytest.fixture(autouse=True)
def _light_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and most tests do not look at figures."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("customized_grpo.compare.page.draw_svgs", lambda results, order: FIGURES)


def page(cells: list[Cell], results: list[Result] | None = None, **options: Any) -> Page:
    given = {"title": "A comparison", "settings_text": "jobs: 1\n", "failures": {}} | options
    folder = cells[0].folder.parents[1]
    path = write_page(read_results(cells) if results is None else results, cells, folder, **given)
    assert path == folder / "comparison.html" and not list(folder.glob("*.part"))
    return Page(path.read_text(encoding="utf-8"))


def rows_of(found: Page) -> list[str]:
    return re.findall(r"<tr class=\"(?:ours)?\">.*?</tr>", found.html, re.DOTALL)


def test_a_complete_grid(small_grid: MakeGrid) -> None:
    found = page(small_grid(("naive-1:1", "customized"), 3))
    assert found.open == []
    for heading in (
        "Results",
        "Paired differences to naive-1:1",
        "Joint success",
        "The prompt\u2013identity plane",
        "The course of training",
        "Do the rewards pull apart?",
        "The same reference and prompt under every preset",
        "Full configuration",
    ):
        assert heading in found.text
    assert "With customized , joint success rose from" in found.text.replace("customized,", "customized ,")
    assert "The best adapter against the last" not in found.text
    assert "Where it helps" not in found.text and "In progress" not in found.text and "FAILED" not in found.text
    assert "nan" not in found.text.lower()


def test_the_best_adapters_stand_beside_the_last_ones(small_grid: MakeGrid) -> None:
    cells = small_grid(("naive-1:1", "customized"), 2, best=10)
    found = page(cells)
    assert found.open == [] and "The best adapter against the last" in found.text
    row = next(row for row in rows_of(found) if "10, 10" in row and "customized" in row)
    text = " ".join(re.sub(r"<[^>]+>", " ", row).split())
    last = select(read_results(cells), "", "customized")
    mean = sum(run.values["joint_success"] for run in last.values()) / 2
    assert f"last {100 * mean:.1f}" in text and "1.10 last 1.21" in text and "\u2212" in text


@pytest.mark.usefixtures("drawn")
def test_it_opens_offline_and_ids_are_unique(small_grid: MakeGrid) -> None:
    found = page(small_grid(("naive-1:1", "customized"), 2, ("blind", "leaky")))
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)|<script|<link|javascript:", found.html)
    assert "Where it helps" in found.text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for target in re.findall(r"(?:url\(#|xlink:href=\"#)([\w.-]+)", found.html):
        assert target in ids
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(pictures) == 2 * 2 * 4 and all((p["src"] or "").startswith("data:image/png") for p in pictures)


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        ((0.1, 0.05, 0.15), "rose"),
        ((-0.1, -0.15, -0.05), "fell"),
        ((0.1, -0.05, 0.25), "did not differ measurably"),
        ((0.0, 0.0, 0.0), "did not differ measurably"),
    ],
)
def test_the_verb_is_what_the_interval_says(difference: tuple[float, float, float], word: str) -> None:
    assert verb(difference) == word


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        ((0.5, 0.7, 0.6), "joint success rose from 30.0 % under naive-1:1 to 60.0 %: +30.0 points"),
        ((0.1, 0.3, 0.2), "joint success fell from 30.0 % under naive-1:1 to 20.0 %: \u221210.0 points"),
        ((0.5, 0.4, 0.03), "joint success did not differ measurably, 31.0 % and 30.0 %: +1.0 points"),
    ],
)
def test_the_headline_is_the_paired_difference(small_grid: MakeGrid, after: tuple[float, ...], sentence: str) -> None:
    cells = small_grid(("naive-1:1", "customized"), 1)
    sides = {"naive-1:1": (0.2, 0.4, 0.3, 0.9), "customized": after}
    results = [Result("", p, s, {"joint_success": v}, {}) for p, values in sides.items() for s, v in enumerate(values)]
    assert sentence in re.sub(r"\s+([:,])", r"\1", page(cells, results).text)


def test_an_unfinished_grid_says_so_and_names_failures(grid: list[Cell]) -> None:
    found = page(grid, failures={"customized seed 2": "the loss is not finite"})
    assert "8 of 9 runs are done" in found.text
    assert "FAILED" in found.text and "customized seed 2 : the loss is not finite" in found.text


def test_one_seed_gives_means_without_intervals_and_no_verdict(small_grid: MakeGrid) -> None:
    found = page(small_grid(("naive-1:1", "customized"), 1))
    assert "No verdict yet on customized against naive-1:1" in found.text
    assert "Paired differences" not in found.text
    assert len(rows_of(found)) == 3 and "<small>" not in "".join(rows_of(found))


def test_a_grid_without_the_pair_leads_with_the_kept_best(small_grid: MakeGrid) -> None:
    cells = small_grid(("customized",), 2)
    sides = {"joint_success": 0.2, "best/joint_success": 0.5, "best_iteration": 10.0}
    results = [Result("", "customized", seed, sides, {}) for seed in range(2)]
    found = page(cells, results).text
    assert "No verdict" not in found
    assert re.search(r"Joint success of the adapter of the best validation.*customized : 50.0 % and 20.0 %", found)


def test_a_metric_of_some_presets_is_a_dash_elsewhere(small_grid: MakeGrid) -> None:
    cells = small_grid(("naive-1:1", "customized"), 2)
    results = [
        Result(r.setting, r.preset, r.seed, {k: v for k, v in r.values.items() if k != "copied"}, r.curve)
        if r.preset == "naive-1:1"
        else r
        for r in read_results(cells)
    ]
    base, naive, ours = rows_of(page(cells, results))[:3]
    assert [row.count("\u2013") for row in (base, naive, ours)] == [2, 1, 0]


def test_a_metric_of_no_preset_has_no_column(small_grid: MakeGrid) -> None:
    cells = small_grid(("naive-1:1", "customized"), 2)
    assert "Copy-paste rate</th>" in page(cells).html
    for cell in cells:
        for side in ("base", "tuned"):
            path = cell.folder / "evaluation" / f"{side}.json"
            content = json.loads(path.read_text())
            for record in content["records"]:
                del record["copied"]
            path.write_text(json.dumps(content))
    assert "Copy-paste rate</th>" not in page(cells).html


def test_several_settings_group_the_table(small_grid: MakeGrid) -> None:
    found = page(small_grid(("naive-1:1", "customized"), 2, ("blind", "leaky")))
    assert "Joint success of customized against naive-1:1" in found.text
    groups = re.findall(r'<tr class="setting"><th[^>]*><span>(\w+)</span>', found.html)
    assert groups == ["blind", "leaky", "blind", "leaky"]
    assert "blind, seed 0" in found.text and "leaky, seed 0" in found.text


def test_the_gallery_takes_the_lowest_seed_that_all_presets_have(small_grid: MakeGrid) -> None:
    cells = small_grid(("naive-1:1", "customized"), 3)
    (cells[1].folder / "report.html").unlink()
    assert (cells[1].preset, cells[1].seed) == ("customized", 0)
    found = page(cells)
    assert "seed 1" in found.text and "seed 0" not in found.text and "not finished there" not in found.text
    for cell in cells:
        if (cell.preset == "customized") == (cell.seed > 0):
            (cell.folder / "report.html").unlink(missing_ok=True)
    (cells[1].folder / "report.html").write_text("")
    assert "seed 0, not finished there: naive-1:1" in page(cells).text


def test_pictures_stay_inside_the_run(small_grid: MakeGrid) -> None:
    cells = small_grid(("customized",), 1, pictures=1)
    secret = cells[0].folder / "evaluation" / "secret_tuned.png"
    secret.write_bytes((cells[0].folder / "evaluation" / "images" / "test-00000_tuned.png").read_bytes())
    for side in ("base", "tuned"):
        path = cells[0].folder / "evaluation" / f"{side}.json"
        content = json.loads(path.read_text())
        content["records"][1]["id"] = "../secret"
        path.write_text(json.dumps(content))
    assert sum(tag == "img" for tag, _ in page(cells).tags) == 3


def test_without_runs_the_page_is_made_of_the_table_alone(grid: list[Cell]) -> None:
    results = read_results(grid)
    path = write_page(results, [], grid[0].folder.parents[1], title="t", settings_text="", failures={})
    found = Page(path.read_text())
    assert "Results" in found.text and "The same reference" not in found.text and "In progress" not in found.text


@pytest.mark.usefixtures("drawn")
def test_names_are_escaped_and_secrets_left_out(small_grid: MakeGrid) -> None:
    nasty = "<script>alert(\"1\")</script> & 'x'"
    cells = small_grid(("naive-1:1", "customized"), 2)
    cells = [Cell(nasty if c.seed else "b", c.preset.replace("naive-1:1", nasty), c.seed, c.folder) for c in cells]
    for cell in cells:
        for side in ("base", "tuned"):
            path = cell.folder / "evaluation" / f"{side}.json"
            content = json.loads(path.read_text())
            content["records"][0]["prompt"] = nasty
            path.write_text(json.dumps(content))
    options = {"title": nasty, "failures": {nasty: nasty}}
    found = page(cells, settings_text=f"api_key: hunter2\ntitle: {nasty}\n", **options)
    assert "<script" not in found.html and "hunter2" not in found.html and "(not shown)" in found.text
    assert found.text.count("alert(") >= 7 and found.open == []
