"""Words for bad settings: the field, what was found, what was expected, the nearest name."""

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from customized_grpo.config.renamed import describe_rename, new_name
from customized_grpo.config.run import Config

NAME = "NAME"
"""Stands in the names of fields for a name of the user's."""
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
    if told := next(filter(None, (_of_named(name, arguments, model, known) for name in _options_in(arguments))), None):
        return told
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
    elif field and annotation_at(model, field[1]) is not None:
        text = _of_field(field[1], arguments, model) or text
    return text


def format_validation_error(error: ValidationError, fields_of: type[BaseModel] | None = None) -> str:
    """Return every fault that pydantic found, in our words: field, fault, found value.

    With `fields_of`, the model that was validated: what is wrong with single fields alone.
    """
    return "; ".join(_worded(each) for each in error.errors() if fields_of is None or _of_one_field(each, fields_of))


def renamed_fields(error: ValidationError) -> list[str]:
    """Return a sentence for each field in `error` that goes by another name now, or is gone."""
    return [told for each in error.errors() if (told := describe_rename(_place(each))) is not None]


def unknown(name: str, names: Sequence[str]) -> str:
    """Return the error for an unknown field or option `name`: its new name, or the most similar of `names`.

    The same last part in another section counts as similar.
    """
    plain = name.replace("-", "_")
    told, new = describe_rename(plain), new_name(plain)
    if told and (new is None or new in names):
        return told
    names = [_as_in(plain, known) for known in names]
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
    """Return the dotted names of all fields of the configuration, sections included.

    Of sections that go by names of the user's, as rewards do, it has one for all: `rewards.NAME.kind`.
    """
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if section := _section(field.annotation):
            names += field_names(section, f"{prefix}{name}.")
        elif named := named_section(field.annotation):
            names += [f"{prefix}{name}.{NAME}", *field_names(named, f"{prefix}{name}.{NAME}.")]
    return names


def section_at(model: type[BaseModel], place: str) -> type[BaseModel] | None:
    """Return the section of `model` named `place` (dotted), `model` for "", None if it is a field or unknown."""
    return _section(annotation_at(model, place))


def annotation_at(model: type[BaseModel], place: str) -> Any:
    """Return the type of the field or section of `model` at `place` (dotted), `model` for "", None if unknown."""
    found: Any = model
    for part in place.split(".") if place else ():
        if named := named_section(found):
            found = named
        else:
            section = _section(found)
            found = section.model_fields[part].annotation if section and part in section.model_fields else None
    return found


def default_at(model: type[BaseModel], place: str) -> Any:
    """Return the default of the field of `model` at `place` (dotted), whose sections all have names of our own."""
    parent, _, field = place.rpartition(".")
    section = section_at(model, parent)
    return None if section is None else section.model_fields[field].default


def named_section(annotation: Any) -> type[BaseModel] | None:
    """Return what each value is of a field that holds sections by names of the user's; None for other fields."""
    return _section(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _as_in(name: str, known: str) -> str:
    """Return the name `known` of a field with the name of the user's that `name` has in place of NAME."""
    parts, given = known.split("."), name.split(".")
    if NAME in parts and given[: (place := parts.index(NAME))] == parts[:place] and len(given) > place:
        parts[place] = given[place]
    return ".".join(parts)


def _of_one_field(error: Any, model: type[BaseModel]) -> bool:
    """Return whether an error is of a single field that was given, and not of a section or of what is missing."""
    return error["type"] != "missing" and section_at(model, _place(error)) is None


def _worded(error: Any) -> str:
    place, text = _place(error), error["msg"].removeprefix("Value error, ")
    if told := describe_rename(place):
        return told
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


def _options_in(arguments: Sequence[str]) -> Iterator[str]:
    return (name[2:].partition("=")[0] for name in arguments if name.startswith("--"))


def _of_named(option: str, arguments: Sequence[str], model: type[BaseModel], known: Sequence[str]) -> str | None:
    """Return what is wrong with an option in a section that goes by a name of the user's; None for other options.

    The parser itself does not say which of the sections it means.
    """
    parents = [".".join(option.split(".")[:end]) for end in range(1, option.count(".") + 1)]
    named = [place for place in parents if named_section(annotation_at(model, place))]
    if not named:
        return None
    if annotation_at(model, option) is None or describe_rename(option):
        return unknown(option, known)
    if not values_of(option, arguments):
        return None
    if told := _of_field(option, arguments, model):
        return told
    section, kind = ".".join(option.split(".")[: named[0].count(".") + 2]), f"{named[0]}.{NAME}.kind"
    given = [name for name in _options_in(arguments) if name == f"{section}.kind"]
    if kind in known and not given and section.split(".")[-1] not in default_at(model, named[0]):
        return f"{section}.kind: missing; give it, or check the name {section.split('.')[-1]}"
    return None


def _of_its_type(found: re.Match[str]) -> str:
    return f"{found[1]}: expected {WORDS.get(found[2], found[2])} (found {found[3].split(' - ')[0]!r})"


def _missing(options: Sequence[str], found: re.Match[str]) -> str:
    """Return the missing option as a user types it: the parser calls an option of a command COMMAND.OPTION."""
    names = [name.split(".")[-1] for name in found[1].split(", ")]
    if names == ["kind"]:
        return "kind: missing; each reward of `rewards` and each metric of `evaluation.metrics` needs one"
    return f"missing: {', '.join(f'--{name}' if name in options else name.upper() for name in names)}"


def _valueless(arguments: Sequence[str], known: Sequence[str], found: re.Match[str]) -> str:
    """Say what to write where an option has no value, or one that the parser takes for the next option."""
    name = f"--{found[1]}"
    value = next((value for option, value in pairwise(arguments) if option == name and value.startswith("-")), "--")
    text = f"{name}: expected a value after it"
    if value == "--" or value.removeprefix("--").partition("=")[0] in known:
        return text
    return f"{text}; give one that begins with a dash as {shlex.quote(f'{name}={value}')}"
