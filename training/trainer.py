"""The training loop of step 4: batches, the validation that drives schedule and early stop, and what is logged."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from datasets import BatchPlan, Prepared, plan_epoch
from images.loading import ImageSource
from metrics import Metric, registered
from models import PVSE, TwoStream
from pipeline.devices import autocast, to_device
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.progress import ProgressBar
from pipeline.schema import Settings, Training
from training import distributed
from training.checkpoints import set_random_state
from training.embedding import embed_pairs
from training.lost_images import LostImages
from training.objective import Objective, ObjectiveBatch, build_objective
from training.runs import Weights
from training.validation import Validation, measure, validation_loss

ShowValidation = Callable[..., None]
"""Called with a board, val rows, x, y, `epoch` and `step`."""


@dataclass
class Progress:
    """How far a training is, as last.pt keeps it."""

    epoch: int = 0
    step: int = 0
    batches_done: int = 0
    """Of the epoch under way; 0 between two epochs."""
    seconds: float = 0.0
    best_epoch: int = 0
    """The best epoch so far; 0 before the first. The next checkpoint writes it to best.pt."""
    best_loss: float = float("inf")
    """Its validation loss."""
    best_recall: float = 0.0
    """Its Recall@1 of the validation split, `training.select_k`-way, mean of both ways."""


def own_share(batch: BatchPlan) -> BatchPlan:
    """The pairs of a batch that this process encodes. It shares the batch's memory."""
    return batch.part(distributed.share(len(batch.rows)))


