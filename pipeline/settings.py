"""Settings read from files, compared and checked. The schema itself is in schema.py."""

import difflib
import re
import typing
from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.errors import UserError, reason
from pipeline.fields import ReadWhen, Shapes
from pipeline.registry import FILES_IN_ROOT, Registry, is_kind
from pipeline.schema import Loss, Section, Settings

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "openclipart.yaml"

RETIRED = frozenset({"evaluation.sampled_repeats", "dataset.new_splits"})
"""Settings that runs of earlier versions name in their config.yaml and that nothing reads any more."""


# What the schema says


def fields(
    section: type[Section] = Settings, prefix: str = "", above: tuple[Any, ...] = ()
) -> Iterator[tuple[str, FieldInfo, tuple[Any, ...]]]:
    """Every setting in the order of the schema: dotted name, field, and its metadata before its sections'."""
    for name, field in section.model_fields.items():
        metadata = (*field.metadata, *above)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.", metadata)
        else:
            yield prefix + name, field, metadata


def _first(metadata: Iterable[Any], kind: type) -> Any:
    return next((item for item in metadata if isinstance(item, kind)), None)


def names_shaping(*steps: str) -> tuple[str, ...]:
    """Dotted names of the settings that shape the outputs of any of these steps."""
    shapes = {name: _first(metadata, Shapes) for name, _, metadata in fields()}
    return tuple(name for name, of_name in shapes.items() if of_name and {*steps} & {*of_name.steps})


def plain_type(field: FieldInfo) -> Any:
    """A field's type without null and without ranges."""
    kind: Any = field.annotation
    if NoneType in typing.get_args(kind):
        kind = next(one for one in typing.get_args(kind) if one is not NoneType)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The texts that a setting takes; none where it takes any."""
    kind = plain_type(field)
    named: tuple[str, ...] = tuple(_first(field.metadata, Registry) or ())
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else named


def get(settings: Section, name: str) -> Any:
    """The setting of a dotted name, such as `training.batch_size`."""
    return attrgetter(name)(settings)


def select(settings: Section, names: Collection[str]) -> dict[str, Any]:
    """Some settings by dotted name."""
    return {name: get(settings, name) for name in names}


def flatten(settings: Settings) -> dict[str, Any]:
    """All settings by dotted name, in the order of the schema."""
    return {name: get(settings, name) for name, _, _ in fields()}


# Mistakes

GOES_WITH: tuple[tuple[str, Any, str, tuple[Any, ...]], ...] = (
    ("loss.tile_negatives", True, "loss.base", ("angular",)),
    ("loss.tile_negatives", True, "loss.form", ("logsumexp",)),
    ("loss.structure", "ground_truth", "loss.base", ("struc",)),
    ("loss.form", "hinge", "loss.soft_targets", (0.0,)),
    ("training.batches", "neighborhoods", "loss.base", ("angular", "triplet")),
    ("training.batches", "neighborhoods", "neighbors.draw", ("neighbors",)),
    ("training.compile", True, "model.pvse.embeddings", (0,)),
    ("model.text.encoder", "graph", "model.text.word_vectors", ("doc2vec",)),
    ("model.text.encoder", "graph", "model.pvse.embeddings", (0,)),
    ("model.text.encoder", "sentence_transformers:NAME_OR_FOLDER", "model.pvse.embeddings", (0,)),
    ("model.text.encoder", "features:FILE.npy", "model.pvse.embeddings", (0,)),
    ("model.image.backbone", "features:FILE.npy", "model.image.trainable", (False,)),
    ("model.image.backbone", "features:FILE.npy", "model.image.cache_features", (True,)),
    ("model.image.backbone", "features:FILE.npy", "model.pvse.embeddings", (0,)),
    ("neighbors.space", "sentences", "model.text.encoder", ("sentence_transformers:NAME_OR_FOLDER",)),
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
        if is_kind(get(settings, name), value) and not _is_one_of(get(settings, other), values)
    ]
    dataset, neighbors, training = settings.dataset, settings.neighbors, settings.training
    if dataset.source in FILES_IN_ROOT and not dataset.root:
        needed = FILES_IN_ROOT[dataset.source]
        found.append(f"dataset.source {dataset.source} needs dataset.root, the folder with {needed}")
    if dataset.source == "manifest" and not dataset.manifest:
        found.append("dataset.source manifest needs dataset.manifest, the file with the pairs")
    if dataset.test_share + (dataset.test_share if dataset.val_share is None else dataset.val_share) >= 1:
        found.append("dataset.val_share and dataset.test_share leave nothing to train on")
    if dataset.synthetic.motifs_per_topic > dataset.synthetic.motifs:
        found.append("dataset.synthetic.motifs_per_topic is larger than dataset.synthetic.motifs")
    if not settings.doc2vec.hierarchical_softmax and settings.doc2vec.negative == 0:
        found.append("doc2vec needs hierarchical_softmax: true or negative above 0")
    if (neighbors.draw_from or 0) > neighbors.k:
        found.append(f"neighbors.draw_from is {neighbors.draw_from}, more than neighbors.k")
    if ":" in settings.siamese.encoder:
        found.append("siamese.encoder must read words: it takes gru, bag_of_words or graph")
    if settings.evaluation.expand and settings.model.pvse.embeddings:
        found.append("evaluation.expand must be 0 with model.pvse.embeddings: it moves one embedding an item")
    if training.batches == "neighborhoods" and training.batch_size < 4:
        found.append("training.batches neighborhoods needs a training.batch_size of 4 or more, for two couples")
    return found


def mistakes_of_weights(loss: Loss, sym: float, img: float) -> list[str]:
    """Which weights of Eq. 8 the loss does not take, a sentence each. For training and searches."""
    found = []
    if loss.base == "fine_grained" and sym:
        found.append("loss.base fine_grained takes both ways at once and has no symmetric term; let SYM be 0")
    if loss.structure == "ground_truth" and img:
        found.append("loss.structure ground_truth needs the weight IMG 0: an image's only true neighbor is itself")
    return found


def not_read(settings: Settings, names: Collection[str]) -> list[str]:
    """Those of the settings `names` that differ from their default and that nothing reads, a sentence each."""
    conditions = {name: _first(metadata, ReadWhen) for name, _, metadata in fields()}
    default = Settings()

    def unmet(name: str) -> str:
        """What would have to be set for this setting to be read; empty where it is read."""
        wanted = []
        for other, values, unless in conditions[name].alternatives if conditions[name] else ():
            further, value = unmet(other), get(settings, other)
            if not further and (not _is_one_of(value, unless) if unless else _is_one_of(value, values)):
                return ""
            words = f"{other} other than {_listed(unless)}" if unless else f"{other} {_listed(values)}"
            wanted.append(f"{further} and {words}" if further else words)
        return " or ".join(wanted)

    return [
        f"{name} is {shown(value)}, which nothing reads: it goes with {wanted}"
        for name, value in select(settings, names).items()
        if value != get(default, name) and (wanted := unmet(name))
    ]


def _is_one_of(value: Any, values: Collection[Any]) -> bool:
    return any(is_kind(value, one) for one in values)


def _listed(values: Collection[Any]) -> str:
    return " or ".join(map(shown, values))


def shown(value: Any) -> str:
    """A value as a YAML file has it, not longer than a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value.isidentifier() else f"{value!r:.60}"


