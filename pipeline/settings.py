"""Settings read from files, compared and checked. The schema itself is in schema.py."""

import difflib
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.errors import UserError
from pipeline.registry import FILES_IN_ROOT
from pipeline.schema import (
    PVSE,
    Dataset,
    Doc2Vec,
    Evaluation,
    ImageEncoder,
    Loss,
    Model,
    Neighbors,
    Settings,
    Siamese,
    Synthetic,
    Text,
    TextEncoder,
    Training,
    Tuning,
)
from pipeline.setting_types import OneOf, ReadWhen, Section, Shapes, is_unicode
from pipeline.yaml_files import read_yaml_file

__all__ = [
    "PVSE",
    "Dataset",
    "Doc2Vec",
    "Evaluation",
    "ImageEncoder",
    "Loss",
    "Model",
    "Neighbors",
    "Settings",
    "Siamese",
    "Synthetic",
    "Text",
    "TextEncoder",
    "Training",
    "Tuning",
    "is_unicode",
]

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "openclipart.yaml"

RETIRED = frozenset({"evaluation.sampled_repeats", "dataset.new_splits"})
"""Settings that runs of earlier versions name in their config.yaml and that nothing reads any more."""


# What the schema says


def fields(kind: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[Section]]]:
    """Every setting in the order of the schema: dotted name, field and section."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field, kind


def _metadata(field: FieldInfo, kind: type) -> list[Any]:
    return [item for item in field.metadata if isinstance(item, kind)]


def names_shaping(*steps: str, schema: type[Section] = Settings) -> tuple[str, ...]:
    """Dotted names of the settings that shape the outputs of any of these steps."""
    return tuple(
        name
        for name, field, section in fields(schema)
        if {*steps} & {*(own[0].steps if (own := _metadata(field, Shapes)) else section.SHAPES)}
    )


def get(settings: Section, name: str) -> Any:
    """The setting of a dotted name, such as `training.batch_size`."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def flatten(settings: Section) -> dict[str, Any]:
    """All settings by dotted name, in the order of the schema."""
    return {name: get(settings, name) for name, _, _ in fields(type(settings))}


def select(settings: Section, names: Collection[str]) -> dict[str, Any]:
    """Some settings by dotted name."""
    return {name: get(settings, name) for name in names}


def replaced(settings: Settings, values: dict[str, Any]) -> Settings:
    """A copy of the settings with other values, by dotted name. Raises UserError for values of the wrong kind."""
    return _built({**flatten(settings), **values}, type(settings))


# Mistakes

GOES_WITH: tuple[tuple[str, Any, str, tuple[Any, ...]], ...] = (
    ("loss.tile_negatives", True, "loss.base", ("angular",)),
    ("loss.tile_negatives", True, "loss.form", ("logsumexp",)),
    ("loss.structure", "ground_truth", "loss.base", ("struc",)),
    ("training.batches", "neighborhoods", "loss.base", ("angular", "triplet")),
    ("training.batches", "neighborhoods", "neighbors.draw", ("neighbors",)),
    ("training.compile", True, "model.pvse.embeddings", (0,)),
    ("model.text.encoder", "graph", "model.text.word_vectors", ("doc2vec",)),
    ("model.text.encoder", "graph", "model.pvse.embeddings", (0,)),
    ("doc2vec.train_on", "articles", "dataset.source", ("goodnews",)),
    ("dataset.karpathy_split", True, "dataset.source", ("coco", "flickr30k")),
    ("dataset.karpathy_split", True, "dataset.published_splits", (True,)),
    ("dataset.karpathy_split", False, "dataset.source", ("coco", "flickr30k")),
)
"""A setting, a value of it, and the values that another setting must then have."""


