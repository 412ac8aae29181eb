import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.compare.results import METRICS, VALUES, Result, summarise
from customized_grpo.compare.runs import Cell, read_results
from customized_grpo.compare.table import merged, read_csv, write_csv
from customized_grpo.errors import UserError
from customized_grpo.tracking.metric_info import METRIC_INFOS, MetricInfo

MakeGrid = Callable[..., list[Cell]]


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


def run(preset: str, seed: int, joint: float, setting: str = "") -> Result:
    return Result(setting, preset, seed, {"joint_success": joint}, {})


def test_tables_are_merged_in_the_order_of_the_grid() -> None:
    kept = [run("sars", 1, 0.1, "b"), run("old", 0, 0.2, "a"), run("base", 0, 0.3, "a"), run("sars", 0, 0.4, "a")]
    found = [run("tdw", 0, 0.5, "a"), run("sars", 0, 0.6, "a"), run("base", 0, 0.7, "b")]
    rows = merged(kept, found, ["a", "b"], ["tdw", "sars"])
    assert [(row.setting, row.preset, row.seed, row.values["joint_success"]) for row in rows] == [
        ("a", "base", 0, 0.3), ("a", "tdw", 0, 0.5), ("a", "sars", 0, 0.6), ("a", "old", 0, 0.2),
        ("b", "base", 0, 0.7), ("b", "sars", 1, 0.1),
    ]  # fmt: skip


def test_the_best_adapter_has_columns(tmp_path: Path) -> None:
    path, values = tmp_path / "comparison.csv", {"best/texture": 1.2, "best_iteration": 25.0, "texture": 1.3}
    results = [Result("", "sars", 0, values, {}), run("sars", 1, 0.5)]
    write_csv(path, results)
    assert read_csv(path) == results
    assert path.read_text().splitlines()[0].endswith("iterations,texture,best_iteration,best/texture")
    path.write_text(path.read_text().replace("best/texture", "best/unheard"))
    with pytest.raises(UserError, match="unknown column 'best/unheard'"):
        read_csv(path)
