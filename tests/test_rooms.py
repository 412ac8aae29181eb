"""Which room of the package may know of ToyBox."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import customized_grpo

ROOT = Path(customized_grpo.__file__).parent
MAY_IMPORT = ("cli", "factory", "toybox")
MAY_ASK = (*MAY_IMPORT, "config")


def imported(source: str) -> Iterator[str]:
    """Yield the modules that Python code imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield f"{node.module}."
        elif isinstance(node, ast.Import):
            yield from (f"{name.name}." for name in node.names)


def offenders(allowed: tuple[str, ...], is_offence: Callable[[str], bool]) -> list[str]:
    """Return the files outside the rooms `allowed` whose text is an offence."""
    found = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    assert len(found) > 100
    return [str(path) for path, text in found.items() if path.parts[0] not in allowed and is_offence(text)]


def test_only_the_factory_and_the_command_line_import_toybox() -> None:
    def imports_toybox(source: str) -> bool:
        return any(name.startswith("customized_grpo.toybox.") for name in imported(source))

    assert offenders(MAY_IMPORT, imports_toybox) == []
    assert imports_toybox("def f():\n    from customized_grpo.toybox.oracle import Oracle")


def test_only_the_factory_and_the_configuration_ask_whether_a_kind_is_toybox() -> None:
    def compares_with_toybox(source: str) -> bool:
        compared = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare))
        constants = (part for node in compared for part in ast.walk(node) if isinstance(part, ast.Constant))
        return any(part.value == "toybox" for part in constants)

    assert offenders(MAY_ASK, compares_with_toybox) == []
    assert compares_with_toybox("if kind in ('a', 'toybox'): pass")
