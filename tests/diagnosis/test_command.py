import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.diagnosis import GradientConflict, Sensitivity, calibrated_weights, measure
from customized_grpo.diagnosis.command import WRITTEN, diagnose, find, make_record, weights_yaml
from customized_grpo.diagnosis.figure import write_figure
from customized_grpo.errors import UserError
from customized_grpo.evaluation.statistics import t_interval
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.tracking.console import Display

MakeConfig = Callable[..., Config]
COUNTS = {"prompts": 2, "group_size": 2, "batches": 2}
SMALL = {
    "rollout.num_steps": 3,
    "rollout.group_size": 2,
    "rewards.prompt": {"kind": "toybox_prompt", "weight": 0.4},
    "rewards.identity": {"kind": "toybox_identity", "weight": 0.6},
}


@pytest.fixture
def small(make_config: MakeConfig) -> MakeConfig:
    return lambda changes=None: make_config(SMALL | (changes or {}))


def said(display: Display) -> str:
    return display.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_diagnosis_from_end_to_end(small: MakeConfig, tmp_path: Path, display: Display) -> None:
    output = tmp_path / "new" / "folder"
    assert diagnose(small(), output, display, **COUNTS) == output / "diagnosis.json"
    assert sorted(path.name for path in output.iterdir()) == sorted(WRITTEN)
    record = json.loads((output / "diagnosis.json").read_text())
    assert record["settings"]["prompts"] == record["settings"]["batches"] == 2
    assert len(record["sigmas"]) == 4 and record["settings"]["policy"]["precision"] == "fp32"
    gradients, curves = record["gradients"], record["sensitivity"]
    assert len(gradients["cosine"]) == len(gradients["norm"]["prompt"]) == 2
    assert [row["mean"] for row in gradients["cosine"]] == pytest.approx(
        np.mean(gradients["by_batch"], axis=0).tolist()
    )
    for name in ("prompt", "identity"):
        assert sum(row["mean"] for row in curves[name]["share"]) == pytest.approx(1)
        variances = np.array(curves[name]["by_prompt"])
        assert variances.shape == (2, 2)
        assert [row["mean"] for row in curves[name]["variance"]] == pytest.approx(variances.mean(0).tolist())
        assert curves[name]["std"] == pytest.approx(np.sqrt(variances.mean(0)).tolist())
    names = ("prompt", "identity")
    shares = [[curves[name]["share"][i]["mean"] for name in names] for i in range(2)]
    assert np.allclose(record["weights"]["calibrated"], calibrated_weights(shares, (0.4, 0.6), names))
    table = yaml.safe_load((output / "weights.yaml").read_text())["advantages"]["table"]
    columns = np.array([table[name] for name in names])
    assert np.allclose(columns.T, record["weights"]["calibrated"], atol=1e-6)
    assert record["weights"]["constant"] == [pytest.approx([0.4, 0.6])] * 3 and "tdw" not in record["weights"]
    assert "sensitivity: step 2/2" in said(display) and "gradients: step 4/4" in said(display)
    assert all(finding in said(display) for finding in record["findings"])


def test_a_run_is_measured_with_what_it_learned(small: MakeConfig, tmp_path: Path, display: Display) -> None:
    config, run = small(), tmp_path / "run"
    policy = build_policy(config.policy, config.seed)
    for _, parameter in policy.trainable_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    policy.save_adapter(run)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    output = tmp_path / "out"
    output.mkdir()
    (output / "diagnosis.json").write_text("an earlier one")
    tuned = json.loads(diagnose(None, output, display, run=run, **COUNTS).read_text())
    assert str(run) in tuned["settings"]["generator"] and str(run) in (output / "weights.yaml").read_text()
    base_weights = build_policy(config.policy, config.seed)
    dataset, rewards = SubjectDataset.open(config.data.path), build_rewards(config)
    for policy_, same in ((policy, True), (base_weights, False)):
        found = measure(config, policy_, rewards, dataset, prompts=2, group_size=2).variances[..., 0]
        assert np.allclose(found, tuned["sensitivity"]["prompt"]["by_prompt"], rtol=1e-6) == same


