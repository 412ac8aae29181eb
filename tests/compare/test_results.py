import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.compare.results import (
    METRICS,
    VALUES,
    Cell,
    Result,
    presets_in,
    read_csv,
    read_results,
    select,
    summarise,
    write_csv,
)
from customized_grpo.errors import UserError
from customized_grpo.tracking.metric_info import METRIC_INFOS, MetricInfo

MakeGrid = Callable[..., list[Cell]]
T_975 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}
"""From a printed table of Student's t, by degrees of freedom."""


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def result(preset: str, seed: int, joint: float | None, setting: str = "") -> Result:
    return Result(setting, preset, seed, {} if joint is None else {"joint_success": joint}, {})


def test_a_result_holds_means_over_pairs_and_parts_of_training(grid: list[Cell]) -> None:
    cell = grid[0]
    found = select(read_results(grid), "", "naive-1:1")[0]
    records = json.loads((cell.folder / "evaluation" / "tuned.json").read_text())["records"]
    metrics = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
    assert found.values["pairs"] == 48 and found.values["iterations"] == 20
    for name in ("joint_success", "copied", "reward/identity"):
        assert found.values[name] == pytest.approx(sum(record[name] for record in records) / 48)
    assert found.values["early/conflict_rate"] == pytest.approx(np.mean([m["conflict_rate"] for m in metrics[:4]]))
    assert found.values["late/both_good"] == pytest.approx(np.mean([m["quadrant/both_good"] for m in metrics[-4:]]))
    assert found.values["conflict_rate"] == pytest.approx(np.mean([m["conflict_rate"] for m in metrics]))
    assert found.values["seconds"] == pytest.approx(sum(m["seconds/total"] for m in metrics))
    assert list(found.curve["joint_success"]) == [0, 10, 20]
    assert set(found.values) == set(VALUES)


def test_only_finished_runs_count_in_the_order_of_the_grid(grid: list[Cell]) -> None:
    found = [(r.preset, r.seed) for r in read_results(list(grid))]
    expected = [(p, s) for p in ("base", "naive-1:1", "naive-1:1.5", "customized") for s in range(3)]
    assert found == [each for each in expected if each != ("customized", 2)]


def test_base_comes_from_any_finished_run_of_the_seed(grid: list[Cell]) -> None:
    for cell in grid:
        if cell.seed == 1 and cell.preset != "customized":
            shutil.rmtree(cell.folder)
    base = select(read_results(grid), "", "base")
    records = json.loads((grid[5].folder / "evaluation" / "base.json").read_text())["records"]
    assert grid[5].seed == 1 and sorted(base) == [0, 1, 2]
    assert base[1].values["identity_kept"] == pytest.approx(np.mean([r["identity_kept"] for r in records]))
    assert "conflict_rate" not in base[1].values and base[1].curve == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content | {"records": content["records"][:-1]},
        lambda content: content | {"records": content["records"][::-1]},
        lambda content: content | {"records": [{**r, "id": r["id"] + "b"} for r in content["records"]]},
    ],
    ids=["fewer", "other order", "other ids"],
)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_unequal_pairs_are_refused(grid: list[Cell], side: str, change: Callable[[Any], Any]) -> None:
    rewrite(grid[4].folder / "evaluation" / f"{side}.json", change)
    with pytest.raises(UserError, match="other pairs") as error:
        read_results(grid)
    assert str(grid[4].folder) in str(error.value) and "customized-grpo evaluate --run" in str(error.value)


def test_settings_may_be_evaluated_on_pairs_of_their_own(small_grid: MakeGrid) -> None:
    cells = small_grid(("naive-1:1",), 2, ("leaky", "blind"))
    for cell in (cell for cell in cells if cell.setting == "blind"):
        for side in ("base", "tuned"):
            rewrite(
                cell.folder / "evaluation" / f"{side}.json",
                lambda content: content | {"records": content["records"][:9]},
            )
    assert {(r.setting, r.values["pairs"]) for r in read_results(cells)} == {("leaky", 48), ("blind", 9)}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"records": []}', '{"records": [{"prompt": "x"}]}', '{"records": 3}']
)
def test_a_broken_evaluation_is_named(grid: list[Cell], text: str) -> None:
    path = grid[1].folder / "evaluation" / "tuned.json"
    path.write_text(text)
    with pytest.raises(UserError, match="evaluate --run") as error:
        read_results(grid)
    assert str(path) in str(error.value)


def test_an_absent_metric_stays_absent(small_grid: MakeGrid) -> None:
    results = read_results(small_grid(("naive-1:1", "customized"), 2, copied=False))
    assert all("copied" not in r.values and "copied" not in r.curve for r in results)
    row = summarise(results)[-1]
    assert "copied" not in row.means and "copied" not in row.differences and "joint_success" in row.differences


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5))
def test_means_and_intervals_are_over_seeds(values: list[float]) -> None:
    (row,) = summarise([result("sars", seed, value) for seed, value in enumerate(values)])
    n, mean = len(values), sum(values) / len(values)
    half = T_975[n - 1] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert row.means["joint_success"] == pytest.approx((mean, mean - half, mean + half), abs=1e-5)
    assert row.seeds == tuple(range(n)) and row.differences == {}


def test_differences_pair_the_seeds_that_both_have() -> None:
    results = [result("naive-1:1", seed, value) for seed, value in ((0, 0.2), (1, 0.6), (2, 0.3))]
    results += [result("customized", seed, value) for seed, value in ((1, 0.7), (2, 0.5), (3, 0.9))]
    row = next(row for row in summarise(results) if row.preset == "customized")
    mean, half = 0.15, T_975[1] * 0.05
    assert row.shared == (1, 2)
    assert row.differences["joint_success"] == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert row.means["joint_success"][0] == pytest.approx(0.7)


