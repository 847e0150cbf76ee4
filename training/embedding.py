"""Images and texts through the model, in batches, in eval mode."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from datasets import Prepared, TextInputs
from images.loading import ImageSource
from models import TwoStream
from pipeline.devices import autocast
from pipeline.progress import ProgressBar


def embed_pairs(
    model: TwoStream,
    data: Prepared,
    images: ImageSource,
    rows: np.ndarray,
    size: int,
    precision: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Embeddings (R, D), or (R, K, D) of PVSE, float32, of the images and texts of the pairs `rows`.

    An image that several pairs share is embedded once, and so are texts of the same words: their rows are equal to the
    last bit, and a tie stays a tie. An image that cannot be read is in `images.unreadable` afterwards, and its
    embedding means nothing. size: images or texts in a batch. precision: `training.precision`.
    """
    numbers, image_of_row = np.unique(data.images.of_pair[rows], return_inverse=True)
    x = encode_images(model.eval().images, images, numbers, size, precision, device)
    y = embed_texts(model.texts, data.read, rows, size, precision, device)
    return x[torch.from_numpy(image_of_row).to(device)], y


@torch.no_grad()
def encode_images(
    encode: Callable[[Tensor], Tensor],
    images: ImageSource,
    numbers: np.ndarray,
    size: int,
    precision: str,
    device: torch.device,
) -> Tensor:
    """What `encode` gives, (R, ...), for the images `numbers` (R,), `size` in a batch."""
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    batches = images.batches([(part, np.zeros(len(part), dtype=bool)) for part in parts])
    x = []
    for batch in ProgressBar(batches, total=len(parts), desc="images", unit="batch", leave=False):
        with autocast(precision, device):
            x.append(encode(batch))
    return torch.cat(x)


@torch.no_grad()
def embed_texts(
    encoder: nn.Module, data: TextInputs, rows: np.ndarray, size: int, precision: str, device: torch.device
) -> Tensor:
    """Embeddings (R, D), or (R, K, D) of PVSE, float32, of the texts `rows` (R,), each with a word, `size` in a batch.

    `encoder` is a text encoder, from words (B, L) and lengths (B,), or from vectors (B, F). Equal texts are encoded
    once.
    """
    encoder.eval()
    first, of_row = distinct_texts(data, rows)
    rows = rows[first]
    # Texts of like length share a batch, which leaves little padding.
    by_length = np.argsort(data.lengths(rows), kind="stable")
    y = []
    for start in ProgressBar(range(0, len(rows), size), desc="texts", unit="batch", leave=False):
        tokens, lengths = data.texts(rows[by_length[start : start + size]])
        with autocast(precision, device):
            y.append(encoder(tokens.to(device), lengths))
    in_order = np.argsort(by_length)[of_row]
    return torch.cat(y)[torch.from_numpy(in_order).to(device)]


def distinct_texts(data: TextInputs, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct texts among `rows` (R,), as the model reads them.

    Returns the place in `rows` of the first of each (U,), ascending, and the number of each row's text (R,).
    """
    places: dict[bytes, int] = {}
    first: list[int] = []
    of_row = np.empty(len(rows), dtype=np.int64)
    for place, content in enumerate(data.contents(rows)):
        of_row[place] = number = places.setdefault(content, len(first))
        if number == len(first):
            first.append(place)
    return np.array(first, dtype=np.int64), of_row
