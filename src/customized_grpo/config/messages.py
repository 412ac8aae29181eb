"""Words for bad settings: the field, what was found, what was expected, the nearest name."""

import difflib
import re
import shlex
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from customized_grpo.config.renamed import describe_rename, new_name
from customized_grpo.config.run import Config

WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def format_parser_error(
    message: str, arguments: Sequence[str], model: type[BaseModel] = Config, options: Sequence[str] = ()
) -> str:
    """Return an error of the argument parser in one line.

    `arguments` are what the parser was given; its options are the fields of `model` and `options`.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " ".join(line for line in lines if "validation error" not in line and "errors.pydantic.dev" not in line)
    text = re.sub(r'Parser key "([\w.]+)":', r"\1:", text)
    known = [*field_names(model), *options]
    text = re.sub(
        r"^argument --([\w.]+): expected (?:one|at least one) argument.*", partial(_valueless, arguments, known), text
    )
    text = re.sub(r"the following arguments are required: (.*)", partial(_missing, options), text)
    text = re.sub(r"^([\w.]+): .*?Expected an? <class '(\w+)'>.*(?:Got|Given) value: (.*)", _of_its_type, text)
    field = re.match(r"([\w.]+):", text)
    stranger = re.search(r"(?:does not accept (?:option|nested key) '|[Uu]nrecognized arguments: --)([\w.-]+)", text)
    dashed = re.match(r"[Uu]nrecognized arguments: (-[^-].*)", text)
    if dashed:
        text = f"unknown option {dashed[1]}; give a value that begins with a dash as --OPTION=VALUE, or after -- alone"
    elif stranger:
        text = unknown(stranger[1], known)
    elif field and field[1] in field_names(model):
        text = _of_field(field[1], arguments, model) or text
    return text


def format_validation_error(error: ValidationError, fields_of: type[BaseModel] | None = None) -> str:
    """Return every fault that pydantic found, in our words: field, fault, found value.

    With `fields_of`, the model that was validated: what is wrong with single fields alone.
    """
    return "; ".join(
        _worded(each) for each in error.errors() if fields_of is None or section_at(fields_of, _place(each)) is None
    )


def renamed_fields(error: ValidationError) -> list[str]:
    """Return a sentence for each field in `error` that goes by another name now."""
    places = [_place(each) for each in error.errors() if each["type"] == "extra_forbidden"]
    return [told for told in map(describe_rename, places) if told is not None]


def unknown(name: str, names: Sequence[str]) -> str:
    """Return the error for an unknown field or option `name`: its new name, or the most similar of `names`.

    The same last part in another section counts as similar.
    """
    plain = name.replace("-", "_")
    if new_name(plain) in names:
        return f"{describe_rename(plain)}; use the new name"
    last = plain.split(".")[-1]
    near = difflib.get_close_matches(plain, names, n=1, cutoff=0.75)
    near = near or [known for known in names if known.split(".")[-1] == last]
    near = near or [k for k in names if difflib.get_close_matches(last, [k.split(".")[-1]], n=1, cutoff=0.75)]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown option or configuration field '{name}'.{hint}"


def values_of(option: str, arguments: Sequence[str]) -> list[str]:
    """Return the values that `arguments` give the option, as `--option VALUE` and as `--option=VALUE`."""
    values = [value for name, value in pairwise(arguments) if name == f"--{option}"]
    return values + [name.partition("=")[2] for name in arguments if name.startswith(f"--{option}=")]


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all fields of the configuration, sections included."""
    names = []
    for name in model.model_fields:
        names.append(prefix + name)
        section = section_at(model, name)
        names += field_names(section, f"{prefix}{name}.") if section else []
    return names


def section_at(model: type[BaseModel], place: str) -> type[BaseModel] | None:
    """Return the section of `model` named `place` (dotted), `model` for "", None if it is a field or unknown."""
    section: Any = model
    for part in place.split(".") if place else ():
        fields = section.model_fields
        section = fields[part].annotation if part in fields else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return None
    found: type[BaseModel] = section
    return found


def _worded(error: Any) -> str:
    place, text = _place(error), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden" and (told := describe_rename(place)):
        return f"{told}; use the new name"
    found = "" if isinstance(error["input"], dict | BaseModel) else f" (found {error['input']!r})"
    return f"{place}: {text}{found}" if place else text


def _place(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"])


def _of_field(place: str, arguments: Sequence[str], model: type[BaseModel]) -> str | None:
    """Return what is wrong with the value that `arguments` give the field at `place`, None where that is not the
    field's."""
    section = section_at(model, place)
    if section is not None:
        return f"{place}: a section; give its fields, as --{place}.{next(iter(section.model_fields))} VALUE"
    values = values_of(place, arguments)
    try:
        tree = yaml.safe_load(values[-1]) if values else None
        for part in reversed(place.split(".")):
            tree = {part: tree}
        model.model_validate(tree)
    except yaml.YAMLError:
        return None
    except ValidationError as error:
        return format_validation_error(error, fields_of=model) if values else None
    return None


def _of_its_type(found: re.Match[str]) -> str:
    return f"{found[1]}: expected {WORDS.get(found[2], found[2])} (found {found[3].split(' - ')[0]!r})"


def _missing(options: Sequence[str], found: re.Match[str]) -> str:
    """Return the missing option as a user types it: the parser calls an option of a command COMMAND.OPTION."""
    names = [name.split(".")[-1] for name in found[1].split(", ")]
    return f"missing: {', '.join(f'--{name}' if name in options else name.upper() for name in names)}"


def _valueless(arguments: Sequence[str], known: Sequence[str], found: re.Match[str]) -> str:
    """Say what to write where an option has no value, or one that the parser takes for the next option."""
    name = f"--{found[1]}"
    value = next((value for option, value in pairwise(arguments) if option == name and value.startswith("-")), "--")
    text = f"{name}: expected a value after it"
    if value == "--" or value.removeprefix("--").partition("=")[0] in known:
        return text
    return f"{text}; give one that begins with a dash as {shlex.quote(f'{name}={value}')}"
