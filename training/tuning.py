"""The search for the loss weights: two studies with the same number of trials."""

import contextlib
import hashlib
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch.utils.tensorboard import SummaryWriter

from datasets import Prepared
from images.loading import ImageSource
from models import build_model
from pipeline.devices import choose_device
from pipeline.errors import UserError, reason
from pipeline.files import checksum, read_array, read_json, write_json
from pipeline.progress import ProgressBar
from pipeline.schema import ANGULAR, TRIPLET, Settings
from pipeline.settings import flatten
from pipeline.work import Work
from training.image_sources import image_source
from training.runs import OF_A_RUN, Weights, outside_inputs, run_inputs
from training.text_streams import load_pairs
from training.trainer import build_trainer

SEARCHES = {"baseline": ("sym",), "method": ("sym", "img", "text")}
"""The weights that each search varies; the others are 0."""
STUDY, CHECKSUM = "weights", "checksum"
"""Names of the study in its database, and of each finished trial's checksum."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
LOWEST, HIGHEST = 0.03, 10.0
"""Weights are searched between these, on a logarithmic scale."""


def search_folder(settings: Settings) -> Path:
    """WORK/tuning/<digest of the settings and inputs that shape a trial>: trials that differ in them do not mix."""
    of_run = {name: value for name, value in flatten(settings).items() if name == "evaluation.kway" or name in OF_A_RUN}
    inputs = run_inputs(settings, Weights(*ANGULAR)) | outside_inputs(settings.work_folder, settings.model)
    shaping = [of_run, inputs, LOWEST, HIGHEST]
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]
    return Work(settings.work_folder).tuning / digest


def search(folder: Path, names: tuple[str, ...], settings: Settings) -> Weights:
    """The weights with the highest figure of `tuning.trials` trials, those of earlier calls among them."""
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(folder)
    for cut_short in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(cut_short.number, state=TrialState.FAIL)
    trials = settings.tuning.trials
    if (done := len(study.get_trials(states=FINISHED))) < trials:
        device = choose_device(settings.training.device)
        data = load_pairs(settings.work_folder, settings.features_folder, settings.model.text, device)
        images = image_source(settings, data, device)
        paper = dict(zip(("sym", "img", "text"), TRIPLET if settings.loss.base == "triplet" else ANGULAR, strict=True))
        with ProgressBar(total=trials, initial=done, desc=folder.name, unit="trial") as progress:
            for number in range(done, trials):
                # Seeded for each trial, so that a search that was stopped asks for what it would have asked for.
                study.sampler = optuna.samplers.TPESampler(
                    seed=int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0]), multivariate=True
                )
                study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5)
                if number == 0 and not study.get_trials(states=(TrialState.WAITING,)):
                    study.enqueue_trial({name: paper[name] for name in names}, skip_if_exists=False)
                trial = study.ask()
                weights = suggest(trial, names)
                pruned = train(folder / f"trial_{number:03d}", weights, trial, settings, data, images, device)
                last = study.trials[trial.number].intermediate_values
                trial.set_user_attr(CHECKSUM, checksum_of(study.trials[trial.number]))
                study.tell(trial, state=TrialState.PRUNED) if pruned else study.tell(trial, last[max(last)])
                progress.update()
                progress.set_postfix(best=f"{study.best_value:.4f}")
    best = study.best_trial
    weights = suggest(optuna.trial.FixedTrial(best.params), names)
    path = folder / "best.json"
    found = {
        **asdict(weights),
        "value": best.value,
        "trials": len(study.get_trials(states=FINISHED)),
        "pruned": len(study.get_trials(states=(TrialState.PRUNED,))),
    }
    with contextlib.suppress(UserError):
        if read_json(path) == found:
            print(f"up to date {path}")
            return weights
    write_json(path, found)
    print(f"wrote {path}")
    return weights


def open_study(folder: Path) -> optuna.Study:
    """The study in `folder`, a new one where there is none. Raises UserError where its database is damaged.

    SQLite has no checksums, so each finished trial has one of its own.
    """
    path = folder / "trials.db"
    try:
        if path.exists():
            with contextlib.closing(sqlite3.connect(path)) as database:
                if (found := database.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                    raise ValueError(found)
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        if optuna.get_all_study_names(storage) not in ([], [STUDY]):
            raise ValueError("it holds another study")
        study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True)
        if study.direction != StudyDirection.MAXIMIZE:
            raise ValueError("its direction has changed")
        for number, trial in enumerate(study.trials):
            noted = trial.user_attrs.get(CHECKSUM)  # earlier versions noted none
            if trial.number != number or (noted and trial.state in FINISHED and noted != checksum_of(trial)):
                raise ValueError(f"trial {number} has changed")
            if trial.state == TrialState.COMPLETE:
                last = trial.intermediate_values
                if trial.value != last[max(last)]:
                    raise ValueError(f"the figure of trial {number} has changed")
    except Exception as error:  # a damaged database raises anything
        raise UserError(f"{path} is damaged ({reason(error, 200)}); remove {folder} to search anew") from None
    return study


def checksum_of(trial: FrozenTrial) -> str:
    """A checksum of what a trial asked for and of its figures."""
    return checksum(json.dumps([trial.params, sorted(trial.intermediate_values.items())], sort_keys=True))


def suggest(trial: optuna.trial.BaseTrial, names: tuple[str, ...]) -> Weights:
    """The trial's weights, in two digits, as somebody would type them."""
    asked = {name: float(f"{trial.suggest_float(name, LOWEST, HIGHEST, log=True):.2g}") for name in names}
    return Weights(**{"sym": 0.0, "img": 0.0, "text": 0.0} | asked)


def at_bounds(weights: Weights, names: tuple[str, ...]) -> list[str]:
    """Which of the weights `names` lie within 5 % of a bound of the search, a sentence each."""
    found = []
    for name in names:
        weight = getattr(weights, name)
        for bound, which in ((LOWEST, "lower"), (HIGHEST, "upper")):
            if abs(weight - bound) <= 0.05 * bound:
                found.append(f"{name.upper()} {weight:g} is at the {which} bound of the search, {bound:g}")
    return found


def train(
    folder: Path,
    weights: Weights,
    trial: optuna.Trial,
    settings: Settings,
    data: Prepared,
    images: ImageSource,
    device: torch.device,
) -> bool:
    """Train a trial and report its figure after every epoch; True where it was stopped for lying below the median."""
    for old in folder.glob("events.out.tfevents.*"):  # of the same trial, cut short
        old.unlink()
    model = build_model(settings.model, read_array(Work(settings.work_folder).word_vectors), settings.seed).to(device)
    trainer = build_trainer(settings, weights, data, model, images, device)
    pruned = False
    with SummaryWriter(str(folder)) as board:
        while not (trainer.finished() or pruned):
            trainer.train_one_epoch(board)
            trainer.validate(board)
            trial.report(trainer.progress.best_recall, trainer.progress.epoch)
            pruned = trial.should_prune()
        figures = {"hparam/val_recall_at_1": trainer.progress.best_recall, "hparam/epochs": trainer.progress.epoch}
        board.add_hparams(asdict(weights), figures, run_name=".")
    return pruned
