import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from customized_grpo import config
from customized_grpo.benchmark.config import MetricsConfig
from customized_grpo.compare.config import CompareConfig, run_settings
from customized_grpo.config.advantages import AdvantagesConfig
from customized_grpo.config.evaluation import MetricConfig
from customized_grpo.config.messages import named_section
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.recipes import find_recipe, list_recipes
from customized_grpo.config.rewards import RewardConfig
from customized_grpo.config.rollout import RolloutConfig
from customized_grpo.config.run import Config, flatten
from customized_grpo.config.section import Section

ROOM = Path(config.__file__).parent
SECTIONS = (PolicyConfig, RolloutConfig, AdvantagesConfig, RewardConfig, MetricConfig, MetricsConfig)
PROMPT = {"kind": "toybox_prompt"}
ROUGH = {"kind": "texture", "role": "constraint"}


OWNERS = ("settings", "config", "reward", "score", "each", "evaluation", "settings[name]")
"""What code calls a section that it reads."""


def leaves(model: type[BaseModel], section: str = "config") -> Iterator[tuple[str, str]]:
    """Yield the fields that hold values: the name of their section, and their own."""
    for name, field in model.model_fields.items():
        section_of = named_section(field.annotation) or field.annotation
        if isinstance(section_of, type) and issubclass(section_of, BaseModel):
            yield from leaves(section_of, name)
        else:
            yield section, name


def attributes_read(source: Path) -> set[tuple[str, str]]:
    """Return the attributes in the code of `source`, each after the last name of its owner.

    `config.rollout.window.size` is (window, size), and `f(**config.tdw.model_dump())` is (tdw, **).
    """
    found = set()
    for path in source.rglob("*.py"):
        text = path.read_text() if path.parent != ROOM else ""
        found |= {(owner, "**") for owner in re.findall(r"\*\*[\w.]*?(\w+)\.model_dump\(\)", text)}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute):
                found.add((ast.unparse(node.value).rpartition(".")[2].removeprefix("_"), node.attr))
    return found


def test_every_field_is_read_somewhere() -> None:
    """As an attribute of its section, or of what code calls the section that it reads."""
    read = attributes_read(ROOM.parent)
    unread = [
        f"{section}.{name}"
        for section, name in leaves(Config)
        if not read & {(section, "**"), *((owner, name) for owner in (section, *OWNERS))}
    ]
    assert unread == ["rewards.role"], "which the configuration itself reads: objectives and constraints"


def test_every_field_is_described() -> None:
    def bare(model: type[BaseModel]) -> list[str]:
        names = [f"{model.__name__}.{name}" for name, field in model.model_fields.items() if not field.description]
        fields = [field.annotation for field in model.model_fields.values()]
        inner = [named_section(each) or each for each in fields]
        return names + [n for i in inner if isinstance(i, type) and issubclass(i, BaseModel) for n in bare(i)]

    assert bare(Config) == []


def test_a_configuration_survives_yaml() -> None:
    config = Config.model_validate(
        {
            "output": "somewhere",
            "rollout": {"trained_steps": "window", "window": {"start": 1}},
            "advantages": {"weights": "table", "table": {"prompt": [0.5] * 10, "identity": [1] * 10}},
            "rewards": {
                "prompt": {"kind": "toybox_prompt", "up_to": 0.4},
                "identity": {"kind": "toybox_identity"},
                "rough": {"kind": "texture", "role": "constraint", "at_most": 1.2},
            },
            "evaluation": {"metrics": {"clip": {"kind": "clip_t"}}},
        }
    )
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_recipes_are_valid() -> None:
    names = list(list_recipes())
    assert "toybox" in names
    for name in names:
        model = CompareConfig if name.startswith("compare") else Config
        model.model_validate(yaml.safe_load(find_recipe(name).read_text(encoding="utf-8")))


