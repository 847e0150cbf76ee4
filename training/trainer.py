"""The training loop."""

import contextlib
import copy
import dataclasses
import errno
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import losses
from datasets import BatchPlan, Neighbors, OtherTexts, Prepared, plan_epoch
from images.loading import ImageSource, demand_readable
from metrics import EmbeddedPairs, registered
from models import PVSE, TwoStream
from pipeline import settings as config
from pipeline.devices import to_device
from pipeline.errors import UserError
from pipeline.files import write_json, written_whole
from pipeline.settings import Settings
from training import distributed, tensorboard_pages
from training.embedding import autocast, embed_pairs
from training.fine_grained import PairwiseLoss
from training.runs import (
    Weights,
    load_checkpoint,
    reads_neighbors,
)


class StopRequest:
    """Ctrl-C and SIGTERM, noted until training comes to where it can stop; a second Ctrl-C stops it at once."""

    signal = 0
    """The signal that came, or 0."""

    def __enter__(self) -> "StopRequest":
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        """The signals' handler."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class NoBoard:
    """In place of TensorBoard's writer in a process that does not write."""

    def add_scalar(self, *_: object) -> None:
        """Write nothing."""


@contextlib.contextmanager
def curves(run: Path) -> Iterator[SummaryWriter]:
    """TensorBoard's writer of a run; raises UserError where the disk is full or not writable."""
    if not distributed.is_writer():
        yield NoBoard()
        return
    told, threading.excepthook = threading.excepthook, lambda _: None  # the writer's thread fails, and then each call
    try:
        with SummaryWriter(str(run)) as board:
            yield board
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"cannot write in {run}: {error.strerror}; make room and go on with --resume") from None
    finally:
        threading.excepthook = told


def roll_back_curves(run: Path, sizes: dict[str, int]) -> None:
    """Cut TensorBoard's files in a run's folder back to `sizes` in bytes, by name; those of no size go altogether."""
    for path in run.glob("events.out.tfevents.*"):
        if path.name in sizes:
            with path.open("r+b") as file:
                file.truncate(sizes[path.name])
        else:
            path.unlink()


def make_loss_terms(settings: config.Loss) -> Callable[..., dict[str, Tensor]]:
    """The terms of Eq. 8 that `loss.*` describes, as a function of a batch's embeddings."""
    if settings.base == "struc":
        return functools.partial(losses.structure_preserving_loss_terms, margin=settings.margin or 0.1)
    return functools.partial(losses.retrieval_loss_terms, make_base_loss(settings))


def make_base_loss(settings: config.Loss) -> losses.NPairsLoss:
    """The N-pairs loss that `loss.*` describes; with base fine_grained, that of L_img and L_text."""
    if settings.base == "triplet":
        return functools.partial(losses.triplet_npairs_loss, margin=settings.margin or 0.2)
    default = {"logsumexp": 1.0, "hinge": 0.2}[settings.form]
    angular = functools.partial(
        losses.angular_npairs_loss, tan_squared_alpha=settings.tan_squared_alpha or default, form=settings.form
    )
    if not settings.tile_negatives:
        return angular
    return lambda anchors, *others: angular(anchors, *others, negatives_weight=float(len(anchors)))


