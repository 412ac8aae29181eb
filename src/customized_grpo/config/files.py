"""Checks of configuration files before they are merged: an error names the file and the line."""

from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from customized_grpo.config.messages import (
    annotation_at,
    field_names,
    format_validation_error,
    named_section,
    section_at,
    unknown,
)
from customized_grpo.config.renamed import describe_rename
from customized_grpo.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
Problem = tuple[yaml.Mark, str]


def check_file(path: Path, model: type[BaseModel]) -> None:
    """Raise `UserError` if the file at `path` is not YAML, repeats a name, or does not fit `model`.

    Names that `model` does not have and values that its fields do not take are errors. Rules between fields are checked
    after merging.
    """
    if not path.is_file():
        raise UserError(f"--config: {path} is {'a folder' if path.is_dir() else 'not there'}; expected a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            found = "none" if root is None else "something else"
            raise UserError(f"{path}: expected settings, as `iterations: 50`, found {found}")
        for mark, problem in (*_duplicate_keys(root, ""), *_unknown_keys(root, model, "")):
            raise UserError(f"{path}:{mark.line + 1}: {problem}")
        model.model_validate(yaml.safe_load(text))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        if told := format_validation_error(error, fields_of=model):
            raise UserError(f"{path}: {told}") from error


def _duplicate_keys(node: yaml.Node, prefix: str) -> Iterator[Problem]:
    """Yield keys that a mapping repeats; YAML would silently take the last."""
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        if name in lines:
            yield key.start_mark, f"{name} stands in line {lines[name]} already; remove one of the two"
        lines[name] = key.start_mark.line + 1
        yield from _duplicate_keys(value, f"{name}.")


def _unknown_keys(node: yaml.MappingNode, model: type[BaseModel], prefix: str) -> Iterator[Problem]:
    """Yield names that are not fields, and fields that are not sections."""
    for key, value in node.value:
        if key.tag == MERGE:
            continue
        name = f"{prefix}{key.value}"
        first, dot, rest = str(key.value).partition(".")
        annotation = annotation_at(model, name)
        section, named = section_at(model, name), named_section(annotation)
        told = None if isinstance(value, yaml.MappingNode) else describe_rename(name)
        if annotation is None or told:
            yield key.start_mark, told or unknown(name, field_names(model))
        elif dot:
            yield key.start_mark, f"{name}: write `{first}:` and below it, indented, `{rest}:`"
        elif (section or named) and not isinstance(value, yaml.MappingNode):
            fields = f"its fields below it, of {', '.join(section.model_fields)}" if section else "names below it"
            yield key.start_mark, f"{name}: expected {fields}; or remove the line"
        elif section or named:
            yield from _unknown_keys(value, model, f"{name}.")