# bad input


@pytest.mark.parametrize("name", list(COUNTS))
def test_counts_below_two(small: MakeConfig, tmp_path: Path, display: Display, name: str) -> None:
    nowhere = small({"data.path": "nowhere"})
    with pytest.raises(UserError, match=f"--{name}: at least 2 .* found 1"):
        diagnose(nowhere, tmp_path / "out", display, **COUNTS | {name: 1})


def test_more_prompts_than_there_are(small: MakeConfig, tmp_path: Path, display: Display) -> None:
    with pytest.raises(UserError, match=r"--prompts: 13 were asked for, but .*train holds 12"):
        diagnose(small(), tmp_path / "out", display, **COUNTS | {"prompts": 13})
    assert not (tmp_path / "out").exists()


def test_neither_or_both_of_run_and_config(small: MakeConfig, tmp_path: Path, display: Display) -> None:
    for config, run in ((None, None), (small(), tmp_path)):
        with pytest.raises(UserError, match="give one of the two"):
            diagnose(config, tmp_path / "out", display, run=run, **COUNTS)


def test_a_folder_that_is_no_run(tmp_path: Path, display: Display) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        diagnose(None, tmp_path / "out", display, run=tmp_path, **COUNTS)


def test_a_folder_of_other_things_is_left_alone(small: MakeConfig, tmp_path: Path, display: Display) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "out" / "diagnosis.json").write_text("{}")
    with pytest.raises(UserError, match=r"out holds other files than a diagnosis \(thesis.txt\)"):
        diagnose(small(), tmp_path / "out", display, **COUNTS)
    for below in ("", "new"):
        with pytest.raises(UserError, match="--out: .*thesis.txt is a file; name a folder elsewhere"):
            diagnose(small(), tmp_path / "out" / "thesis.txt" / below, display, **COUNTS)


# weights.yaml


TABLE = {"prompt": [0.7, 0.3, 0.5], "identity": [0.2, 0.8, 0.5]}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.yaml"
    path.write_text(weights_yaml(np.array([[0.7, 0.2], [0.3, 0.8], [0.5, 0.5]]), ("prompt", "identity"), "two\nlines"))
    return path


def test_weights_are_a_comment_and_a_table(weights: Path) -> None:
    lines = weights.read_text().splitlines()
    settings = [line for line in lines if not line.startswith("#")]
    assert settings == ["advantages:", "  weights: table", "  table:", *settings[3:]] and len(settings) == 5
    assert yaml.safe_load(weights.read_text()) == {"advantages": {"weights": "table", "table": TABLE}}


def test_train_takes_the_weights_on_top_of_a_configuration(
    command: Callable[..., CompletedProcess[str]], tmp_path: Path, weights: Path
) -> None:
    own = {"rollout": {"num_steps": 3}, "advantages": {"sars": {"gamma": 0.3}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    merged = command("train", "--config", "own.yaml", "--config", weights, "--print_config")
    assert merged.returncode == 0, merged.stderr
    fields = yaml.safe_load(merged.stdout)
    advantages = Config.model_validate({k: v for k, v in fields.items() if k in Config.model_fields}).advantages
    assert advantages.weights == "table" and advantages.sars.gamma == 0.3
    assert advantages.table == {name: tuple(column) for name, column in TABLE.items()}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"rollout": {"num_steps": 4}}))
    refused = command("train", "--config", "own.yaml", "--config", weights)
    assert (
        refused.returncode == 2
        and "advantages.table.prompt has 3 weights, but rollout.num_steps is 4" in refused.stderr
    )


# findings and the figure


def conflict_around(cosine: float) -> GradientConflict:
    cosines = np.clip(cosine + np.random.default_rng(0).normal(0, 0.02, (6, 4)), -1, 1)
    return GradientConflict(cosines, np.ones((6, 4, 2)), cosines.mean(1), np.ones((6, 2)), cosines.mean(1))