class Trainer:
    """The model with its optimiser and schedule, trained epoch by epoch."""

    def __init__(
        self,
        settings: Settings,
        weights: Weights,
        data: Prepared,
        model: TwoStream,
        images: ImageSource,
        device: torch.device,
    ) -> None:
        self.settings, self.weights, self.data = settings, weights, data
        self.model, self.images, self.device = model, images, device
        self.parallel = distributed.parallel(model, device, trainable_images=settings.model.image.trainable)
        training = settings.training
        if training.compile:
            model.images.backbone.compile()  # in place: checkpoints keep their names
        self.pairwise = PairwiseLoss(settings, data, device) if settings.loss.base == "fine_grained" else None
        self.neighbor_texts = bool(weights.text or (self.pairwise and self.pairwise.with_neighbors))
        self.neighbors: Neighbors | OtherTexts | None = None
        if weights.img or self.neighbor_texts:
            estimated = reads_neighbors(settings, weights)
            self.neighbors = Neighbors(settings, data) if estimated else OtherTexts(data)
        self.within_batch = self.neighbors is not None and training.batches == "neighborhoods"
        self.loss_terms = make_loss_terms(settings.loss)
        self.term_weights = weights.of_terms()
        if settings.model.pvse.embeddings > 1:
            pvse = settings.model.pvse
            self.term_weights |= {"l_diversity": pvse.diversity_weight, "l_mmd": pvse.mmd_weight}

        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(
            learned, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        # PyTorch decays after more than `patience` epochs without lower loss, hence the - 1.
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=training.decay_factor, patience=training.decay_patience - 1, threshold=0.0
        )
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.batches_done = 0  # of the epoch under way; 0 between two epochs
        self.random: dict[str, Any] = {}  # state of the generators that a checkpoint within an epoch came with
        self.unchecked: list[tuple[int, BatchPlan, dict[str, Tensor]]] = []  # step, batch and loss terms
        self.best_loss, self.best_epoch, self.best_recall = float("inf"), 0, 0.0
        self.shown = ""  # the last validation in a line
        self.told: set[int] = set()  # images that could not be read
        # Fixed batches: validation losses of two epochs, or of two methods, are over the same negatives.
        self.val_rows = np.random.default_rng(settings.seed).permutation(data.rows["val"])

    def finished(self) -> bool:
        """True after the last epoch, or `stop_patience` epochs after the lowest validation loss."""
        training = self.settings.training
        if self.batches_done:
            return False
        return self.epoch >= training.max_epochs or self.epoch - self.best_epoch >= training.stop_patience

    def train_one_epoch(self, board: SummaryWriter, after_batch: Callable[[], None] = lambda: None) -> None:
        """One pass over the train pairs, or the rest of one."""
        settings, training = self.settings, self.settings.training
        self.epoch += not self.batches_done
        if self.batches_done and self.random:  # torch's generator is for dropout
            set_random_state(self.random)
        else:
            number = [distributed.rank()] if distributed.rank() else []
            seeds = np.random.SeedSequence([settings.seed, self.epoch, *number])
            torch.manual_seed(seeds.generate_state(1)[0].item())
        plan = plan_epoch(
            self.data.rows["train"],
            self.neighbors,
            training.batch_size,
            flip=training.horizontal_flip,
            seed=settings.seed,
            epoch=self.epoch,
            neighborhoods=self.within_batch,
            processes=distributed.processes(),
        )
        rest = plan[self.batches_done :]
        self.model.train()
        started = time.monotonic()
        doing, before = f"epoch {self.epoch} of {training.max_epochs}", self.batches_done
        quiet = None if distributed.is_writer() else True  # None: where there is no terminal
        progress = tqdm(rest, doing, len(plan), initial=before, unit="batch", leave=False, disable=quiet)
        requests = self.image_requests([self.share(batch) for batch in rest])
        for batch, images in zip(progress, self.images.batches(requests), strict=True):
            batch, images = self.readable(batch, images)
            terms = self.losses(batch, images)
            self.optimizer.zero_grad(set_to_none=True)
            losses.weighted_sum(terms, self.term_weights).backward()
            self.optimizer.step()
            self.step += 1
            self.batches_done += 1
            self.unchecked.append((self.step, batch, {name: term.detach() for name, term in terms.items()}))
            if self.step % training.log_every == 0:
                self.demand_finite(board)
                self.log_losses(board, batch, terms)
            after_batch()
        if rest:
            self.demand_finite(board)
            pairs_a_second = sum(len(batch.rows) for batch in rest) / (time.monotonic() - started)
            board.add_scalar("speed/pairs_a_second", pairs_a_second, self.step)

    def demand_finite(self, board: SummaryWriter) -> None:
        """Raise UserError where a loss since the last call was NaN or infinite; its batch is saved in the run's folder.

        The losses of several steps are looked at together, as each look makes a GPU wait.
        """
        unchecked, self.unchecked = self.unchecked, []
        for step, batch, terms in unchecked:
            values = {name: value.item() for name, value in terms.items()}
            if not np.isfinite(list(values.values())).all():
                told = {"epoch": self.epoch, "step": step, "losses": {name: str(values[name]) for name in values}}
                told |= {"pairs": batch.rows.tolist(), "neighbors": batch.neighbors.tolist()}
                path = "non_finite_batch.json"
                if distributed.is_writer():
                    path = Path(board.log_dir) / path
                    write_json(path, told)
                raise UserError(
                    f"a loss of step {step} is NaN or infinite; the batch's pairs are in {path}; look at them, lower "
                    "training.learning_rate, and train anew with --overwrite"
                )

    @staticmethod
    def share(batch: BatchPlan) -> BatchPlan:
        """The pairs of a batch that this process encodes; it shares the batch's memory."""
        return batch.part(distributed.share(len(batch.rows)))

    def readable(self, batch: BatchPlan, images: Tensor) -> tuple[BatchPlan, Tensor]:
        """The batch with another train pair, drawn by seed, in place of each whose image could not be read.

        Where it is only the neighbor's, the pair stays and another of its neighbors is drawn. `images` are those of
        this process's share of the batch.
        """
        mine = self.share(batch)
        size = len(mine.rows)
        lost = self.lost(mine).reshape(-1, size).any(axis=0)
        if not any(distributed.greatest(lost.any())):
            return batch, images
        self.pool_unreadable()
        batch, images = copy.deepcopy(batch), images.clone()
        mine = self.share(batch)

        def replace() -> None:
            for place in np.flatnonzero(lost):
                images[place::size] = self.replaced(mine.part(slice(place, place + 1)))

        distributed.agreed(replace)
        self.pool_unreadable()
        parts = distributed.gather_objects(mine)
        columns = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(BatchPlan)]
        return BatchPlan(*map(np.concatenate, columns)), images

    def pool_unreadable(self) -> None:
        """Let all processes know which images one could not read; warns and raises as `warn_of_unreadable`."""
        found = distributed.gather_objects(dict(self.images.unreadable))
        if distributed.processes() > 1:
            self.images.unreadable = {number: why for one in found for number, why in one.items()}
        self.warn_of_unreadable()

    def replaced(self, one: BatchPlan) -> Tensor:
        """Put a pair and a neighbor that can be read into a plan for one pair; returns their images."""
        rng = np.random.default_rng([self.settings.seed, self.epoch, one.rows[0]])
        train = self.data.rows["train"]
        for attempt in range(100):
            position = np.searchsorted(train, one.rows)
            if self.lost(one)[0] or attempt >= 10:  # a pair may have no neighbor left
                position = rng.integers(len(train), size=1)
                one.rows[:] = train[position]
            if self.neighbors:
                one.neighbors[:] = self.neighbors.draw(position, rng)
            images = self.images.load(*self.image_requests([one])[0])
            self.warn_of_unreadable()
            if not self.lost(one).any():
                return images
        raise UserError(
            "100 pairs drawn one after the other have images that cannot be read; run prepare_dataset.py again"
        )

    def lost(self, batch: BatchPlan) -> np.ndarray:
        """(B,) or, with the neighbors' images, (2B,) bool: which images of a batch could not be read."""
        return np.isin(self.image_requests([batch])[0][0], list(self.images.unreadable))

    def warn_of_unreadable(self) -> None:
        """Say which images could not be read since the last call; raises UserError where these are too many."""
        images = self.data.images
        for number in sorted(self.images.unreadable.keys() - self.told):
            tqdm.write(f"warning: {self.images.unreadable[number]}; other pairs take its place")
            self.told.add(number)
        demand_readable(self.images.unreadable, len(images.paths), self.settings.training.max_unreadable_share)

    def image_requests(self, plan: list[BatchPlan]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Image numbers and flips of each batch: the pairs' images, then, for L_img, those of their neighbors.

        Neighborhood batches hold the neighbors already.
        """
        image = self.data.images.of_pair
        if not self.weights.img or self.within_batch:
            return [(image[batch.rows], batch.flips) for batch in plan]
        return [
            (
                np.concatenate([image[batch.rows], image[self.positives(batch)]]),
                np.concatenate([batch.flips, batch.neighbor_flips]),
            )
            for batch in plan
        ]

    @staticmethod
    def positives(batch: BatchPlan) -> np.ndarray:
        """The drawn neighbors; a pair that has none stands in for its own, and is masked in the losses."""
        return np.where(batch.neighbors >= 0, batch.neighbors, batch.rows)

    def text_rows(self, batch: BatchPlan) -> np.ndarray:
        """Pairs whose texts a batch takes: its own, then, where a loss wants more than those, their neighbors."""
        besides = self.neighbor_texts and not self.within_batch
        return np.concatenate([batch.rows, self.positives(batch)]) if besides else batch.rows

    def losses(self, batch: BatchPlan, images: Tensor) -> dict[str, Tensor]:
        """The terms on one batch, by name; images and neighbors' images pass through the encoder as one.

        In a neighborhood batch the neighbors are looked up among its pairs. One whose place another pair has taken, its
        image being lost, is masked as if there were none.

        Of several processes each encodes its share of the batch, `images` being that of the images; the embeddings are
        then joined.
        """
        size, positives, rows = len(batch.rows), self.positives(batch), self.text_rows(batch)
        tokens, lengths = self.data.texts(self.text_rows(self.share(batch)))
        residuals: tuple[Tensor, ...] = ()
        sizes = distributed.shares(size)
        with autocast(self.settings, self.device):
            if isinstance(self.model, PVSE):
                of_images, of_texts = self.parallel(images, to_device(tokens, self.device), lengths, residuals=True)
                residuals = tuple(distributed.gather_with_gradient(z, sizes) for z in (of_images[1], of_texts[1]))
                x, y = of_images[0], of_texts[0]
            else:
                x, y = self.parallel(images, to_device(tokens, self.device), lengths)
        x, y = (distributed.gather_with_gradient(z, sizes) for z in (x, y))
        ids = to_device(self.data.image_ids[batch.rows], self.device)
        known: dict[str, Tensor] = {}
        drawn_from_lists = isinstance(self.neighbors, Neighbors) and self.settings.neighbors.draw == "neighbors"
        if self.settings.loss.base == "struc" and drawn_from_lists:
            members = self.neighbors.contain(batch.rows, np.concatenate([batch.rows, positives]))
            known["neighborhoods"] = to_device(members, self.device)
        x_near, y_near, has_neighbor = x[size:], y[size:], batch.neighbors >= 0
        if self.within_batch:
            found = batch.neighbors[:, None] == batch.rows
            has_neighbor = found.any(axis=1)
            places = to_device(found.argmax(axis=1), self.device)
            x_near, y_near = x[places], y[places]
            near = self.neighbors.contain(batch.rows, batch.rows)  # being a neighbor is not mutual
            known["known_neighbors"] = to_device(near | near.T, self.device)
        terms = self.loss_terms(
            x[:size],
            y[:size],
            ids,
            neighbor_images=x_near if self.weights.img else None,
            neighbor_texts=y_near if self.weights.text else None,
            neighbor_ids=to_device(self.data.image_ids[positives], self.device),
            has_neighbor=to_device(has_neighbor, self.device),
            **known,
        )
        if self.pairwise:
            texts = len(rows) if self.pairwise.with_neighbors else size
            del terms["l_sym"]
            terms["l_i2t"] = self.pairwise(x[:size], y[:texts], batch.rows, rows[:texts])
        if "l_diversity" in self.term_weights:
            terms["l_diversity"] = sum(losses.diversity_loss(of_stream) for of_stream in residuals)
            terms["l_mmd"] = losses.mmd_loss(x[:size], y[:size])
        return terms

    def log_losses(self, board: SummaryWriter, batch: BatchPlan, terms: dict[str, Tensor]) -> None:
        """The authors' tags; a warning where the batch has negatives, and none is near enough to have a gradient."""
        board.add_scalar("data/train_loss", losses.weighted_sum(terms, self.term_weights).item(), self.step)
        for name, value in terms.items():
            board.add_scalar(f"data/{name}", value.item(), self.step)
        angular = self.settings.loss.base == "angular"
        if self.pairwise or (angular and self.settings.loss.form == "logsumexp"):
            return  # every triplet has a gradient
        inactive = all(terms[name].item() == 0 for name, weight in self.weights.of_terms().items() if weight)
        if inactive and len(np.unique(self.data.image_ids[batch.rows])) > 1:
            tqdm.write(
                f"warning: no triplet of the batch of step {self.step} is active, nothing is learned from it; "
                f"{'lower loss.tan_squared_alpha' if angular else 'raise loss.margin'}"
            )

    @torch.no_grad()
    def validate(self, board: SummaryWriter) -> bool:
        """Validation loss, which drives schedule and early stop, and Recall@1; True where it is lowest.

        The loss is i2t + sym, whatever the weights, or the pairwise loss. Of several processes one computes it for all.
        """
        val_loss, measured = distributed.by_writer(lambda: self.validation(board))
        self.batches_done = 0
        improved = self.epoch > 0 and val_loss < self.best_loss
        if improved:
            self.best_loss, self.best_epoch = val_loss, self.epoch
            self.best_recall = sum(next(iter(measured.values()))) / 2  # k-way Recall@1 of the first k, both ways
        if self.epoch:
            self.schedule.step(val_loss)
        shown = ", ".join(" ".join([label, *(f"{value:.3f}" for value in both)]) for label, both in measured.items())
        self.shown = f"epoch {self.epoch:3d}  val loss {val_loss:.4f}  {shown}{' *' if improved else ''}"
        return improved

    def validation(self, board: SummaryWriter) -> tuple[float, dict[str, list[float]]]:
        """Validation loss, and by label the metrics of every epoch, from image to text and from text to image."""
        rows, size = self.val_rows, self.settings.training.batch_size
        x, y = embed_pairs(self.model, self.data, self.images, rows, self.settings, self.device)
        self.warn_of_unreadable()
        if self.images.unreadable:
            readable = ~np.isin(self.data.images.of_pair[rows], list(self.images.unreadable))
            rows, x, y = rows[readable], x[torch.from_numpy(readable)], y[torch.from_numpy(readable)]
        ids = torch.from_numpy(self.data.image_ids[rows]).to(self.device)
        total = 0.0
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            if self.pairwise:
                loss = self.pairwise(x[part], y[part], rows[part], rows[part])
            else:
                terms = self.loss_terms(x[part], y[part], ids[part])
                loss = terms["l_i2t"] + terms["l_sym"]
            total += loss.item() * len(ids[part])
        val_loss = total / len(rows)
        if not np.isfinite(val_loss):
            raise UserError(f"the validation loss is {val_loss} after epoch {self.epoch}; lower training.learning_rate")

        board.add_scalar("data/val_loss", val_loss, self.step)
        board.add_scalar("data/learning_rate", self.optimizer.param_groups[0]["lr"], self.step)
        board.add_scalar("data/epoch", self.epoch, self.step)
        board.add_scalar("data/unreadable_images", len(self.images.unreadable), self.step)
        pairs = EmbeddedPairs(x, y, self.data.image_ids[rows], self.data.categories[rows])
        measured: dict[str, list[float]] = {}
        for metric in registered(self.settings.evaluation).values():
            if metric.every_epoch:
                measured.setdefault(metric.label, []).append(metric.value(pairs))
                board.add_scalar(f"val/{metric.name}", measured[metric.label][-1], self.step)
        tensorboard_pages.show_validation(board, self.data, rows, x, y, self.settings, self.epoch, self.step)
        return val_loss, measured

    # Checkpoints

    def save(self, path: Path, more: dict[str, Any] | None = None) -> None:
        """Write the model, and `more`, whole."""
        state = {"model": self.model.checkpoint(), "epoch": self.epoch, "step": self.step, **(more or {})}
        # Given a path, torch.save would write the file's passing name into the file.
        with written_whole(path) as beside, beside.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's own, from closing its archive, hides that the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def checkpoint(self, board: SummaryWriter) -> None:
        """Write last.pt: the model and all else that training needs to go on as if it had never stopped."""
        self.demand_finite(board)
        random, *of_others = distributed.gather_objects(random_state())
        distributed.by_writer(lambda: self.write_checkpoint(board, random, of_others))

    def write_checkpoint(self, board: SummaryWriter, random: dict[str, Any], of_others: list[dict[str, Any]]) -> None:
        """Write last.pt with the states of this process's and of the other processes' generators."""
        run = Path(board.log_dir)
        board.flush()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "best_recall": self.best_recall,
            "batches_done": self.batches_done,
            "random": random,
            "curves": {path.name: path.stat().st_size for path in run.glob("events.out.tfevents.*")},
            "seconds": self.seconds,
        }
        self.save(run / "last.pt", state | ({"random_of_others": of_others} if of_others else {}))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; raises UserError where it is broken or another model's."""
        state = load_checkpoint(path, self.model)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch, self.step, self.batches_done = state["epoch"], state["step"], state["batches_done"]
            self.best_loss, self.best_epoch = state["best_loss"], state["best_epoch"]
            self.best_recall, self.seconds = state["best_recall"], state["seconds"]
            random = [state["random"], *state.get("random_of_others", [])]
            sizes = state["curves"]
        except (KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be gone on from ({reason}); train it anew with --overwrite") from None
        same = len(random) == distributed.processes()
        self.random = random[distributed.rank()] if same else {}
        if self.batches_done and not same:
            began, go_on = len(random), distributed.processes()
            print(
                f"{began} processes began epoch {self.epoch}, {go_on} go on: other dropout, perhaps other last batches"
            )
        if distributed.is_writer():
            roll_back_curves(path.parent, sizes)


def random_state() -> dict[str, Any]:
    """State of torch's generators; all else that is random is drawn from the seed and the epoch."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Put torch's generators into a state that `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
