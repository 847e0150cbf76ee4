"""A training run's folder: its name, its settings, and what it was trained on."""

import hashlib
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from models import TwoStream, build_model
from pipeline.errors import UserError
from pipeline.files import (
    LOCK,
    checksum,
    demand_undamaged,
    fingerprint,
    read_array,
    read_json,
    write_json,
    write_text,
)
from pipeline.pairs import load_images
from pipeline.registry import TEXT_ENCODERS
from pipeline.schema import RUN, Model, Settings
from pipeline.settings import RETIRED, checked_tree, flatten, load_settings, mistakes, names_shaping, not_read
from pipeline.steps import EXTRACT_DOC2VEC, FIND_NEIGHBORS, Step, output_paths
from pipeline.work import Work
from training.checkpoints import load_model_state
from training.fine_grained import by_neighbors, siamese_step
from training.image_sources import images_digest, weights_digest

OF_A_RUN = names_shaping(RUN)
"""Settings that shape a run. The others are left out of its name, and may change when it is resumed."""

NOT_READ_BY_A_MODEL = ("set of image files", "neighbors/", "siamese/")
"""Inputs of training, by the beginning of their names, that a trained model does not read."""

CHECKSUM = "# checksum of the lines above: "
"""Begins the last line of a config.yaml."""

LAST_SECTION, LAST_SETTING = "evaluation", "batch_size"
"""A config.yaml without this late setting was cut off."""


@dataclass
class Weights:
    """Weights of Eq. 8, as on the command line. Image to text has weight 1."""

    sym: float
    img: float
    text: float

    def of_terms(self) -> dict[str, float]:
        """The weights by the names of the loss terms."""
        return {"l_i2t": 1.0, "l_sym": self.sym, "l_img": self.img, "l_text": self.text}


def run_name(settings: Settings, config_file: Settings, weights: Weights) -> str:
    """Name of a run: the authors' name for the weights, settings that differ from the config file, the seed."""
    name = f"l_i2t_l_sym_{weights.sym:g}_l_img_{weights.img:g}_l_text_{weights.text:g}".replace(".", "_")
    of_file = flatten(config_file)
    for setting, value in flatten(settings).items():
        if setting != "seed" and setting in OF_A_RUN and value != of_file[setting]:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            name += f"-{setting}={shown.replace('.', '_').replace('/', '_')}"
    if len(name) > 150:  # file systems allow 255 bytes; config.yaml has all settings
        name = f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}-seed={settings.seed}"


def readable_name(run: Path) -> str:
    """A run's name for people: its weights, its other settings and its seed; one given by --name stays."""
    if not run.name.startswith("l_i2t_l_sym_"):
        return run.name
    _, weights = read_run(run)
    return ", ".join([f"SYM {weights.sym:g}", f"IMG {weights.img:g}", f"TEXT {weights.text:g}", *_named_settings(run)])


def _named_settings(run: Path) -> list[str]:
    """The settings in the name that `run_name` gave a run, the seed last; a value may hold a minus (1e-05)."""
    if not run.name.startswith("l_i2t_l_sym_"):
        return []
    return [setting.replace("=", " ") for setting in re.split(r"-(?=[\w.]+=)", run.name)[1:]]


LOSSES_IN_WORDS = {
    "angular": "angular N-pairs loss",
    "triplet": "triplet N-pairs loss",
    "infonce": "InfoNCE loss",
    "struc": "structure-preserving loss",
    "fine_grained": "pairwise loss",
}
"""`loss.base` for people. Another is named as it is registered."""


def describe_run(run: Path) -> dict[str, Any]:
    """What a run is, for people: dataset, method, weights in words, settings in its folder's name, seed, folder."""
    settings, weights = read_run(run)
    neighbors = "with neighbors" if reads_neighbors(settings, weights) else "without neighbors"
    return {
        "dataset": settings.dataset.name or settings.dataset.source,
        "method": f"{LOSSES_IN_WORDS.get(settings.loss.base, settings.loss.base)} {neighbors}",
        "weights": (
            f"text to image {weights.sym:g}, images of neighbors {weights.img:g}, neighboring texts {weights.text:g}"
        ),
        "others": _named_settings(run)[:-1],
        "seed": settings.seed,
        "folder": os.path.basename(os.path.abspath(run)),
    }