def unknown(name: str) -> str:
    """That a name is no setting's, with a hint at the setting whose name is most like it."""
    close = difflib.get_close_matches(name, [known for known, _, _ in fields()], n=1)
    return f"no setting is called {name}; {f'did you mean {close[0]}?' if close else '--help-all lists all settings'}"


# Reading


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and a key that stands twice in a mapping is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"{key.value} stands twice (again in line {key.start_mark.line + 1}); keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where a number with an exponent needs a point and a sign.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises PyYAML's errors, and ValueError for a key that stands twice."""
    return _Loader(text).get_single_data()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file by dotted name. Raises UserError that names the file and what is wrong in it."""
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        why = f"{error.strerror}; name a file such as configs/openclipart.yaml"
        raise UserError(f"cannot read the config {path}: {why}") from None
    except Exception as error:  # YAML's constructors raise anything: a date of the 99th month, a thousand brackets
        raise UserError(f"the config {path} is no valid YAML: {reason(error, 300)}") from None
    return checked_tree(tree, str(path))


SCALARS = (str, int, float, NoneType)


def checked_tree(tree: Any, path: str, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The values of a settings tree by dotted name. Raises UserError for names that do not exist; it names `path`."""
    if not isinstance(tree, dict):
        raise UserError(f"the config {path} must hold settings by name, such as `seed: 0`")
    known = [name for name, _, _ in fields()]

    sections = {name[: dot.start()] for name in known for dot in re.finditer(r"\.", name)}

    def leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict) and f"{prefix}{key}" in sections:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    found = {name: value for name, value in leaves(tree) if name not in ignored}
    wrong = []
    for name, value in found.items():
        if name in sections:
            wrong.append(f"{name} is a section and needs settings below it")
        elif name not in known:
            wrong.append(unknown(name))
        # An alias in YAML may stand for a list of lists of lists, which would fill the memory where it is shown.
        elif not all(isinstance(item, SCALARS) for item in (value if isinstance(value, list) else [value])):
            wrong.append(f"{name} must be a single value or a list of such")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    return found


WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list of whole numbers",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:.0f}",
    "less_than_equal": "at most {le:.0f}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} at most",
    "literal_error": "{expected}",
    "value_error": "{error}",
}
"""What a value must be, by pydantic's type of error. All other types are those of texts."""


def validated(leaves: dict[str, Any]) -> tuple[Settings, list[str]]:
    """Settings of values by dotted name, and what is wrong with some, which then have their default."""
    settings, wrong = Settings(), []
    for name, value in leaves.items():
        section, _, last = name.rpartition(".")
        try:
            setattr(get(settings, section) if section else settings, last, value)
        except ValidationError as error:
            first = error.errors()[0]
            wanted = WANTED.get(first["type"], "text that can name a file").format(**first.get("ctx", {}))
            wrong.append(f"{name} is {shown(first['input'])} and must be {wanted}")
    return settings, wrong


def load_settings(*sources: str | Path | dict[str, Any]) -> Settings:
    """Settings of YAML files, or of trees, over the defaults; later ones win.

    Raises UserError for what is no settings file, and for values of the wrong kind. `mistakes` finds contradictions.
    """
    leaves: dict[str, Any] = {}
    for source in sources:
        leaves |= checked_tree(source, "the settings") if isinstance(source, dict) else read_yaml(source)
    settings, wrong = validated(leaves)
    if wrong:
        raise UserError("; ".join(wrong))
    return settings


def replaced(settings: Settings, values: dict[str, Any]) -> Settings:
    """A copy of the settings with other values, by dotted name. Raises UserError for values of the wrong kind."""
    return load_settings({**flatten(settings), **values})