def sensitivity_towards(prompt: float, identity: float) -> Sensitivity:
    curve = np.exp(-np.abs(np.arange(4)[:, None] - np.array([prompt, identity])))
    return Sensitivity(curve * np.random.default_rng(0).uniform(0.8, 1.2, (10, 4, 1)), ("prompt", "identity"))


@pytest.mark.parametrize(
    ("cosine", "verdict", "steps"),
    [
        (-0.4, "pull against each other", "at step 0, 1, 2, 3"),
        (0.4, "pull together", "at no step"),
        (0.0, "no direction is shown", "at no step"),
    ],
)
def test_findings_on_gradients(cosine: float, verdict: str, steps: str) -> None:
    conflict = conflict_around(cosine)
    if cosine == 0.0:
        conflict = GradientConflict(
            *(values - values.mean(0) for values in (conflict.cosines, conflict.norms)),
            *(values - values.mean(0) for values in (conflict.whole_cosines, conflict.norms, conflict.whole_cosines)),
        )
    whole, by_step, *_ = find(conflict, sensitivity_towards(0, 3))
    mean, low, high = t_interval(conflict.whole_cosines)
    assert verdict in whole and steps in by_step
    assert f"{mean:+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "−") in whole


@pytest.mark.parametrize(
    ("places", "order"), [((0, 3), "earlier than"), ((3, 0), "later than"), ((1, 1), "no earlier")]
)
def test_findings_on_sensitivity(places: tuple[float, float], order: str) -> None:
    sensitivity = sensitivity_towards(*places)
    *_, halves, centres = find(conflict_around(0.1), sensitivity)
    assert order in centres
    first = [next(n for n in range(1, 5) if column[:n].sum() >= 0.5) for column in sensitivity.shares().T]
    assert (
        f"first {first[0]} of 4 trainable steps" in halves and f"identity reward's in the first {first[1]}." in halves
    )


def test_three_rewards_are_recorded_and_found_by_their_names() -> None:
    names = ("prompt", "identity", "style")
    curve = np.exp(-np.abs(np.arange(4)[:, None] - np.array([0, 3, 1])))
    sensitivity = Sensitivity(curve * np.random.default_rng(0).uniform(0.8, 1.2, (10, 4, 1)), names)
    two = conflict_around(-0.4)
    conflict = GradientConflict(
        two.cosines, np.ones((6, 4, 3)), two.whole_cosines, np.ones((6, 3)), two.advantage_cosines
    )
    record = make_record(conflict, sensitivity)
    assert set(names) <= set(record["sensitivity"]) and set(record["gradients"]["norm"]) == set(names)
    gap = record["sensitivity"]["centre_difference prompt-style"]
    assert gap["mean"] == pytest.approx(sensitivity.centres()[2] - sensitivity.centres()[0])
    _, _, halves, *orders = find(conflict, sensitivity)
    assert "half of the style reward's in the first" in halves and len(orders) == 3
    assert orders[0].startswith("The prompt reward is decided earlier than the identity reward")
    assert orders[2].startswith("The identity reward is decided later than the style reward")


def record_of(steps: int, **gaps: Any) -> dict[str, Any]:
    row = {"mean": 0.2, "low": 0.1, "high": 0.3} | gaps
    return {
        "rewards": {"prompt": "toybox_prompt", "identity": "toybox_identity"},
        "gradients": {"cosine": [row] * steps, "whole": {"cosine": row}, "advantage_cosine": row},
        "sensitivity": {name: {"share": [row] * steps} for name in ("prompt", "identity")},
        "weights": {name: [[0.5, 0.5]] * (steps + 1) for name in ("calibrated", "tdw", "constant")},
    }


def test_equal_records_give_equal_figures(tmp_path: Path) -> None:
    first, second = (write_figure(record_of(9), tmp_path / name) for name in ("a", "b"))
    assert [path.suffix for path in first] == [".svg", ".png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "<svg" in first[0].read_text() and first[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [1, 49])
def test_unknown_numbers_leave_gaps(tmp_path: Path, steps: int) -> None:
    svg, _ = write_figure(record_of(steps, mean=None, low=None, high=None), tmp_path / "gaps")
    assert "nan" not in svg.read_text().lower()
