import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from customized_grpo import config
from customized_grpo.compare.config import CompareConfig, run_settings
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.recipes import find_recipe, list_recipes
from customized_grpo.config.run import Config
from customized_grpo.config.section import Section

ROOM = Path(config.__file__).parent
MODULES = [import_module(f"customized_grpo.config.{path.stem}") for path in sorted(ROOM.glob("[a-z]*.py"))]
SECTIONS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Section)
}
Field = tuple[str, str]


def fields_of(model: type[BaseModel]) -> set[Field]:
    found: set[Field] = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields_of(field.annotation)
        else:
            found.add((model.__name__, name))
    return found


class Reads(ast.NodeVisitor):
    """The fields of configuration sections that a module's code reads, by following which names hold which section."""

    def __init__(self) -> None:
        self.read: set[Field] = set()
        self.held: dict[str, type[BaseModel]] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.held = self.held, dict(self.held)
        for argument in node.args.args + node.args.kwonlyargs:
            self.hold(argument.arg, annotated(argument.annotation))
        self.generic_visit(node)
        self.held = outer | {name: held for name, held in self.held.items() if name.startswith("self.")}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.held = self.held, dict(self.held)
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                self.hold(f"self.{line.target.id}", annotated(line.annotation))
        self.generic_visit(node)
        self.held = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        targets, values = node.targets[0], node.value
        if not (isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple)):
            targets, values = ast.Tuple([targets]), ast.Tuple([values])
        for target, value in zip(targets.elts, values.elts, strict=True):
            self.hold(ast.unparse(target), self.section(value))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.section(node.value)
        if owner is not None and node.attr in owner.model_fields:
            self.read.add((owner.__name__, node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """`section.model_dump(include={...})` reads those fields."""
        if isinstance(node.func, ast.Attribute) and node.func.attr == "model_dump":
            owner = self.section(node.func.value)
            for keyword in node.keywords:
                if owner is not None and keyword.arg == "include":
                    self.read |= {(owner.__name__, name) for name in ast.literal_eval(keyword.value)}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.splat(keyword.value)
        self.generic_visit(node)

    def splat(self, value: ast.expr) -> None:
        """`function(**section.model_dump())` reads them all: one that the function does not know is an error."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and not value.keywords:
            owner = self.section(value.func.value)
            if owner is not None:
                self.read |= {(owner.__name__, name) for name in owner.model_fields}

    def hold(self, name: str, section: type[BaseModel] | None) -> None:
        self.held.pop(name, None)
        if section is not None:
            self.held[name] = section

    def section(self, node: ast.expr) -> type[BaseModel] | None:
        """The section that an expression is."""
        name = ast.unparse(node)
        if name in self.held:
            return self.held[name]
        if isinstance(node, ast.Call) and name.startswith("load_run_config("):
            return Config
        owner = self.section(node.value) if isinstance(node, ast.Attribute) else None
        field = owner.model_fields.get(node.attr) if owner and isinstance(node, ast.Attribute) else None
        annotation = field.annotation if field else None
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def annotated(annotation: ast.expr | None) -> type[BaseModel] | None:
    return SECTIONS.get(annotation.id) if isinstance(annotation, ast.Name) else None


def test_every_field_is_read_somewhere() -> None:
    source = ROOM.parent
    read: set[Field] = set()
    for path in source.rglob("*.py"):
        if path.parent != ROOM:
            reads = Reads()
            reads.visit(ast.parse(path.read_text()))
            read |= reads.read
    assert fields_of(Config) - read == set()


def test_every_field_is_described() -> None:
    def bare(model: type[BaseModel]) -> list[str]:
        names = [f"{model.__name__}.{name}" for name, field in model.model_fields.items() if not field.description]
        inner = [f.annotation for f in model.model_fields.values() if isinstance(f.annotation, type)]
        return names + [name for each in inner if issubclass(each, BaseModel) for name in bare(each)]

    assert bare(Config) == []


def test_a_configuration_survives_yaml() -> None:
    config = Config.model_validate(
        {
            "output": "somewhere",
            "rollout": {"steps": "window", "window_start": 1},
            "advantages": {"weights": "table", "table": [[0.5, 0.5]] * 10, "thresholds": [None, 0.4]},
        }
    )
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_recipes_are_valid() -> None:
    names = list(list_recipes())
    assert "toybox" in names
    for name in names:
        model = CompareConfig if name.startswith("compare") else Config
        model.model_validate(yaml.safe_load(find_recipe(name).read_text(encoding="utf-8")))


def test_the_comparisons_and_the_demo_train_alike() -> None:
    """What the presets change apart, a run of `make demo` is the preset 'customized' of both grids."""

    def load(name: str) -> dict[str, Any]:
        tree: dict[str, Any] = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
        return tree

    grids = [CompareConfig.model_validate(load(name)) for name in ("compare", "compare-leak")]
    assert grids[0].train == grids[1].train
    demo = Config.model_validate(load("toybox")).model_dump()
    found = Config.model_validate(run_settings(grids[0], "", "customized", 0)).model_dump()
    for section in ("output", "data", "checkpoint"):
        del demo[section], found[section]
    assert found == demo


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
        ({"rollout": {"steps": "window", "window_size": 10}}, "does not fit"),
        ({"rollout": {"steps": "window", "window_size": 4, "window_start": 6}}, "does not fit.*0 to 8 are trainable"),
        ({"advantages": {"weights": "table"}}, "advantages.table has 0 rows, but rollout.num_steps is 10"),
        ({"advantages": {"weights": "constant", "constant": [0.5, -0.5]}}, "greater than or equal to 0"),
        ({"advantages": {"weights": "table", "table": [[0.5, -0.5]] * 10}}, "greater than or equal to 0"),
        ({"advantages": {"weights": "constant", "constant": [0, 0]}}, "constant: all weights are 0"),
        ({"advantages": {"weights": "table", "table": [[0, 0]] * 10}}, "table: all weights are 0"),
        (
            {"optimizer": {"updates_per_iteration": 61}},
            "updates_per_iteration=61 is more than an iteration's 60 images",
        ),
        ({"rollout": {"window_start": 0, "window_period": 2, "steps": "window"}}, "leave one of them out"),
        ({"data": {"max_pixels": 200_000_000}}, "max_pixels"),
        # What nothing reads:
        ({"advantages": {"constant": [0.6, 0.4]}}, "constant: only for weights=constant or table .found tdw."),
        ({"advantages": {"table": [[1, 1]]}}, "table: only for weights=table"),
        ({"advantages": {"tdw": {"early": 0.6}, "weights": "constant"}}, "tdw: only for weights=tdw"),
        ({"advantages": {"lookup": "counter", "weights": "constant"}}, "lookup: only for weights=tdw or table"),
        ({"advantages": {"gamma": 0.3, "shape": "min"}}, "gamma: only for shape=sars .found min.; leave it out"),
        (
            {"advantages": {"gamma_penalty": 1, "shape": "none"}},
            "gamma_penalty: only for shape=sars",
        ),
        ({"rollout": {"window_start": 0}}, "window_start: only for steps=window"),
        ({"rollout": {"window_size": 3}}, "window_size: only for steps=window"),
        ({"rollout": {"window_period": 3}}, "window_period: only for steps=window"),
        ({"rollout": {"steps": "window", "subset_share": 0.5}}, "subset_share: only for steps=subset"),
        ({"policy": {"adapter": "full", "lora_rank": 8}}, "lora_rank: only for adapter=lora"),
        ({"policy": {"adapter": "full", "lora_alpha": 8}}, "lora_alpha: only for adapter=lora"),
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
    policy = PolicyConfig.model_validate({"kind": "uno", "model": "~/flux", "base_adapter": "owner/name~/file"})
    assert (policy.model, policy.base_adapter) == (str(tmp_path / "flux"), "owner/name~/file")


def test_the_last_window_that_fits_is_accepted() -> None:
    config = Config.model_validate({"rollout": {"steps": "window", "window_size": 4, "window_start": 5}})
    assert (config.rollout.window_start, config.rollout.num_steps) == (5, 10)


def test_the_weight_decay_is_the_papers() -> None:
    assert Config().optimizer.weight_decay == 1e-4
