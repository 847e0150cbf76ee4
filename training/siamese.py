"""The siamese text network that says how alike two texts are, and what it is trained and measured on.

Both texts pass through one encoder.

- From the abstract of Xu et al. (ICCS 2019): the network compares an example's text with the text of its image.
- From Yu et al. 2018 and Ktena et al. (MICCAI 2017), on whom they build: a graph convolution over words as the encoder,
  and a linear layer on the element-wise product of both sides.
- Ours: both sides are unit vectors, and the layer starts as a multiple of their cosine. All pairs of a minibatch are
  compared. Alike and unlike pairs have the same total weight. A sigmoid gives the probability.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import NeighborTable, Prepared
from models import seeded
from pipeline.errors import UserError
from pipeline.progress import ProgressBar
from pipeline.registry import TEXT_ENCODERS
from pipeline.schema import Settings, Siamese, TextEncoder
from text_space.neighbors import exact_neighbors
from text_space.points import on_sphere
from training.embedding import embed_texts
from training.fine_grained import Relevance, likeness

FIRST_SCALE = 10.0  # of the cosine, with a bias of -5: the first logits lie between -15 and 5


class SiameseNetwork(nn.Module):
    """One text encoder for both sides, and the weights of their comparison."""

    def __init__(self, settings: Siamese, text: TextEncoder, word_vectors: np.ndarray) -> None:
        super().__init__()
        text = text.model_copy(update={"encoder": settings.encoder, "dropout": settings.dropout})
        self.encoder = TEXT_ENCODERS.load(settings.encoder)(text, word_vectors, settings.dimensions)
        self.comparison = nn.Parameter(torch.full((settings.dimensions + 1,), FIRST_SCALE))
        with torch.no_grad():
            self.comparison[-1] = -FIRST_SCALE / 2


def build_network(settings: Siamese, text: TextEncoder, word_vectors: np.ndarray, seed: int) -> SiameseNetwork:
    """The network, initialised by `seed`. `text` is the section `model.text`; word_vectors: (V, E)."""
    with seeded(seed):
        return SiameseNetwork(settings, text, word_vectors)


# Training


def balanced_loss(logits: Tensor, alike: Tensor, unlike: Tensor) -> Tensor:
    """Mean of the cross-entropies of the alike and of the unlike pairs, a scalar. A kind without pairs counts 0.

    logits: (A, B), alike, unlike: (A, B) bool, disjoint.
    """
    signed = torch.stack([-logits, logits])
    examples = torch.stack([alike, unlike])
    losses = (F.softplus(signed) * examples).sum(dim=(1, 2)) / examples.sum(dim=(1, 2)).clamp(min=1)
    return losses.mean()


def train_network(
    network: SiameseNetwork,
    data: Prepared,
    relevance: Relevance,
    neighbors: NeighborTable | None,
    val: "HeldOut",
    settings: Siamese,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Train on all pairs of each minibatch of train texts, and keep the epoch with the lowest loss on `val`.

    With `neighbors`, a minibatch also has a drawn neighbor of each of its texts. Returns figures on the training.
    """
    rows = data.rows["train"]
    optimizer = torch.optim.Adam(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    best_loss, best_epoch, best = float("inf"), 0, copy.deepcopy(network.state_dict())
    epoch = 0
    while epoch < settings.max_epochs and epoch - best_epoch < settings.stop_patience:
        epoch += 1
        rng = np.random.default_rng([seed, epoch])
        torch.manual_seed(np.random.SeedSequence([seed, epoch]).generate_state(1)[0].item())  # dropout
        order = rng.permutation(len(rows))
        drawn = neighbors.draw(order, rng) if neighbors else np.full(len(rows), -1)
        network.train()
        starts = range(0, len(rows), settings.batch_size)
        for start in ProgressBar(starts, desc=f"siamese epoch {epoch}", unit="batch", leave=False):
            part = slice(start, start + settings.batch_size)
            texts = np.concatenate([rows[order[part]], drawn[part][drawn[part] >= 0]])
            alike, unlike = (torch.from_numpy(mask).to(device) for mask in relevance.alike(texts, texts))
            tokens, lengths = data.texts(texts)
            vectors = network.encoder(tokens.to(device), lengths)
            loss = balanced_loss(likeness(vectors, vectors, network.comparison), alike, unlike)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        val_loss = val.loss(network, data, settings.batch_size, device)
        if not np.isfinite(val_loss):
            raise UserError(f"the validation loss is {val_loss} after epoch {epoch}; lower siamese.learning_rate")
        if val_loss < best_loss:
            best_loss, best_epoch, best = val_loss, epoch, copy.deepcopy(network.state_dict())
        ProgressBar.write(f"epoch {epoch:3d}  val loss {val_loss:.4f}{' *' if best_epoch == epoch else ''}")
    network.load_state_dict(best)
    return {"epochs": epoch, "best_epoch": best_epoch, "best_val_loss": best_loss}


# Measuring


@dataclass
class HeldOut:
    """All pairs of R texts of a split."""

    rows: np.ndarray
    """(R,) pair numbers, ascending."""
    alike: np.ndarray
    """(R, R) bool."""
    unlike: np.ndarray
    """(R, R) bool."""

    def loss(self, network: SiameseNetwork, data: Prepared, size: int, device: torch.device) -> float:
        """The network's `balanced_loss`, `size` texts embedded at a time."""
        vectors = embed_texts(network.encoder, data, self.rows, size, "float32", device)
        logits = self.logits(network, vectors.cpu())
        return balanced_loss(logits, torch.from_numpy(self.alike), torch.from_numpy(self.unlike)).item()

    @staticmethod
    @torch.no_grad()
    def logits(network: SiameseNetwork, vectors: Tensor) -> Tensor:
        """(R, R) of vectors (R, D)."""
        return likeness(vectors, vectors, network.comparison.detach().cpu())


def held_out(split: str, data: Prepared, relevance: Relevance, vectors: np.ndarray, settings: Settings) -> HeldOut:
    """All pairs of at most `siamese.held_out_texts` texts of a split, drawn by `seed`.

    Where neighbors make texts alike, they are looked up among these texts in Omega (vectors: (N, d)). Their number is
    the same share of these texts as `neighbors.k` is of the train texts. Raises UserError where no two texts are alike,
    or all are.
    """
    rows = data.rows[split]
    if len(rows) > settings.siamese.held_out_texts:
        rng = np.random.default_rng(settings.seed)
        rows = np.sort(rng.choice(rows, settings.siamese.held_out_texts, replace=False))
    if relevance.neighbors is not None:
        points = np.array(vectors[rows], dtype=np.float32)
        if settings.neighbors.distance == "cosine":
            points = on_sphere(points)
        k = max(round(settings.neighbors.k * len(rows) / len(data.rows["train"])), 1)
        positions = exact_neighbors(points, np.arange(len(rows)), k, (data.image_ids[rows],)).positions
        table = np.where(positions >= 0, rows[positions], -1)
        relevance = Relevance(relevance.image_ids, relevance.categories, rows, table)
    alike, unlike = relevance.alike(rows, rows)
    if not alike.any() or not unlike.any():
        what = "is like another one" if not alike.any() else "is unlike another one"
        raise UserError(f"no text of split {split} {what}; set siamese.relevance, or get more pairs")
    return HeldOut(rows, alike, unlike)


def balanced_accuracy(scores: np.ndarray, alike: np.ndarray, unlike: np.ndarray, threshold: float) -> float:
    """Mean of two shares: alike pairs above the threshold, and unlike pairs not above it.

    scores, alike, unlike: of one shape. Guessing gives 0.5, whatever the share of alike pairs. NaN without one kind.
    """
    if not alike.any() or not unlike.any():
        return float("nan")
    above = scores > threshold
    return float((above[alike].mean() + (~above[unlike]).mean()) / 2)


def best_threshold(scores: np.ndarray, alike: np.ndarray, unlike: np.ndarray) -> float:
    """The score that is the best threshold for `balanced_accuracy`, the lowest where several are."""
    values = np.sort(scores[alike | unlike])
    right = 1 - np.searchsorted(np.sort(scores[alike]), values, side="right") / alike.sum()
    right += np.searchsorted(np.sort(scores[unlike]), values, side="right") / unlike.sum()
    return float(values[right.argmax()])


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Cosines (R, R) of vectors (R, d), float32."""
    unit = on_sphere(vectors)
    return unit @ unit.T


def measure(
    scores: np.ndarray, threshold: float, pairs: HeldOut, categories: np.ndarray, names: list[str]
) -> dict[str, float | dict[str, float]]:
    """Balanced accuracy over all pairs and, by category, over those whose first text has it.

    scores: (R, R); categories: (N,) numbers in `names`, -1 for none.
    """
    of_rows = categories[pairs.rows]
    by_category = {
        name: balanced_accuracy(
            scores[of_rows == number], pairs.alike[of_rows == number], pairs.unlike[of_rows == number], threshold
        )
        for number, name in enumerate(names)
    }
    return {
        "accuracy": balanced_accuracy(scores, pairs.alike, pairs.unlike, threshold),
        "threshold": threshold,
        "accuracy_by_category": {name: value for name, value in by_category.items() if not np.isnan(value)},
    }
