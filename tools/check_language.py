"""Check the plain English of the project: `python tools/check_language.py [PATH ...]`, by default all of it.

* A function's docstring begins with a verb in the imperative, and its first sentence has at most 25 words.
* No text holds a phrase of PHRASES: docstrings, messages, help, documents. Each has a plainer word.

Exits with status 1 where a line breaks a rule.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 25
PHRASES = {
    r"\btold\b": "say who says what: 'is logged', 'is reported', 'is passed'",
    r"\banew\b": "again",
    r"\bwhere there (are|is)\b": "if ... exists",
    r"\bthat of\b": "repeat the noun",
    r"\bof which\b": "start a new sentence",
    r"\bbe it\b": "even if",
    r"\bas it is\b": "unchanged",
    r"\bwholly\b": "completely",
    r"\bwhoever\b": "name the person or the process",
}
PROMPTS = ("INSTRUCTIONS",)
"""Constants that a model reads, not a person: other words are another reward."""
VERBS = frozenset(
    """
    accept add all-reduce allocate allow answer append apply approximate ask assert assign attach attribute average
    backpropagate begin bind blend bound branch bring broadcast build calculate call cast center change check choose
    clamp clear clip close collect color combine compare compute concatenate connect convert copy correct count create
    crop cut deal decide decode delete describe deserialize detect determine disable discard display divide do
    download draw drop embed enable encode end ensure enter estimate evaluate exchange exit expand explain export
    extract fail fetch fill filter find finish fit flatten flush follow forget format forward free freeze gather
    generate get give go group guard hand handle hash hear hide hold identify ignore import improve initialize insert
    inspect interpolate interrupt join judge keep label launch lay leave let like limit link list listen load locate
    lock log look make map mark mask match measure merge mix monitor move multiply name narrow noise normalize note
    number offer open order outline pack pad pair parse pass patch perform pick pin place plan plot poll precompute
    predict prepare print process produce project propagate prune put quantize query quote raise rank read rebuild
    receive recognize record redact reduce refuse register reject release remember remove rename render repeat replace
    report request require reserve resize resolve restore resume retry return reverse round run sample save say scale
    scan score see seed segment select send separate serialize serve set shape shard share shift show shuffle signal
    silence simulate skip smooth sort spell split spread stack start state step stop store stream strip subtract sum
    summarize switch synchronize take tell test tie tile tokenize trace track train transform translate truncate try
    tune turn unpack update upload use validate verify view wait walk warn weight widen wrap write yield
    """.split()
)
"""Verbs with which a docstring may begin; add the one that is missing."""


def sources(paths: list[str]) -> Iterator[Path]:
    """Yield the Python files and documents to check."""
    for root in [Path(path) for path in paths] or [ROOT / "src", ROOT / "docs", ROOT / "README.md"]:
        found = [root] if root.is_file() else sorted(root.rglob("*"))
        yield from (path for path in found if path.suffix in (".py", ".md", ".yaml", ".j2"))


def in_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of each docstring and string in Python code that breaks a rule."""
    tree = ast.parse(text)
    prompts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign) and is_prompt(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not is_property(node):
            docstring = ast.get_docstring(node)
            yield from ((node.body[0].lineno, fault) for fault in in_first_sentence(docstring or "Return"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prompts:
            yield from ((node.lineno + line - 1, fault) for line, fault in in_prose(node.value))


def is_prompt(assignment: ast.Assign) -> bool:
    """Return whether a constant is one of PROMPTS."""
    return any(isinstance(target, ast.Name) and target.id in PROMPTS for target in assignment.targets)


def is_property(function: ast.FunctionDef) -> bool:
    """Return whether a function is a property, whose docstring names a thing."""
    return any(isinstance(each, ast.Name) and each.id == "property" for each in function.decorator_list)


def in_first_sentence(docstring: str) -> Iterator[str]:
    """Yield what is wrong with the first sentence of a function's docstring."""
    sentence = re.split(r"(?<=[.:])\s|\n\n", docstring, maxsplit=1)[0]
    words = sentence.split()
    first = re.sub(r"[^a-z-]", "", words[0].lower()) if words else ""
    if first not in VERBS:
        yield f"a docstring begins with '{words[0] if words else ''}', expected a verb: 'Return ...', 'Raise ...'"
    if len(words) > LONGEST:
        yield f"a first sentence has {len(words)} words, expected at most {LONGEST}"


def in_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of each phrase in `text` that has a plainer word."""
    for number, line in enumerate(text.splitlines(), 1):
        for phrase, plainer in PHRASES.items():
            for match in re.finditer(phrase, line, re.IGNORECASE):
                yield number, f"'{match.group()}', expected plainer words ({plainer})"


def main() -> None:
    """Print each fault with its file and line, and exit with status 1 if there is one."""
    faults = 0
    for path in sources(sys.argv[1:]):
        text = path.read_text(encoding="utf-8")
        for line, fault in in_code(text) if path.suffix == ".py" else in_prose(text):
            print(f"{path.resolve().relative_to(ROOT)}:{line}: {fault}")
            faults += 1
    print(f"{faults} faults")
    sys.exit(min(faults, 1))


if __name__ == "__main__":
    main()
