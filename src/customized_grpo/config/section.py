"""What every part of the configuration is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Weight = Annotated[float, Field(ge=0)]
Pair = tuple[float, float]

Share = Annotated[float, Field(ge=0, le=1)]
ReadWith = Mapping[str, tuple[str, Sequence[Any]]]
"""Fields that count for some values of another one alone: {name: (other, its values)}."""


class Section(BaseModel):
    """A part of the configuration: fixed once made, and strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    READ_WITH: ClassVar[ReadWith] = {}

    def differs_from_default(self, name: str) -> bool:
        """Whether a field is not as it is when it is left out."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @classmethod
    def unread(cls, values: Mapping[str, Any]) -> list[str]:
        """Fields that do not count where the fields have these `values`."""
        return [name for name, (other, readers) in cls.READ_WITH.items() if values[other] not in readers]

    @field_validator("*", mode="after")
    @classmethod
    def _expand_user(cls, value: Any) -> Any:
        """~/models is the user's."""
        if isinstance(value, Path):
            return value.expanduser()
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value

    @model_validator(mode="after")
    def _all_is_read(self) -> "Section":
        for name in self.unread(dict(self)):
            if self.differs_from_default(name):
                other, values = self.READ_WITH[name]
                raise ValueError(
                    f"{name}: only for {other}={' or '.join(map(str, values))} (found {getattr(self, other)}); "
                    "leave it out"
                )
        return self