def soft_share(settings: Settings) -> float:
    """`loss.soft_targets`; 0 where the loss does not read it, as a config file may have it all the same."""
    return 0.0 if not_read(settings, ["loss.soft_targets"]) else settings.loss.soft_targets


def reads_neighbors(settings: Settings, weights: Weights) -> bool:
    """Whether a run reads the neighbor table. A baseline and ground-truth structure do not."""
    if soft_share(settings):
        return True
    relevance, space = settings.siamese.relevance, settings.neighbors.space
    if settings.loss.base == "fine_grained" and by_neighbors(settings.work_folder, relevance, space):
        return True
    return bool(weights.img or weights.text) and settings.loss.structure == "estimated"


def steps_of_loss(settings: Settings, weights: Weights) -> list[Step]:
    """The steps whose outputs this run's loss reads and others do not."""
    steps = [FIND_NEIGHBORS] if reads_neighbors(settings, weights) else []
    if settings.loss.base == "fine_grained" and settings.loss.labels == "siamese":
        steps.append(siamese_step(settings.work_folder, settings.siamese.relevance, settings.neighbors.space))
    return steps


def run_inputs(settings: Settings, weights: Weights) -> dict[str, str]:
    """Fingerprints of the files in WORK that a run is trained on, by name.

    Raises UserError where one is missing or damaged.
    """
    paths = [
        Work(settings.work_folder).pairs,
        Work(settings.work_folder).word_vectors,
        *output_paths(EXTRACT_DOC2VEC, settings),
        *(path for step in steps_of_loss(settings, weights) for path in output_paths(step, settings)),
    ]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]} is not there; run steps 0 to 3 with these settings (again)")
    for path in paths:  # what is damaged is not another: its step can write it again
        demand_undamaged(path)
    return {str(path.relative_to(settings.work_folder)): fingerprint(path) for path in paths}


def outside_inputs(work: Path, model: Model) -> dict[str, str]:
    """Fingerprints of what a run is trained on outside WORK: image files, and what its encoders are made from.

    Raises UserError where one is missing.
    """
    return {"set of image files": images_digest(load_images(work)), **encoder_inputs(model)}


def encoder_inputs(model: Model) -> dict[str, str]:
    """Fingerprints of the files with the encoders' weights or vectors, by name.

    Raises UserError where one is missing.
    """
    found, digest = {}, weights_digest(model.image)
    if ":" in model.image.backbone:
        found["model.image.backbone"] = digest
    elif digest not in ("imagenet", "none"):
        found["file model.image.weights"] = digest
    if of_text := getattr(TEXT_ENCODERS.load(model.text.encoder), "fingerprint", None):
        found["model.text.encoder"] = of_text(model.text)
    return found


def what_changed_since(run: Path, settings: Settings, *, force: bool = False) -> str | None:
    """Which setting or input of the run in the folder has changed; None where none has, or there is no run.

    With `force` only what its model needs is compared: the pairs, the vocabulary and the words.
    """
    if not (run / "config.yaml").exists():
        return None
    settings_before, weights = read_run(run)
    before, now = flatten(settings_before), flatten(settings)
    for name in OF_A_RUN:
        if before[name] != now[name]:
            return f"with {name} {before[name]}, and the settings now say {now[name]}"
    if (run / "inputs.json").exists():
        trained_on, there = read_json(run / "inputs.json"), run_inputs(settings, weights)
        if trained_on.keys() - there.keys():  # runs of earlier versions do not name the images
            there |= outside_inputs(settings.work_folder, settings.model)
        for name, value in trained_on.items():
            if there.get(name) != value and not (force and name.startswith(NOT_READ_BY_A_MODEL)):
                return f"on another {name}"
    return None


