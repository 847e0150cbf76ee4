"""A training run's folder: its name, its settings, its checkpoints."""

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from models import TwoStream, build_model
from pipeline.errors import UserError
from pipeline.files import LOCK, fingerprint, read_array, read_json, write_json, write_text
from pipeline.pairs import load_images
from pipeline.schema import RUN
from pipeline.settings import RETIRED, Settings, checked_tree, flatten, load_settings, mistakes, names_shaping
from pipeline.steps import EXTRACT_DOC2VEC, FIND_NEIGHBORS, Step, output_paths
from training import distributed
from training.embedding import made_from
from training.fine_grained import by_neighbors, siamese_step

OF_A_RUN = names_shaping(RUN)
"""Settings that shape a run. The others are left out of its name, and may change when it is resumed."""

NOT_READ_BY_A_MODEL = ("set of image files", "neighbors/", "siamese/")
"""Inputs of training by the beginning of their names, without which a trained model is what it was."""

LAST_SECTION, LAST_SETTING = "evaluation", "batch_size"
"""Every run's config.yaml has this setting, after all that shape the run: without it the file was cut off."""


@dataclass
class Weights:
    """Weights of Eq. 8 as they stand on the command line; image to text has weight 1."""

    sym: float
    img: float
    text: float

    def of_terms(self) -> dict[str, float]:
        """The weights by the names of the loss terms."""
        return {"l_i2t": 1.0, "l_sym": self.sym, "l_img": self.img, "l_text": self.text}


def run_name(settings: Settings, config_file: Settings, weights: Weights) -> str:
    """Name of a run: the authors' for the weights, then what differs from the config file, then the seed."""
    name = f"l_i2t_l_sym_{weights.sym:g}_l_img_{weights.img:g}_l_text_{weights.text:g}".replace(".", "_")
    of_file = flatten(config_file)
    for setting, value in flatten(settings).items():
        if setting != "seed" and setting in OF_A_RUN and value != of_file[setting]:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            name += f"-{setting}={shown.replace('.', '_').replace('/', '_')}"
    if len(name) > 150:  # file systems end at 255 bytes; config.yaml in the folder holds it all
        name = f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}-seed={settings.seed}"


def reads_neighbors(settings: Settings, weights: Weights) -> bool:
    """Whether a run has a use for the neighbor table: a baseline has none, nor has ground-truth structure."""
    if settings.loss.base == "fine_grained" and by_neighbors(settings):
        return True
    return bool(weights.img or weights.text) and settings.loss.structure == "estimated"


def steps_of_loss(settings: Settings, weights: Weights) -> list[Step]:
    """The steps whose outputs only some losses read."""
    labelled = settings.loss.base == "fine_grained" and settings.loss.labels == "siamese"
    return [FIND_NEIGHBORS] * reads_neighbors(settings, weights) + ([siamese_step(settings)] if labelled else [])


def run_inputs(settings: Settings, weights: Weights) -> dict[str, str]:
    """Fingerprints of the files in WORK that a run is trained on, by name; raises UserError where one is missing."""
    paths = [
        settings.work_folder / "pairs.parquet",
        settings.work_folder / "doc2vec" / "word_vectors.npy",
        *output_paths(EXTRACT_DOC2VEC, settings),
        *(path for step in steps_of_loss(settings, weights) for path in output_paths(step, settings)),
    ]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]} is not there; run steps 0 to 3 with these settings (again)")
    return {str(path.relative_to(settings.work_folder)): fingerprint(path) for path in paths}


def image_inputs(settings: Settings) -> dict[str, str]:
    """Fingerprints of what a run is trained on outside WORK: the image files and, from a file, the backbone's weights.

    Raises UserError where they are not there.
    """
    made = made_from(settings, load_images(settings.work_folder))
    found = {"set of image files": str(made["images"])}
    if settings.model.image.weights not in ("imagenet", "none"):
        found["file model.image.weights"] = str(made["weights"])
    return found


