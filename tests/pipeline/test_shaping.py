"""A setting that shapes a step's outputs makes them stale: for every step and every setting of the schema."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import schema
from pipeline.files import write_json
from pipeline.schema import Settings
from pipeline.settings import choices, fields, flatten, names_shaping, plain_type, replaced, select
from pipeline.steps import STEPS, Step, _named, input_fingerprints, stamp_path, what_changed

SHAPES_NOTHING = {
    # where files are
    "work",
    "features",
    # how fast it goes, how often it reports
    "training.compile",
    "training.device",
    "training.workers",
    "training.pixel_cache_gb",
    "training.log_every",
    "training.show_results_every",
    "training.checkpoint_minutes",
    "evaluation.batch_size",
    # when it stops with an error
    "training.max_unreadable_share",
    # how many trials are added to those that there are
    "tuning.trials",
}


def another(name: str) -> Any:
    """A valid value of a setting that is not its default."""
    field = next(field for known, field, _ in fields() if known == name)
    value, kind = flatten(Settings())[name], plain_type(field)
    if names := choices(field):
        return next(other for other in names if other != value)
    if kind is bool:
        return not value
    if kind is int:
        return 2 if value is None else value + 1
    if kind is float:
        return 0.5 if value is None else value / 2 or 0.5
    return [7, 9] if isinstance(value, list) else "other"


def stamped(step: Step, settings: Settings) -> None:
    """Leave a step's inputs and the stamp of its outputs as if it had just run."""
    for name in _named(step.inputs, settings):
        path = settings.work_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    write_json(
        stamp_path(step, settings),
        {
            "outputs": {},
            "settings": select(settings, step.settings),
            "inputs": input_fingerprints(step, settings),
            "published": {},
            "figures": {},
        },
    )


@pytest.mark.parametrize(("step", "name"), [(step, name) for step in STEPS for name in step.settings])
def test_a_setting_that_shapes_a_step_makes_it_stale(tmp_path: Path, step: Step, name: str) -> None:
    before = Settings(work=str(tmp_path))
    after = replaced(before, {name: another(name)})
    for settings in (before, after):  # another space has another folder, and its own stamp
        stamped(step, settings)
        assert what_changed(step, settings) is None
    write_json(stamp_path(step, after), {**_stamp(step, before), "inputs": input_fingerprints(step, after)})
    assert f"was made with {name} " in str(what_changed(step, after))


def _stamp(step: Step, settings: Settings) -> dict[str, Any]:
    return {"outputs": {}, "settings": select(settings, step.settings), "published": {}, "figures": {}}


def test_every_setting_shapes_a_step_or_is_known_to_shape_none() -> None:
    steps = (*(step.settings for step in STEPS), names_shaping(schema.RUN, schema.EVALUATION))
    shaping = {name for names in steps for name in names}
    assert {name for name, _, _ in fields()} - shaping == SHAPES_NOTHING
