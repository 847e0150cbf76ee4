"""Checkpoints: best.pt, the model alone, and last.pt, with all that resumes a training as if it had never stopped."""

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models import TwoStream
from pipeline.errors import UserError, reason
from pipeline.files import written_whole
from training import distributed

if TYPE_CHECKING:
    from training.trainer import Trainer


def random_state() -> dict[str, Any]:
    """State of torch's generators. All other randomness depends on the seed and the epoch alone."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def model_state(trainer: "Trainer") -> dict[str, Any]:
    """What best.pt holds. The weights are the trainer's own, which training goes on to change."""
    progress = trainer.progress
    return {"model": trainer.model.checkpoint(), "epoch": progress.epoch, "step": progress.step}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state whole."""
    # Given a path, torch.save would write the temporary file's name into the file.
    with written_whole(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own error from closing its archive hides that the disk is full
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_model_state(path: Path, model: TwoStream) -> dict[str, Any]:
    """Load a checkpoint's weights into `model` and return all of the checkpoint.

    Raises UserError where the file is missing, broken, damaged or another model's.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not verify them
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        model.load_checkpoint(state["model"])
    except Exception as error:
        raise UserError(
            f"{path} is no checkpoint of this model ({reason(error, 200)}); train it anew with --overwrite"
        ) from None
    return state


def save_checkpoint(run: Path, trainer: "Trainer", best: dict[str, Any]) -> None:
    """Write best.pt in a run's folder, where there is a new `best` state, then last.pt.

    All processes call it together; one writes.
    """
    random, *of_others = distributed.gather_objects(random_state())

    def write() -> None:
        if best:
            write_state(run / "best.pt", best)
        state = {
            **model_state(trainer),
            **asdict(trainer.progress),
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.schedule.state_dict(),
            "random": random,
            "curves": {path.name: path.stat().st_size for path in run.glob("events.out.tfevents.*")},
        }
        write_state(run / "last.pt", state | ({"random_of_others": of_others} if of_others else {}))

    distributed.by_writer(write)


def resume(run: Path, trainer: "Trainer") -> dict[str, int]:
    """Restore a trainer from the run's last.pt. Returns the sizes that TensorBoard's files had, by name.

    Raises UserError where last.pt is broken or another model's.
    """
    path, progress = run / "last.pt", trainer.progress
    state = load_model_state(path, trainer.model)
    try:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.schedule.load_state_dict(state["schedule"])
        for name in asdict(progress):
            setattr(progress, name, state[name])
        random = [state["random"], *state.get("random_of_others", [])]
        sizes: dict[str, int] = state["curves"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be resumed ({reason(error)}); train it anew with --overwrite") from None
    same = len(random) == distributed.processes()
    trainer.random = random[distributed.rank()] if same else {}
    if progress.batches_done and not same:
        print(
            f"warning: {len(random)} processes began epoch {progress.epoch}, {distributed.processes()} resume it: "
            "dropout, and perhaps the last batches, will differ"
        )
    return sizes