def clear_run(run: Path) -> None:
    """Remove an earlier training from the folder. Its settings go first: without them a folder is no run."""
    (run / "config.yaml").unlink(missing_ok=True)
    for old in run.glob("*"):
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != LOCK:
            old.unlink()


def start_run(run: Path, settings: Settings, weights: Weights, *, resume: bool) -> bool:
    """Make the run's folder. False, after printing `up to date`, where the run is finished.

    Raises UserError where the run is unfinished and not to be resumed, or was trained with other settings or inputs.
    """
    if not (run / "config.yaml").exists():
        clear_run(run)
        outside = outside_inputs(settings.work_folder, settings.model)
        write_json(run / "inputs.json", run_inputs(settings, weights) | outside)
        tree = {"weights": asdict(weights), **settings.model_dump()}
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        write_text(run / "config.yaml", f"{text}{CHECKSUM}{checksum(text)}\n")
        return True
    if changed := what_changed_since(run, settings):
        raise UserError(f"{run} was trained {changed}; train it anew with --overwrite")
    if (run / "run.json").exists():
        print(f"up to date {run / 'best.pt'}")
        return False
    if not resume:
        raise UserError(f"{run} is unfinished; resume it with --resume, or start it anew with --overwrite")
    for leftover in run.glob(".*.part*"):  # of killed processes, of this computer or another
        leftover.unlink()
    return True


def read_run(run: Path) -> tuple[Settings, Weights]:
    """Settings and loss weights of a run. WORK is the folder that the run lies in now.

    A setting that was added since has its default. Raises UserError where there is no run, or its config.yaml is
    broken.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run of train_cross_modal_retrieval_model.py: it has no config.yaml")
    if os.fsencode(run).decode(errors="replace") != str(run):
        raise UserError(f"the path {run} is not UTF-8, as settings are; go into its folder and name it from there")
    try:
        text = path.read_text(encoding="utf-8")
        written, _, noted = text.rpartition(CHECKSUM)
        if written and noted.strip() != checksum(written):
            raise UserError("it is damaged, or was edited after the training began")
        tree = yaml.safe_load(text)
        weights = Weights(**{name: float(weight) for name, weight in tree.pop("weights").items()})
        tree[LAST_SECTION][LAST_SETTING]
        settings = load_settings(checked_tree(tree, "config.yaml", ignored=RETIRED))
        settings.work = str(work_of(run))
        wrong = "".join(f": {mistake}" for mistake in mistakes(settings))
    except UserError as error:
        wrong = f": {error}"
    except Exception:  # a broken file makes YAML's constructors and what follows raise anything
        wrong = " is broken or cut off"
    if wrong:
        raise UserError(f"{path}{wrong}; train the run anew with --overwrite")
    return settings, weights


def work_of(run: Path) -> Path:
    """WORK, the folder that a run lies in now. Relative as the run: a working directory may have any name."""
    return Path(os.path.normpath(run / ".." / ".."))


def finished_run(run: Path, *, force: bool = False) -> tuple[Settings, Weights]:
    """`read_run` of a finished run whose inputs are unchanged. With `force` its images and neighbors may have changed.

    Raises UserError where it is unfinished or its inputs have changed.
    """
    settings, weights = read_run(run)
    if not (run / "run.json").exists():
        raise UserError(f"{run} is unfinished; resume it with train_cross_modal_retrieval_model.py --resume")
    if changed := what_changed_since(run, settings, force=force):
        hint = "" if force or what_changed_since(run, settings, force=True) else ", or use it all the same with --force"
        raise UserError(f"{run} was trained {changed}; train it anew with --overwrite{hint}")
    return settings, weights


def load_model(
    run: Path, settings: Model, seed: int, device: torch.device, word_vectors: np.ndarray | None = None
) -> TwoStream:
    """The model of a run's best epoch, in eval mode. word_vectors: (V, E); None: those of WORK."""
    if word_vectors is None:
        word_vectors = read_array(Work(work_of(run)).word_vectors)
    model = build_model(settings, word_vectors, seed)
    load_model_state(run / "best.pt", model)
    return model.to(device).eval()
