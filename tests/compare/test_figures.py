import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from customized_grpo.compare.figures import draw_svgs, write_figures
from customized_grpo.compare.results import Result
from customized_grpo.compare.runs import Cell, read_results
from customized_grpo.compare.table import read_csv, write_csv
from customized_grpo.report.style import _apart

MakeGrid = Callable[..., list[Cell]]


def words(svg: str) -> list[str]:
    return [
        "".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")
    ]


def test_the_figures_of_one_setting(grid: list[Cell], tmp_path: Path) -> None:
    paths = write_figures(read_results(grid), tmp_path / "figures", ["naive-1:1", "naive-1:1.5", "customized"])
    assert {path.stem for path in paths} == {"curves", "plane", "signals", "joint"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{path.stem}.{suffix}" for path in paths for suffix in ("svg", "png")
    }
    for path in paths:
        with Image.open(path.with_suffix(".png")) as picture:
            assert picture.width == 1800
        told = words(path.read_text())
        assert {"naive-1:1", "naive-1:1.5", "customized"} <= set(told), path.stem
    assert "base" in words((tmp_path / "figures" / "plane.svg").read_text())


def test_several_settings_have_a_panel_each_and_a_figure_of_their_own(small_grid: MakeGrid) -> None:
    drawn = draw_svgs(read_results(small_grid(("naive-1:1", "customized"), 2, ("blind", "leaky"))))
    assert set(drawn) == {"curves", "plane", "signals", "joint", "settings"}
    for name, svg in drawn.items():
        assert {"blind", "leaky"} <= {part for text in words(svg) for part in text.split(" \u00b7 ")}, name
    assert words(drawn["signals"]).count("50.2") == 2


def test_the_same_numbers_give_the_same_bytes(grid: list[Cell], tmp_path: Path) -> None:
    results = read_results(grid)
    write_csv(tmp_path / "comparison.csv", results)
    once, again = (write_figures(read_csv(tmp_path / "comparison.csv"), tmp_path / name) for name in ("a", "b"))
    for one, other in zip(once, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.with_suffix(".png").read_bytes() == other.with_suffix(".png").read_bytes()
        assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", one.read_text())


def test_text_is_text_in_fonts_that_other_machines_have(grid: list[Cell]) -> None:
    svg = draw_svgs(read_results(grid))["joint"]
    assert "Joint success" in words(svg)
    families = re.findall(r"font-family: ([^;\"]+)|font: [^'\"]*('[^;\"]+)", svg)
    assert families and all(any(found.endswith(", sans-serif") for found in pair) for pair in families)


def test_what_is_not_known_is_not_drawn(grid: list[Cell]) -> None:
    results = [Result(r.setting, r.preset, r.seed, {"joint_success": 0.5}, {}) for r in read_results(grid)]
    assert set(draw_svgs(results)) == {"joint"}
    assert draw_svgs([]) == {}


def test_a_single_seed_and_a_missing_judge_can_be_drawn(small_grid: MakeGrid) -> None:
    results = read_results(small_grid(("naive-1:1", "customized"), 1, ("a", "b"), copied=False))
    assert set(draw_svgs(results)) == {"curves", "plane", "signals", "joint", "settings"}


def test_names_are_shown_as_they_are(small_grid: MakeGrid) -> None:
    names = ("<b>&amp;", "$x_1$", 'a"b', "a_b^c")
    found = read_results(small_grid(("a", "b", "c", "d"), 2))
    results = [Result(r.setting, names["abcd".find(r.preset)], r.seed, r.values, r.curve) for r in found if r.curve]
    for figure, svg in draw_svgs(results).items():
        assert set(names[: 3 if figure == "curves" else 4]) <= set(words(svg)), figure


def test_labels_of_presets_do_not_overlap(small_grid: MakeGrid) -> None:
    names = [f"preset-{n}" for n in range(12)]
    results = [
        Result(
            "",
            name,
            seed,
            {"identity_kept": 0.5 + 0.002 * n, "prompt_satisfied": 0.5 + 0.003 * (n % 4) + 0.001 * seed},
            {},
        )
        for n, name in enumerate(names)
        for seed in range(2)
    ]
    svg = draw_svgs(results)["plane"]
    spots = [
        (float(node.get("transform", "").split("(")[-1].split()[1]), float(node.get("transform", "").split()[-1][:-1]))
        for node in ElementTree.fromstring(svg).iter()
        if node.tag.endswith("}text") and (node.text or "").startswith("preset-")
    ]
    assert len(spots) == 12
    for n, (x, y) in enumerate(spots):
        assert all(abs(y - b) > 7 or abs(x - a) > 35 for a, b in spots[:n])


@settings(deadline=None)
@given(st.lists(st.floats(0, 300), max_size=8).map(sorted), st.floats(1, 20))
def test_names_at_curve_ends_are_moved_apart_in_order(levels: list[float], gap: float) -> None:
    moved = _apart(levels, gap)
    assert len(moved) == len(levels) and all(b - a > gap - 1e-6 for a, b in pairwise(moved))
    if all(b - a > gap for a, b in pairwise(levels)):
        assert moved == pytest.approx(levels)
