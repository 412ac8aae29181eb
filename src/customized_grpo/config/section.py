"""What every part of the configuration is."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Weight = Annotated[float, Field(ge=0)]
Pair = tuple[float, float]

Share = Annotated[float, Field(ge=0, le=1)]
Switches = Mapping[str, tuple[str, ...]]


class Section(BaseModel):
    """A part of the configuration: immutable, strict about its fields, and with no setting that nothing reads.

    In a section with switches, a field that is named as a value of a switch is read with that value only, as `window`
    is with `trained_steps: window`. With other values it must have its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    SWITCHES: ClassVar[Switches] = {}
    """Fields that choose a kind, as `kind`, and their values."""
    SHARED: ClassVar[Switches] = {}
    """Fields that several values of a switch read, and those values."""

    def differs_from_default(self, name: str) -> bool:
        """Return whether a field differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def is_read(self, name: str) -> bool:
        """Return whether the field `name` is read with the values that the switches have."""
        return name not in self.unread(dict(self))

    @classmethod
    def unread(cls, values: Mapping[str, Any]) -> list[str]:
        """Return the fields that nothing reads if the fields of this section have these `values`."""
        chosen: set[str] = set()
        for switch in cls.SWITCHES:
            chosen |= {values[switch]} if isinstance(values[switch], str) else set(values[switch])
        return [name for name in cls.model_fields if (readers := cls.readers(name)) and not chosen & set(readers)]

    @classmethod
    def readers(cls, name: str) -> tuple[str, ...]:
        """Return the values of switches that read the field `name`; none if it is read with all of them."""
        own = (name,) if any(name in values for values in cls.SWITCHES.values()) else ()
        return cls.SHARED.get(name, own)

    @field_validator("*", mode="after")
    @classmethod
    def _expand_user(cls, value: Any) -> Any:
        """Replace a leading ~ by the home folder of the user."""
        if isinstance(value, Path):
            return value.expanduser()
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value

    @model_validator(mode="after")
    def _check_unread(self) -> "Section":
        """Raise ValueError for a field that is set and not read."""
        for name in self.unread(dict(self)):
            if self.differs_from_default(name):
                readers = self.readers(name)
                switches = [switch for switch, values in self.SWITCHES.items() if set(values) & set(readers)]
                found = ", ".join(f"{switch}={_shown(getattr(self, switch))}" for switch in switches)
                values = (", " if len(readers) > 2 else " or ").join(readers)
                remedy = f", or set {switches[0]}={values}" if len(readers) == len(switches) == 1 else ""
                raise ValueError(
                    f"{_changed(self, name)}: only for {' or '.join(switches)}={values} (found {found}); "
                    f"leave it out{remedy}"
                )
        return self


def _changed(section: Section, name: str) -> str:
    """Return the dotted names of all fields at `name` that differ from their defaults."""
    value = getattr(section, name)
    if not isinstance(value, Section):
        return name
    return ", ".join(f"{name}.{_changed(value, field)}" for field in _differing(value))


def _differing(section: Section) -> Iterator[str]:
    return (name for name in type(section).model_fields if section.differs_from_default(name))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "/".join(value)
