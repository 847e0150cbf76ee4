"""What a field of the schema of settings is annotated with: ranges, the steps that it shapes, when it is read."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipeline.home import expanded

LARGEST = 2**31 - 1
"""The C code of gensim, Faiss and Pillow takes no larger whole number."""


class Shapes:
    """The steps whose outputs a section's settings shape, or those of one setting where they are others."""

    def __init__(self, *steps: str) -> None:
        self.steps = steps


class ReadWhen:
    """Values of another setting under which a setting is read, or `unless` which it is not; joined by `|`."""

    def __init__(self, name: str, *values: Any, unless: tuple[Any, ...] = ()) -> None:
        self.alternatives = [(name, values, unless)]

    def __or__(self, other: "ReadWhen") -> "ReadWhen":
        either = ReadWhen("")
        either.alternatives = self.alternatives + other.alternatives
        return either


Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
FromTwo = Annotated[int, Field(ge=2, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]*$")]
PathText = Annotated[str, Field(pattern=r"^[^\x00]*$"), AfterValidator(expanded)]
Backbone = Annotated[str, Field(pattern=r"^([^./\x00][^/\x00]*|(timm|open_clip|features):[^\x00]+)$")]
