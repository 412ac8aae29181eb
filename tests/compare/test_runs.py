import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from customized_grpo.compare.results import VALUES, select, summarise
from customized_grpo.compare.runs import Cell, read_results
from customized_grpo.errors import UserError

MakeGrid = Callable[..., list[Cell]]


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


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


def test_figures_of_the_whole_and_the_best_adapter_are_read(small_grid: MakeGrid) -> None:
    cells = small_grid(("naive-1:1",), 3)
    last, best, start = cells
    for cell, iteration in ((best, 10), (start, 0)):
        (cell.folder / "best").mkdir()
        (cell.folder / "best" / "best.json").write_text(json.dumps({"iteration": iteration}))
    evaluation = best.folder / "evaluation"
    shutil.copy(evaluation / "tuned.json", evaluation / "best.json")
    summary = {"texture": {"mean": 1.25}, "diversity": {"mean": None}, "joint_success": {"mean": 9.0}, "new": {}}
    rewrite(evaluation / "best.json", lambda content: content | {"summary": summary})
    rewrite(start.folder / "evaluation" / "tuned.json", lambda content: content | {"summary": summary})
    found = select(read_results(cells), "", "naive-1:1")
    assert not any(name.startswith("best") for name in found[0].values) and last.seed == 0
    assert found[1].values["best_iteration"] == 10 and found[1].values["best/texture"] == 1.25
    assert found[1].values["best/joint_success"] == found[1].values["joint_success"]
    assert "best/diversity" not in found[1].values and "texture" not in found[1].values
    base = select(read_results(cells), "", "base")[2]
    assert found[2].values["best_iteration"] == 0 and found[2].values["texture"] == 1.25
    assert found[2].values["best/joint_success"] == base.values["joint_success"]
    (evaluation / "best.json").unlink()
    with pytest.raises(UserError, match=r"best\.json is missing; write it again"):
        read_results(cells)
