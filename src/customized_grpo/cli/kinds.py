"""Settings of a kind that another kind replaces: an option or a file that changes the kind leaves none of them behind.

A recipe says `identity: {kind: dino, dino: {reference: segmented}}`. With `--rewards.identity.kind remote` after it the
section `dino` would be set and not read, which is an error. So it goes back to its defaults.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from customized_grpo.config.messages import annotation_at, field_names, named_section
from customized_grpo.config.run import flatten
from customized_grpo.config.section import Section

Settings = dict[str, Any]


def reset_other_kinds(arguments: Sequence[str], model: type[Section]) -> list[str]:
    """Return `arguments` with options that put back what earlier ones set for a kind that a later one replaces.

    `arguments`: options of the fields of `model`, and paths of configuration files that were checked.
    """
    named = [name for name in field_names(model) if named_section(annotation_at(model, name))]
    given: Settings = {}
    result: list[str] = []
    for words, settings in _sources(arguments):
        result += words
        changed = [
            name for name, value in settings.items() if _is_kind(name, named) and given.get(name, value) != value
        ]
        for place in (name.removesuffix(".kind") for name in changed):
            result += _reset(place, settings, given, model)
        given |= settings
    return result


def _sources(arguments: Sequence[str]) -> Iterator[tuple[list[str], Settings]]:
    """Yield the arguments one by one, an option with its value, and the settings that each holds by dotted name."""
    rest = list(arguments)
    while rest:
        name, equals, value = rest[0].partition("=")
        with_value = name.startswith("--") and not equals and len(rest) > 1 and not rest[1].startswith("--")
        words, rest = rest[: 1 + with_value], rest[1 + with_value :]
        value = words[-1] if with_value else value
        if name == "--config":
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            yield words, flatten(content)
        else:
            yield words, {name.removeprefix("--"): value} if name.startswith("--") else {}


def _is_kind(name: str, named: Sequence[str]) -> bool:
    parent, _, field = name.rpartition(".")
    return field == "kind" and parent.rpartition(".")[0] in named


def _reset(place: str, settings: Mapping[str, Any], given: Settings, model: type[BaseModel]) -> Iterator[str]:
    """Yield options for the fields at `place` that were `given` and that the kind in `settings` does not read."""
    section = annotation_at(model, place)
    others = set(section.SWITCHES["kind"]) - {settings[f"{place}.kind"]}
    for name in [name for name in given if name.startswith(f"{place}.") and name not in settings]:
        readers = section.readers(name.removeprefix(f"{place}.").partition(".")[0])
        parent, _, field = name.rpartition(".")
        fields = annotation_at(model, parent).model_fields
        if readers and set(readers) <= others and field in fields:
            del given[name]
            default = fields[field].default
            yield f"--{name}={default if isinstance(default, str) else json.dumps(default)}"
