"""How long a run will still take, from how long its parts took."""

from collections import deque
from collections.abc import Mapping
from statistics import median

RECENT = 8
"""Measurements of a part that count: a machine that others use, or longer prompts, change what a part takes."""


class TimeLeft:
    """Remembers what each part of a run took, and adds up what is left."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = {}

    def took(self, part: str, seconds: float) -> None:
        """Remember that one `part`, such as an iteration or a validation, took so long."""
        self._seconds.setdefault(part, deque(maxlen=RECENT)).append(seconds)

    def left(self, parts: Mapping[str, float]) -> float | None:
        """Return the seconds that so many of each of the `parts` take; None where one of them was never measured."""
        wanted = {part: number for part, number in parts.items() if number > 0}
        if not wanted.keys() <= self._seconds.keys():
            return None
        # The first of a kind compiles, or fills caches: the median leaves it out soon.
        return sum(number * median(self._seconds[part]) for part, number in wanted.items())


def duration(seconds: float) -> str:
    """Return seconds as text, in two units: 8 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    whole = round(seconds)
    for unit, size, smaller, step in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // step} {smaller}"
    return f"{whole} s"
