"""What a field of the settings is made of: types with ranges, the steps it shapes, the settings it is read under."""

import os
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, field_validator
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from pipeline.registry import Registry

LARGEST = 2**31 - 1
"""The C code of gensim, Faiss and Pillow takes no larger whole number."""


class Shapes:
    """The steps whose outputs a setting shapes, where they are not those of its section."""

    def __init__(self, *steps: str) -> None:
        self.steps = steps


class ReadWhen:
    """Values of another setting under which a setting is read, or `unless` which it is not; joined by `|`."""

    def __init__(self, name: str, *values: Any, unless: tuple[Any, ...] = ()) -> None:
        self.alternatives = [(name, values, unless)]

    def __or__(self, other: "ReadWhen") -> "ReadWhen":
        either = ReadWhen("")
        either.alternatives = [*self.alternatives, *other.alternatives]
        return either


class OneOf:
    """A text that is a name of a registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of a text, and the check of the name after it."""
        return no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: str) -> str:
        if value not in self.registry:
            raise ValueError(f"one of {', '.join(self.registry)}")
        return value


def _expanded(path: str) -> str:
    """A path with `~` and `$VARIABLES` in it expanded."""
    return os.path.expanduser(os.path.expandvars(path))


def _folder_name(name: str) -> str:
    if not name or "/" in name or name[0] == ".":
        raise ValueError("a folder's name, without / in it")
    return name


def _language_code(code: str) -> str:
    if not code[:2].isalpha():
        raise ValueError("a language's code, such as en")
    return code


Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
FromTwo = Annotated[int, Field(ge=2, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, AfterValidator(_expanded)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
LanguageCode = Annotated[str, AfterValidator(_language_code)]


class Section(BaseModel):
    """A section of the settings."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    SHAPES: ClassVar[tuple[str, ...]] = ()
    """The steps that the section's settings shape."""
    READ_WHEN: ClassVar[ReadWhen | None] = None
    """When the section is read; None for always."""

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        if isinstance(value, str) and ("\0" in value or not is_unicode(value)):
            raise ValueError("text that a file can hold")
        return value


def is_unicode(text: str) -> bool:
    """Whether a text can be written. A lone surrogate, which stands for bytes that are not UTF-8, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