def mistakes(settings: Settings) -> list[str]:
    """Which settings contradict each other, a sentence each; empty where none do."""
    found = [
        f"{name} {shown(value)} goes with {other} {_listed(values)}, and that is {shown(get(settings, other))}"
        for name, value, other, values in GOES_WITH
        if get(settings, name) == value and get(settings, other) not in values
    ]
    dataset, synthetic = settings.dataset, settings.dataset.synthetic
    if dataset.source in FILES_IN_ROOT and not dataset.root:
        found.append(
            f"dataset.source {dataset.source} needs dataset.root, the folder with {FILES_IN_ROOT[dataset.source]}"
        )
    if dataset.source == "manifest" and not dataset.manifest:
        found.append("dataset.source manifest needs dataset.manifest, the file with the pairs")
    val_share = dataset.test_share if dataset.val_share is None else dataset.val_share
    if val_share + dataset.test_share >= 1:
        found.append("dataset.val_share and dataset.test_share leave nothing to train on")
    if synthetic.motifs_per_topic > synthetic.motifs:
        found.append("dataset.synthetic.motifs_per_topic is larger than dataset.synthetic.motifs")
    if not settings.doc2vec.hierarchical_softmax and settings.doc2vec.negative == 0:
        found.append("doc2vec needs hierarchical_softmax: true or negative above 0")
    if (settings.neighbors.draw_from or 0) > settings.neighbors.k:
        found.append(f"neighbors.draw_from is {settings.neighbors.draw_from}, more than neighbors.k")
    if settings.training.batches == "neighborhoods" and settings.training.batch_size < 4:
        found.append("training.batches neighborhoods needs a training.batch_size of 4 or more, for two couples")
    return found


def mistakes_of_weights(settings: Settings, sym: float, img: float) -> list[str]:
    """Which weights of Eq. 8 the loss of the settings does not take, a sentence each. Training and searches ask."""
    found = []
    if settings.loss.base == "fine_grained" and sym:
        found.append("loss.base fine_grained takes both ways at once and has no symmetric term; let SYM be 0")
    if settings.loss.structure == "ground_truth" and img:
        found.append("loss.structure ground_truth needs the weight IMG 0: an image's only true neighbor is itself")
    return found


def not_read(settings: Settings, names: Collection[str]) -> list[str]:
    """Those of the settings `names` that differ from their default and that nothing reads, a sentence each."""
    conditions = {name: _condition(field, section) for name, field, section in fields(type(settings))}

    def unmet(name: str) -> str | None:
        """What would have to be set for this setting to be read; None where it is read."""
        condition = conditions[name]
        if condition is None:
            return None
        wanted = []
        for other, values, unless in condition.alternatives:
            further = unmet(other)
            value = get(settings, other)
            if further is None and (value not in unless if unless else value in values):
                return None
            words = f"{other} other than {_listed(unless)}" if unless else f"{other} {_listed(values)}"
            wanted.append(f"{further} and {words}" if further else words)
        return " or ".join(wanted)

    found = []
    for name, field, _ in fields(type(settings)):
        value = get(settings, name)
        is_default = value == field.get_default(call_default_factory=True)
        if name in names and not is_default and (wanted := unmet(name)):
            found.append(f"{name} is {shown(value)}, which nothing reads: it goes with {wanted}")
    return found


def _condition(field: FieldInfo, section: type[Section]) -> ReadWhen | None:
    return next(iter(_metadata(field, ReadWhen)), section.READ_WHEN)


def _listed(values: Collection[Any]) -> str:
    return " or ".join(map(shown, values))


WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text that a file can hold",
    "list_type": "a list of whole numbers",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:.0f}",
    "less_than_equal": "at most {le:.0f}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} at most",
}
"""What a value must be, by pydantic's type of error."""


