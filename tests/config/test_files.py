"""What is wrong in a configuration file is told with its name and, where it has one, its line."""

from pathlib import Path

import pytest

from customized_grpo.compare.config import CompareConfig
from customized_grpo.config.files import check_file
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations: 3\nseed: 1\niterations: 5\n", ":3: iterations stands in line 1 already; remove one of the two"),
        ("data: {path: a}\nseed: 1\ndata:\n  test: b\n", ":3: data stands in line 1 already"),
        ("rollout:\n  eta: 0.3\n  eta: 0.4\n", ":3: rollout.eta stands in line 2 already"),
        (
            "seed: 1\nrollout:\n  etta: 0.3\n",
            ":3: unknown option or configuration field 'rollout.etta'. Did you mean 'r",
        ),
        ("rollout.eta: 0.3\n", ":1: rollout.eta: write `rollout:` and below it, indented, `eta:`"),
        (
            "seed: 1\ndata:\n",
            ":2: data: expected its fields below it, of path, validation, test, max_pixels; or remove",
        ),
        ("data: here\n", ":1: data: expected its fields below it"),
        ("rewards:\n  a:\n    hpsv3: x\n", ":3: rewards.a.hpsv3: expected its fields below it, of model, backbone"),
        ("rewards: [a, b]\n", ":1: rewards: expected names below it; or remove the line"),
        ("rewards:\n  a: {kind: dino}\n  a: {kind: clip_i}\n", ":3: rewards.a stands in line 2 already"),
        (
            "rewards:\n  a: {knd: dino}\n",
            ":2: unknown option or configuration field 'rewards.a.knd'. Did you mean 'rewards.a.kind'",
        ),
        ("evaluation: {metrics: {m: {kind: dinoo}}}\n", ": evaluation.metrics.m.kind: Input should be 'toybox_"),
        ("rollout:\n  group_size: 1\n", ": rollout.group_size: Input should be greater than or equal to 2 (found 1)"),
        ("optimizer: {betas: [1, 2, 3]}\n", ": optimizer.betas: Tuple should have at most 2 items"),
        ("seed: x\niterations: y\n", "(found 'y'); seed: Input should be a valid integer"),
        ("rewards: {a: {kind: dinoo}}\n", ": rewards.a.kind: Input should be 'toybox_prompt', "),
        ("", ": expected settings, as `iterations: 50`, found none"),
        ("# nothing yet\n", ": expected settings, as `iterations: 50`, found none"),
        ("- a\n- b\n", ": expected settings, as `iterations: 50`, found something else"),
        ("seed: [1\n", ": not YAML (while parsing a flow sequence"),
        ("seed: !!python/object/apply:os.system [ls]\n", ": not YAML (could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        check_file(path, Config)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {learning_rate: 1e-3}\n",
        "policy: {pipeline: {model: null}}\n",
        "data: &d {path: a}\n",
        "rollout:\n  <<: {eta: 0.4}\n  group_size: 3\n",
        # Another file, or an option, may make room for it.
        "rollout: {trained_steps: window, window: {size: 40}}\n",
    ],
)
def test_what_is_right_in_itself_is_taken(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    check_file(tmp_path / "run.yaml", Config)


def test_sections_lie_in_one_another(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("presets: {sars: 3}\ntrain:\n  rollout: {etta: 0.2}\n")
    with pytest.raises(UserError, match=r":3: .*'train.rollout.etta'. Did you mean 'train.rollout.eta'"):
        check_file(path, CompareConfig)
    path.write_text("presets:\n  sars: 3\n  sars: 4\n")
    with pytest.raises(UserError, match=r":3: presets.sars stands in line 2 already"):
        check_file(path, CompareConfig)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config: .*none.yaml is not there"):
        check_file(tmp_path / "none.yaml", Config)
    with pytest.raises(UserError, match=r"--config: .* is a folder"):
        check_file(tmp_path, Config)
    (tmp_path / "latin.yaml").write_bytes("output: caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml: not UTF-8 text"):
        check_file(tmp_path / "latin.yaml", Config)