def load_recipe(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
    return tree


def test_comparisons_train_alike() -> None:
    grids = [CompareConfig.model_validate(load_recipe(name)) for name in ("compare", "compare-leak", "compare-guard")]
    runs = [run_settings(grid, next(iter(grid.settings)), "customized", 0) for grid in grids]
    assert grids[0].train == grids[1].train
    long, short = flatten(runs[0]), flatten(runs[2])
    differing = {name for name in long.keys() | short.keys() if long.get(name) != short.get(name)}
    assert differing == {"iterations", "evaluation.every", "checkpoint.every"}


def test_the_long_recipe_is_the_demo_for_longer() -> None:
    demo, long = (flatten(load_recipe(name)) for name in ("toybox", "toybox-long"))
    assert {name for name in demo.keys() | long.keys() if demo.get(name) != long.get(name)} == {
        "output", "iterations", "data.validation", "data.test", "optimizer.learning_rate",
        "evaluation.num_test_samples", "evaluation.patience",
    }  # fmt: skip


def test_a_configuration_is_fixed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 1}, "seeds"),
        ({"rollout": {"group_sise": 3}}, "group_sise"),
        ({"iterations": 0}, "greater than or equal to 1"),
        ({"rollout": {"group_size": 1}}, "greater than or equal to 2"),
        ({"rollout": {"num_steps": "many"}}, "integer"),
        ({"rollout": {"eta": float("nan")}}, "finite"),
        ({"rollout": {"eta": 1.5, "sde": "cps"}}, "too large for sde='cps'"),
        ({"rollout": {"trained_steps": "window", "window": {"size": 10}}}, "does not fit"),
        (
            {"rollout": {"trained_steps": "window", "window": {"size": 4, "start": 6}}},
            "does not fit.*0 to 8 are trainable",
        ),
        ({"advantages": {"weights": "table"}}, "table: missing; give the weights of each reward"),
        (
            {"advantages": {"weights": "table", "table": {"prompt": [1], "identity": [1] * 10}}},
            "advantages.table.prompt has 1 weights, but rollout.num_steps is 10",
        ),
        (
            {"advantages": {"weights": "table", "table": {"prompt": [1] * 10}}},
            "advantages.table has weights of prompt, expected of prompt, identity",
        ),
        ({"advantages": {"weights": "table", "table": {"prompt": [-0.5] * 10}}}, "greater than or equal to 0"),
        (
            {"advantages": {"weights": "table", "table": {"prompt": [0] * 10, "identity": [0] * 10}}},
            "table: all weights are 0",
        ),
        ({"rewards": {}}, "no reward is an objective with a weight above 0"),
        ({"rewards": {"one": PROMPT | {"weight": 0}}}, "no reward is an objective with a weight above 0"),
        ({"rewards": {"one": {}}}, "rewards.one.kind"),
        ({"rewards": {"one": PROMPT | {"weight": -1}}}, "greater than or equal to 0"),
        ({"rewards": {"My reward": PROMPT}}, "'My reward' is no name; expected lower-case letters"),
        ({"rewards": {"one": PROMPT | {"schedule": "early"}}}, "a reward is early and none is late"),
        ({"rewards": {"one": PROMPT | {"schedule": "late"}, "two": PROMPT}}, "a reward is late and none is early"),
        (
            {"rewards": {"a": PROMPT | {"schedule": "early"}, "b": PROMPT | {"schedule": "late"}, "c": PROMPT}},
            "the constant weights come to 1, expected less than 1",
        ),
        ({"rewards": {"a": PROMPT, "b": ROUGH}}, "a constraint needs a bound; set at_least or at_most"),
        ({"rewards": {"a": PROMPT, "b": ROUGH | {"at_least": 2, "at_most": 1}}}, "nothing would hold both"),
        ({"rewards": {"a": PROMPT | {"at_least": 2}}}, "at_least: only for role=constraint"),
        ({"rewards": {"a": PROMPT, "b": ROUGH | {"at_most": 1, "weight": 2}}}, "weight: only for role=objective"),
        ({"rewards": {"a": PROMPT, "b": ROUGH | {"at_most": 1, "up_to": 2}}}, "up_to: only for role=objective"),
        ({"evaluation": {"metrics": {"held out": {"kind": "clip_i"}}}}, "'held out' is no name"),
        ({"policy": {"kind": "uno"}}, "rewards.prompt.kind=toybox_prompt, .*toybox does not read the pictures"),
        (
            {
                "policy": {"kind": "uno"},
                "rewards": {"a": {"kind": "dino"}},
                "evaluation": {"metrics": {"b": {"kind": "toybox_prompt"}}},
            },
            "evaluation.metrics.b.kind=toybox_prompt: toybox does not read",
        ),
        (
            {"optimizer": {"num_minibatches": 61}},
            "num_minibatches=61 is more than an iteration's 60 images",
        ),
        ({"rollout": {"window": {"start": 0, "period": 2}, "trained_steps": "window"}}, "leave one of them out"),
        ({"data": {"max_pixels": 200_000_000}}, "max_pixels"),
        # What nothing reads:
        ({"advantages": {"table": {"prompt": [1, 1]}}}, "table: only for weights=table"),
        (
            {"advantages": {"tdw": {"early": 0.6}, "weights": "table", "table": {"prompt": [1]}}},
            "tdw.early: only for weights=schedules",
        ),
        ({"advantages": {"tdw": {"early": 0.6}}, "rewards": {"a": PROMPT}}, "advantages.tdw: only for weights that"),
        ({"advantages": {"lookup": "counter"}, "rewards": {"a": PROMPT}}, "advantages.lookup: only for weights that"),
        (
            {"advantages": {"sars": {"gamma": 0.3}, "shape": "min"}},
            "sars.gamma: only for shape=sars .found shape=min.; leave it out",
        ),
        (
            {"advantages": {"sars": {"gamma_penalty": 1}, "shape": "none"}},
            "sars.gamma_penalty: only for shape=sars",
        ),
        ({"rollout": {"window": {"start": 0}}}, "window.start: only for trained_steps=window"),
        ({"rollout": {"window": {"size": 3, "start": 1}}}, "window.size, window.start: only for trained_steps=window"),
        ({"rollout": {"window": {"period": 3}}}, "window.period: only for trained_steps=window"),
        (
            {"rollout": {"trained_steps": "window", "subset": {"timestep_fraction": 0.5}}},
            "subset.timestep_fraction: only for trained_steps=subset .found trained_steps=window",
        ),
        ({"policy": {"toybox": {"adapter": "full"}, "lora_rank": 8}}, "lora_rank: only for toybox.adapter=lora"),
        ({"policy": {"toybox": {"adapter": "full"}, "lora_alpha": 8}}, "lora_alpha: only for toybox.adapter=lora"),
        ({"advantages": {"tdw": {"start": 23}}}, "start=23.0 comes after end=22.0"),
        ({"advantages": {"shape": "sarz"}}, "sars"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "less than 1"),
        ({"checkpoint": {"every": 4, "keep_every": 6}}, "keep_every=6 is not a multiple of every=4"),
        ({"checkpoint": {"keep": 2}}, "keep"),
        ({"optimizer": {"learning_rate": 0}}, "greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(settings)


def test_a_home_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config.model_validate({"data": {"path": "~/data"}, "output": "a~/b"})
    assert (config.data.path, config.output) == (tmp_path / "data", Path("a~/b"))
    policy = PolicyConfig.model_validate(
        {"kind": "uno", "pipeline": {"model": "~/flux", "base_adapter": "owner/name~/file"}}
    )
    assert (policy.pipeline.model, policy.pipeline.base_adapter) == (str(tmp_path / "flux"), "owner/name~/file")


def test_the_last_window_that_fits_is_accepted() -> None:
    config = Config.model_validate({"rollout": {"trained_steps": "window", "window": {"size": 4, "start": 5}}})
    assert (config.rollout.window.start, config.rollout.num_steps) == (5, 10)


def test_the_weight_decay_is_the_papers() -> None:
    assert Config().optimizer.weight_decay == 1e-4


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, name) for model in SECTIONS for name in model.model_fields if model.SWITCHES],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_section_in_one_with_switches_belongs_to_a_value_of_them(model: type[Section], name: str) -> None:
    annotation = model.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        assert model.readers(name), f"{name} is read whatever the switches say"
    values = {value for values in model.SWITCHES.values() for value in values}
    assert set(model.readers(name)) <= values


@pytest.mark.parametrize("kind", ["toybox", "uno"])
def test_a_saved_configuration_can_be_loaded_again(kind: str) -> None:
    """It holds every field, those of other kinds too."""
    rewards: dict[str, Any] = {"prompt": {"kind": "clip_t", "local": {"micro_batch": 4}}, "identity": {"kind": "dino"}}
    config = Config.model_validate({"policy": {"kind": kind}} | ({} if kind == "toybox" else {"rewards": rewards}))
    saved = config.model_dump(mode="json")
    assert {"toybox", "pipeline"} <= saved["policy"].keys() and Config.model_validate(saved) == config