def what_changed_since(run: Path, settings: Settings, *, force: bool = False) -> str | None:
    """What shaped the run in the folder and is another now; None where nothing is, or there is no run.

    With `force` only what its model cannot be used without is compared: the pairs, the vocabulary and the words.
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
            there |= image_inputs(settings)
        for name, value in trained_on.items():
            if there.get(name) != value and not (force and name.startswith(NOT_READ_BY_A_MODEL)):
                return f"on another {name}"
    return None


def clear_run(run: Path) -> None:
    """Remove what an earlier training left in the folder; its settings go first, so that a half-cleared run is none."""
    (run / "config.yaml").unlink(missing_ok=True)
    for old in run.glob("*"):
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != LOCK:
            old.unlink()


def start_run(run: Path, settings: Settings, weights: Weights, *, resume: bool) -> bool:
    """Make the run's folder; False, after saying so, where the run is there and finished.

    Raises UserError where it is unfinished and `resume` is not wanted, or was trained with other settings or inputs.
    """
    if not (run / "config.yaml").exists():
        clear_run(run)
        write_json(run / "inputs.json", run_inputs(settings, weights) | image_inputs(settings))
        tree = {"weights": asdict(weights), **settings.model_dump()}
        write_text(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        return True
    if changed := what_changed_since(run, settings):
        raise UserError(f"{run} was trained {changed}; train it anew with --overwrite")
    if (run / "run.json").exists():
        print(f"up to date {run / 'best.pt'}")
        return False
    if not resume:
        raise UserError(f"{run} is unfinished; go on with it with --resume, or start it anew with --overwrite")
    return True


def read_run(run: Path) -> tuple[Settings, Weights]:
    """Settings and loss weights of a run; raises UserError where there is no run, or its config.yaml is broken.

    A setting that is newer than the run takes its default.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run of train_cross_modal_retrieval_model.py: it has no config.yaml")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        weights = Weights(**{name: float(weight) for name, weight in tree.pop("weights").items()})
        tree[LAST_SECTION][LAST_SETTING]
        settings = load_settings(checked_tree(tree, "config.yaml", ignored=RETIRED))
        wrong = "".join(f": {mistake}" for mistake in mistakes(settings))
    except UserError as error:
        wrong = f": {error}"
    except Exception:  # what is no such file makes YAML's constructors and what follows raise anything
        wrong = " is broken or cut off"
    if wrong:
        raise UserError(f"{path}{wrong}; train the run anew with --overwrite")
    return settings, weights


def finished_run(run: Path, *, force: bool = False) -> tuple[Settings, Weights]:
    """`read_run` of a run that is finished and whose inputs are still those it was trained on.

    With `force` its images and neighbors may be others. Raises UserError where it is not.
    """
    settings, weights = read_run(run)
    if not (run / "run.json").exists():
        raise UserError(f"{run} is unfinished; go on with it with train_cross_modal_retrieval_model.py --resume")
    if changed := what_changed_since(run, settings, force=force):
        hint = "" if force or what_changed_since(run, settings, force=True) else ", or use it all the same with --force"
        raise UserError(f"{run} was trained {changed}; train it anew with --overwrite{hint}")
    return settings, weights


def load_checkpoint(path: Path, model: TwoStream) -> dict[str, Any]:
    """Load a checkpoint's weights into `model` and return all of the checkpoint.

    Raises UserError where the file is missing, broken or another model's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_checkpoint(state["model"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no checkpoint of this model ({reason}); train it anew with --overwrite") from None
    return state


def load_model(run: Path, settings: Settings, device: torch.device) -> TwoStream:
    """The model with the lowest validation loss of a run, in eval mode."""
    model = build_model(settings, read_array(settings.work_folder / "doc2vec" / "word_vectors.npy"))
    load_checkpoint(run / "best.pt", model)
    return model.to(device).eval()


def be_deterministic(settings: Settings) -> None:
    """Have torch compute the same from the same, where `deterministic` asks for it."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def choose_device(settings: Settings) -> torch.device:
    """The device that `training.device` names, set to the products of `training.precision`.

    Raises UserError where a GPU is asked for and there is none.
    """
    if settings.training.device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, and torch sees no GPU; set it to auto or cpu")
    # Every script that runs a model comes by here. torch's own default is TF32 in convolutions and RNNs.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = settings.training.precision == "tf32"
    use_gpu = settings.training.device != "cpu" and torch.cuda.is_available()
    return distributed.gpu() if use_gpu else torch.device("cpu")