@pytest.mark.parametrize("others", [[(0, 0.5)], [(0, 0.5), (7, 0.5)], [(0, 0.5), (1, None)]])
def test_one_shared_seed_gives_no_difference(others: list[tuple[int, float | None]]) -> None:
    results = [result("naive-1:1", seed, 0.4) for seed in range(3)]
    results += [result("customized", seed, value) for seed, value in others]
    assert summarise(results)[-1].differences == {}


def test_one_seed_gives_no_interval_and_zeros_and_ones_no_wilson_interval() -> None:
    alone, shares = summarise([result("min", 0, 0.5), *(result("max", seed, float(seed)) for seed in (0, 1))])
    assert alone.means["joint_success"][0] == 0.5 and all(map(math.isnan, alone.means["joint_success"][1:]))
    assert shares.means["joint_success"][1] == pytest.approx(0.5 - T_975[1] * 0.5, abs=1e-5)


def test_differences_stay_within_a_setting() -> None:
    results = [result("naive-1:1", seed, 0.4, "a") for seed in range(2)]
    results += [result("customized", seed, 0.5, "b") for seed in range(2)]
    assert [(row.setting, row.preset, row.differences) for row in summarise(results)] == [
        ("a", "naive-1:1", {}),
        ("b", "customized", {}),
    ]


def test_presets_follow_the_order_asked_for() -> None:
    results = [result(name, 0, 0.1) for name in ("zeta", "max", "base", "min")]
    assert presets_in(results) == ["base", "zeta", "max", "min"]
    assert presets_in(results, ["min", "absent", "max"]) == ["base", "min", "max", "zeta"]
    assert [row.preset for row in summarise(results, order=["min"])] == ["base", "min", "zeta", "max"]


def test_the_table_alone_gives_the_same_summary(grid: list[Cell], tmp_path: Path) -> None:
    results, path = read_results(grid), tmp_path / "out" / "comparison.csv"
    write_csv(path, results)
    for row, again in zip(summarise(results), summarise(read_csv(path)), strict=True):
        assert (row.setting, row.preset, row.seeds, row.shared) == (
            again.setting,
            again.preset,
            again.seeds,
            again.shared,
        )
        assert row.means.keys() == again.means.keys() and row.differences.keys() == again.differences.keys()
        for name in row.means:
            assert row.means[name] == pytest.approx(again.means[name], abs=1e-4, nan_ok=True)
    assert [path.name for path in path.parent.iterdir()] == ["comparison.csv"]


six_digits = st.floats(-1e4, 1e4).map(lambda value: round(value, 6))
results_of_any_kind = st.builds(
    Result,
    st.sampled_from(["", "leaky", 'a,"b"\nc', "é ü"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=9),
    st.integers(0, 10**6),
    st.dictionaries(st.sampled_from(VALUES), six_digits),
    st.dictionaries(
        st.sampled_from(["joint_success", "reward/prompt", "copied"]),
        st.dictionaries(st.integers(0, 10**6), six_digits, min_size=1),
    ),
)


@settings(deadline=None)
@given(results=st.lists(results_of_any_kind, max_size=4))
def test_csv_round_trip(results: list[Result], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("csv") / "comparison.csv"
    write_csv(path, results)
    assert read_csv(path) == results
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert read_csv(path) == results


def test_the_csv_reads_as_documented(grid: list[Cell], tmp_path: Path) -> None:
    path = tmp_path / "comparison.csv"
    write_csv(path, read_results(grid))
    header, first = (line.split(",") for line in path.read_text().splitlines()[:2])
    assert header[:3] == ["setting", "preset", "seed"] and header[-1] == "curve/reward/identity@20"
    assert set(METRICS) < set(header) and "late/only_prompt" in header
    assert first[:3] == ["", "base", "0"] and max(len(value.partition(".")[2]) for value in first) <= 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("seed", "sed", 1), "no column seed"),
        (lambda text: text.replace("curve/joint_success@20", "curve/joint@20"), "curve/joint@20"),
        (lambda text: text.replace("pairs", "pears", 1), "pears"),
        (lambda text: text.replace(",48,", ",many,", 1), ":2: pairs is 'many'"),
        (lambda text: text.replace(",base,0,", ",base,1.5,", 1), ":2: seed is '1.5'"),
        (lambda text: text.replace("\n", ",0.5\n", 3).replace(",0.5\n", "\n", 1), ":2:"),
        (lambda text: "", "no column setting"),
    ],
)
def test_a_broken_csv_is_named(grid: list[Cell], tmp_path: Path, change: Callable[[str], str], told: str) -> None:
    path = tmp_path / "comparison.csv"
    write_csv(path, read_results(grid))
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match="comparison.csv") as error:
        read_csv(path)
    assert told in str(error.value)


def test_a_missing_csv_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv does not exist"):
        read_csv(tmp_path / "nowhere.csv")


def test_a_new_metric_of_one_row_is_compared_and_kept_in_the_csv(
    small_grid: MakeGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = small_grid(["naive-1:1", "customized"], 2)
    for cell in cells:
        for path in (cell.folder / "evaluation" / "base.json", cell.folder / "evaluation" / "tuned.json"):
            content = json.loads(path.read_text())
            content["records"] = [record | {"brightness": 0.5} for record in content["records"]]
            path.write_text(json.dumps(content))
    assert "brightness" not in read_results(cells)[0].values
    monkeypatch.setitem(METRIC_INFOS, "brightness", MetricInfo("brightness", "lit pictures", unit="share"))
    results = read_results(cells)
    assert summarise(results)[0].means["brightness"][0] == 0.5
    write_csv(tmp_path / "comparison.csv", results)
    assert [result.values["brightness"] for result in read_csv(tmp_path / "comparison.csv")] == [0.5] * len(results)