def shown(value: Any) -> str:
    """A value as a YAML file has it, not longer than a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value.isidentifier() else f"{value!r:.60}"


def _wrong_values(error: ValidationError, kinds: dict[str, FieldInfo]) -> dict[str, str]:
    """By dotted name, what is wrong with each value that is of the wrong kind or out of its range."""
    found: dict[str, str] = {}
    for wrong in error.errors():
        name = ".".join(str(part) for part in wrong["loc"] if not isinstance(part, int))
        name = next((known for known in kinds if name == known or name.startswith(f"{known}.")), name)
        context = wrong.get("ctx", {})
        if wrong["type"] == "literal_error":
            wanted = f"one of {', '.join(choices(kinds[name]))}"
        elif wrong["type"] == "value_error":
            wanted = str(context["error"])
        else:
            wanted = WANTED[wrong["type"]].format(**context)
        null = (
            " or null"
            if wrong["type"].endswith("_type") and NoneType in typing.get_args(kinds[name].annotation)
            else ""
        )
        found.setdefault(name, f"{name} is {shown(wrong['input'])} and must be {wanted}{null}")
    return found


def plain_type(field: FieldInfo) -> Any:
    """A field's type without null and without ranges."""
    kind: Any = field.annotation
    if NoneType in typing.get_args(kind):
        kind = next(one for one in typing.get_args(kind) if one is not NoneType)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The texts that a setting takes; none where it takes any."""
    names = next(iter(_metadata(field, OneOf)), None)
    kind = plain_type(field)
    return tuple(names.registry) if names else typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


# Reading


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file by dotted name. Raises UserError that names the file and what is wrong in it."""
    return checked_tree(read_yaml_file(path), str(path))


def checked_tree(tree: Any, path: str, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The values of a settings tree by dotted name. Raises UserError for names that do not exist; it names `path`."""
    if not isinstance(tree, dict):
        raise UserError(f"the config {path} must hold settings by name, such as `seed: 0`")
    known = [name for name, _, _ in fields()]
    leaves = {name: value for name, value in _leaves(tree).items() if name not in ignored}
    sections = [name for name in leaves if _is_section(name)]
    if wrong := [f"{name}{nearest(name)}" for name in leaves if name not in known and name not in sections]:
        raise UserError(f"{path} names no setting with {' and '.join(wrong)}")
    if sections:
        raise UserError(f"{path}: {' and '.join(sections)} is a section and needs settings below it")
    # An alias in YAML may stand for a list of lists of lists, which would fill the memory where it is shown.
    if wrong := [name for name, value in leaves.items() if not _is_plain(value)]:
        raise UserError(f"{path}: {' and '.join(wrong)} must be a single value or a list of such")
    return leaves


def _is_plain(value: Any) -> bool:
    """Whether a value is a scalar or a list of scalars."""
    scalars = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in scalars)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted name; a section that is no mapping is among them."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, name + ".") if isinstance(value, dict) and _is_section(name) else {name: value}
    return found


def _is_section(name: str) -> bool:
    return any(setting.startswith(name + ".") for setting, _, _ in fields())


def nearest(name: str) -> str:
    """A hint at the setting whose name is most like `name`: in its own section first, then by its last part."""
    section, _, last = name.rpartition(".")
    known = [known for known, _, _ in fields()]
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    by_last = {other.rpartition(".")[2]: other for other in reversed(known)}
    for candidates in (siblings, by_last):
        if close := difflib.get_close_matches(last, candidates, n=1, cutoff=0.6):
            return f"; did you mean {candidates[close[0]]}?"
    return "; --help-all lists all settings"


def _built(leaves: dict[str, Any], schema: type[Settings] = Settings) -> Settings:
    """Settings of values by dotted name. Raises UserError with every value that is of the wrong kind."""
    settings, wrong = validated(leaves, schema)
    if wrong:
        raise UserError("; ".join(wrong))
    return settings


def validated(leaves: dict[str, Any], schema: type[Settings] = Settings) -> tuple[Settings, list[str]]:
    """Settings of values by dotted name, and what is wrong with some, which then have their default."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        section, *rest = name.split(".")
        below = tree
        for part in rest:
            below, section = below.setdefault(section, {}), part
        below[section] = value
    try:
        return schema.model_validate(tree), []
    except ValidationError as error:
        wrong = _wrong_values(error, {name: field for name, field, _ in fields(schema)})
        rest_of_it, more = validated({name: value for name, value in leaves.items() if name not in wrong}, schema)
        return rest_of_it, [*wrong.values(), *more]


def load_settings(*sources: str | Path | dict[str, Any]) -> Settings:
    """Settings of YAML files, or of trees, over the defaults; later ones win.

    Raises UserError for what is no settings file, and for values of the wrong kind. `mistakes` finds contradictions.
    """
    leaves: dict[str, Any] = {}
    for source in sources:
        leaves |= checked_tree(source, "the settings") if isinstance(source, dict) else read_yaml(source)
    return _built(leaves)