class Trainer:
    """A model with its objective, optimiser and schedule, trained epoch by epoch.

    Args:
        training: the section of the settings.
        objective: from a batch's embeddings to the terms of the loss.
        model, images, data, device: what is trained, on which images and prepared files, and where.
        seed: of batches, neighbors, flips and dropout.
        metrics: what is measured on the validation split after every epoch; the first two are the two ways of the
            Recall@1 that `training.select` may name.
        embedded_at_once: images or texts in a batch of the validation split.
        show: draws validation results in TensorBoard.
    """

    def __init__(
        self,
        training: Training,
        objective: Objective,
        model: TwoStream,
        images: ImageSource,
        data: Prepared,
        device: torch.device,
        *,
        seed: int,
        metrics: list[Metric],
        embedded_at_once: int = 256,
        show: ShowValidation | None = None,
    ) -> None:
        self.training, self.objective, self.seed, self.metrics = training, objective, seed, metrics
        self.model, self.images, self.data, self.device = model, images, data, device
        self.embedded_at_once, self.show = embedded_at_once, show
        self.parallel = distributed.parallel(model, device, trainable_images=model.images.trainable)
        if training.compile:
            model.images.backbone.compile()  # in place: the names in checkpoints stay
        self.optimizer = torch.optim.Adam(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        # PyTorch decays after more than `patience` epochs without lower loss, hence the - 1.
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=training.decay_factor, patience=training.decay_patience - 1, threshold=0.0
        )
        self.progress = Progress()
        self.random: dict[str, Any] = {}  # torch's generators, as a checkpoint within an epoch kept them
        self.unchecked: list[tuple[int, BatchPlan, dict[str, Tensor]]] = []
        self.last_validation = ""
        self.lost = LostImages(images, len(data.images.paths), training.max_unreadable_share)
        # Fixed batches: two epochs, or two methods, are validated on the same negatives.
        self.val_rows = np.random.default_rng(seed).permutation(data.rows["val"])

    def finished(self) -> bool:
        """Whether it was the last epoch, or `stop_patience` epochs have passed since the best one."""
        progress, training = self.progress, self.training
        if progress.batches_done:
            return False
        return progress.epoch >= training.max_epochs or progress.epoch - progress.best_epoch >= training.stop_patience

    # Training

    def train_one_epoch(self, board: SummaryWriter, after_batch: Callable[[], None] = lambda: None) -> None:
        """One pass over the train pairs, or the rest of one that was stopped."""
        progress = self.progress
        progress.epoch += not progress.batches_done
        self._seed_dropout()
        plan = self.plan()
        rest = plan[progress.batches_done :]
        self.model.train()
        started = time.monotonic()
        requests = [self.image_request(own_share(batch)) for batch in rest]
        for batch, images in zip(self._with_bar(rest, len(plan)), self.images.batches(requests), strict=True):
            terms = self.terms(batch, images)
            self.optimizer.zero_grad(set_to_none=True)
            self.objective.total(terms).backward()
            self.optimizer.step()
            progress.step += 1
            progress.batches_done += 1
            self.unchecked.append((progress.step, batch, {name: term.detach() for name, term in terms.items()}))
            if progress.step % self.training.log_every == 0:
                self.demand_finite(board)
                self._log(board, batch, terms)
            after_batch()
        if rest:
            self.demand_finite(board)
            pairs_a_second = sum(len(batch.rows) for batch in rest) / (time.monotonic() - started)
            board.add_scalar("speed/pairs_a_second", pairs_a_second, progress.step)

    def plan(self) -> list[BatchPlan]:
        """The epoch's batches. They depend on seed and epoch alone, so that a resumed run has the same ones."""
        return plan_epoch(
            self.data.rows["train"],
            self.objective.neighbors,
            self.training.batch_size,
            flip=self.training.horizontal_flip,
            seed=self.seed,
            epoch=self.progress.epoch,
            neighborhoods=self.objective.within_batch,
            processes=distributed.processes(),
        )

    def _seed_dropout(self) -> None:
        if self.progress.batches_done and self.random:
            set_random_state(self.random)
            return
        rank = [distributed.rank()] if distributed.rank() else []
        seeds = np.random.SeedSequence([self.seed, self.progress.epoch, *rank])
        torch.manual_seed(seeds.generate_state(1)[0].item())

    def _with_bar(self, rest: list[BatchPlan], batches: int) -> Iterable[BatchPlan]:
        return ProgressBar(
            rest,
            f"epoch {self.progress.epoch} of {self.training.max_epochs}",
            batches,
            initial=self.progress.batches_done,
            unit="batch",
            leave=False,
            disable=not distributed.is_writer(),
        )

    def image_request(self, batch: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
        """Image numbers and flips: the pairs' images, then, where the objective wants them, the drawn neighbors'."""
        image = self.data.images.of_pair
        if not self.objective.with_neighbor_images:
            return image[batch.rows], batch.flips
        numbers = np.concatenate([image[batch.rows], image[batch.positives]])
        return numbers, np.concatenate([batch.flips, batch.neighbor_flips])

    def terms(self, batch: BatchPlan, images: Tensor) -> dict[str, Tensor]:
        """The terms of the loss on one batch, by name.

        images: those of `image_request`, of this process's share. Each process encodes its share. The embeddings are
        then joined, and every process computes the loss of the whole batch.
        """
        tokens, lengths = self.data.read.texts(self.objective.text_rows(own_share(batch)))
        sizes, has_residuals = distributed.shares(len(batch.rows)), isinstance(self.model, PVSE)
        options: dict[str, Any] = {"residuals": True} if has_residuals else {}
        if self.training.passes == "two" and self.model.images.trainable and self.objective.with_neighbor_images:
            options["passes"] = 2
        with autocast(self.training.precision, self.device):
            encoded = self.parallel(images, to_device(tokens, self.device), lengths, **options)
        of_images, of_texts = encoded if has_residuals else ((encoded[0],), (encoded[1],))
        (x, *x_residuals), (y, *y_residuals) = (
            [distributed.gather_with_gradient(z, sizes) for z in of_stream] for of_stream in (of_images, of_texts)
        )
        return self.objective(x, y, self.objective_batch(batch), (*x_residuals, *y_residuals))

    def objective_batch(self, batch: BatchPlan) -> ObjectiveBatch:
        """What the objective has to know of a batch, the images that were lost included."""
        ids = self.data.image_ids
        self.lost.share()
        readable: list[Tensor | None] = [None, None]
        if len(self.lost):
            of_pair = self.data.images.of_pair
            masks = (self.lost.are_readable(of_pair[rows]) for rows in (batch.rows, batch.positives))
            readable = [to_device(mask, self.device) for mask in masks]
        return ObjectiveBatch(
            rows=batch.rows,
            text_rows=self.objective.text_rows(batch),
            image_ids=to_device(ids[batch.rows], self.device),
            neighbors=batch.neighbors,
            positive_ids=to_device(ids[batch.positives], self.device),
            readable=readable[0],
            neighbor_readable=readable[1],
        )

    # What is logged

    def demand_finite(self, board: SummaryWriter) -> None:
        """Raise UserError where a loss since the last call was NaN or infinite. Its batch is saved in the run's folder.

        Reading a loss makes a GPU wait, so several steps are checked together.
        """
        unchecked, self.unchecked = self.unchecked, []
        for step, batch, terms in unchecked:
            values = {name: value.item() for name, value in terms.items()}
            if np.isfinite(list(values.values())).all():
                continue
            path = Path("non_finite_batch.json")
            if distributed.is_writer():
                path = Path(board.log_dir) / path
                losses = {name: str(value) for name, value in values.items()}
                record = {"epoch": self.progress.epoch, "step": step, "losses": losses}
                write_json(path, record | {"pairs": batch.rows.tolist(), "neighbors": batch.neighbors.tolist()})
            raise distributed.Shared(
                f"a loss of step {step} is NaN or infinite; the batch's pairs are in {path}; look at them, lower "
                "training.learning_rate, and train anew with --overwrite"
            )

    def _log(self, board: SummaryWriter, batch: BatchPlan, terms: dict[str, Tensor]) -> None:
        """The authors' tags, and a warning where no triplet of the batch has a gradient."""
        step = self.progress.step
        board.add_scalar("data/train_loss", self.objective.total(terms).item(), step)
        for name, value in terms.items():
            board.add_scalar(f"data/{name}", value.item(), step)
        if hint := self.objective.hint_if_inactive(terms, self.data.image_ids[batch.rows]):
            ProgressBar.write(
                f"warning: no triplet of the batch of step {step} is active, nothing is learned from it; {hint}"
            )

    # Validation

    def validate(self, board: SummaryWriter) -> bool:
        """Measure the validation split; True where `training.select` is better than in every epoch before.

        That figure drives schedule and early stop. With several processes one computes it for all.
        """
        validation = distributed.by_writer(lambda: self._validation(board))
        progress = self.progress
        progress.batches_done = 0
        recall = sum(next(iter(validation.measured.values())).values()) / 2
        by_recall = self.training.select == "val_recall"
        is_better = recall > progress.best_recall if by_recall else validation.loss < progress.best_loss
        improved = progress.epoch > 0 and (is_better or not progress.best_epoch)
        if improved:
            progress.best_loss, progress.best_recall = validation.loss, recall
            progress.best_epoch = progress.epoch
        if progress.epoch:
            self.schedule.step(-recall if by_recall else validation.loss)
        self.last_validation = f"epoch {progress.epoch:3d}  {validation}{' *' if improved else ''}"
        return improved

    def _validation(self, board: SummaryWriter) -> Validation:
        rows, progress = self.val_rows, self.progress
        x, y = embed_pairs(
            self.model, self.data, self.images, rows, self.embedded_at_once, self.training.precision, self.device
        )
        self.lost.warn()
        if len(self.lost):
            readable = self.lost.are_readable(self.data.images.of_pair[rows])
            rows, x, y = rows[readable], x[torch.from_numpy(readable)], y[torch.from_numpy(readable)]
        ids = torch.from_numpy(self.data.image_ids[rows]).to(self.device)
        loss = validation_loss(self.objective, x, y, rows, ids, self.training.batch_size)
        if not np.isfinite(loss):
            raise UserError(f"the validation loss is {loss} after epoch {progress.epoch}; lower training.learning_rate")
        scalars = {"data/val_loss": loss, "data/learning_rate": self.optimizer.param_groups[0]["lr"]}
        scalars |= {"data/epoch": progress.epoch, "data/unreadable_images": len(self.lost)}
        values = measure(self.metrics, x, y, rows, self.data)
        measured: dict[str, dict[str, float]] = {}
        for metric in self.metrics:
            measured.setdefault(metric.label, {})[metric.direction] = values[metric.name]
            scalars[f"val/{metric.name}"] = values[metric.name]
        for tag, value in scalars.items():
            board.add_scalar(tag, value, progress.step)
        if self.show:
            self.show(board, rows, x, y, epoch=progress.epoch, step=progress.step)
        return Validation(loss, measured)


def build_trainer(
    settings: Settings,
    weights: Weights,
    data: Prepared,
    model: TwoStream,
    images: ImageSource,
    device: torch.device,
    show: ShowValidation | None = None,
) -> Trainer:
    """The trainer of these settings and loss weights. Warns where the validation split is too small for k-way."""
    images_of_val = len(np.unique(data.image_ids[data.rows["val"]]))
    wanted = list(dict.fromkeys([settings.training.select_k, *settings.evaluation.kway]))
    measured = [min(k, images_of_val) for k in wanted]
    for k in wanted:
        if k > images_of_val:
            print(
                f"warning: val has {images_of_val} images: an epoch's Recall@1 is {images_of_val}-way and not {k}-way"
            )
    evaluation = settings.evaluation.model_copy(update={"kway": list(dict.fromkeys(measured))})
    return Trainer(
        settings.training,
        build_objective(settings, weights, data, device),
        model,
        images,
        data,
        device,
        seed=settings.seed,
        metrics=[metric for metric in registered(evaluation).values() if metric.every_epoch],
        embedded_at_once=settings.evaluation.batch_size,
        show=show,
    )
