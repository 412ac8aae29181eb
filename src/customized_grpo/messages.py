"""Words for bad configurations: the field, its file, what was found, what was expected, the nearest name."""

import difflib
import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from customized_grpo.config import Config

WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
HELP = "See --help for all options."


def explain(message: str, arguments: Sequence[str], model: type[BaseModel] = Config) -> str:
    """An error of the argument parser in one line; `arguments` tell which configuration file a field stands in, `model`
    which fields there are."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " ".join(line for line in lines if "validation error" not in line and "errors.pydantic.dev" not in line)
    text = re.sub(r" \[type=\w+, input_value=(.*?), input_type=\w+\]", r" (found \1)", text)
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (\S*)", r"expected one of \1 (found '\2')", text)
    text = re.sub(r'Parser key "([\w.]+)":', r"\1:", text)
    text = text.replace(' in "<unicode string>",', "")
    text = re.sub(r"^([\w.]+): Does not validate.*Given value: (.*)", partial(_none_of_its_types, model), text)
    unknown = re.search(r"does not accept (?:option|nested key) '([\w.]+)'", text)
    unknown = unknown or re.search(r"[Uu]nrecognized arguments: --([\w.]+)", text)
    if unknown:
        text = f"unknown option or configuration field '{unknown[1]}'.{_nearest(unknown[1], model)}"
    place = re.match(r"([\w.]+):", text)
    field = unknown[1] if unknown else place[1] if place else ""
    return f"{_file_of(field, arguments)}{text}\n{HELP}"


def worded(error: ValidationError) -> str:
    """All that pydantic found wrong, in our words: field, what is wrong, what was found."""
    return "; ".join(_worded(each) for each in error.errors())


def _worded(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    text = error["msg"].removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict | BaseModel) else f" (found {error['input']!r})"
    return f"{place}: {text}{found}" if place else text


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields of the configuration, sections included."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def _none_of_its_types(model: type[BaseModel], found: re.Match[str]) -> str:
    """The parser names the types of a field that may be left out; a reader wants the values, where they are few."""
    annotation: Any = model
    for part in found[1].split("."):
        fields = getattr(annotation, "model_fields", {})
        if part not in fields:
            return found[0]
        annotation = fields[part].annotation
    kinds = get_args(annotation)
    choices = [repr(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    names = [WORDS[kind] for kind in kinds if kind in WORDS]
    expected = f"one of {', '.join(choices)}" if choices else " or ".join(names)
    return f"{found[1]}: expected {expected} (found '{found[2].split(' - ')[0]}')" if expected else found[0]


def _nearest(name: str, model: type[BaseModel]) -> str:
    """A hint at the known field most like `name`; the same last part in another section counts as near."""
    names = field_names(model)
    last = name.split(".")[-1]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    near = near or [known for known in names if known.split(".")[-1] == last]
    near = near or [k for k in names if difflib.get_close_matches(last, [k.split(".")[-1]], n=1, cutoff=0.75)]
    return f" Did you mean '{near[0]}'?" if near else ""


def _file_of(field: str, arguments: Sequence[str]) -> str:
    """'FILE: ' when `field` was not given as an option and stands in the --config file; or when the file is broken."""
    files = [value for name, value in pairwise(arguments) if name == "--config"]
    files += [name.removeprefix("--config=") for name in arguments if name.startswith("--config=")]
    given = any(name.split("=")[0] == f"--{field}" for name in arguments)
    if given or not files or not Path(files[-1]).is_file():
        return ""
    key = field.split(".")[-1]
    text = Path(files[-1]).read_text(encoding="utf-8", errors="replace")
    stands = re.search(rf"^\s*{re.escape(key)}\s*:", text, re.MULTILINE) if key else True
    return f"{files[-1]}: " if stands or not field else ""
