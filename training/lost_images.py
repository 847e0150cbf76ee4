"""Images that were readable when the dataset was prepared and no longer are: warned of, counted, left out."""

import numpy as np

from images.loading import ImageSource, demand_readable
from pipeline.output import in_one_line
from pipeline.progress import ProgressBar
from training import distributed


class LostImages:
    """What a source of images could not read.

    Args:
        images: the source, which fills its `unreadable` as it reads.
        count: images of the dataset.
        max_share: `training.max_unreadable_share`.
    """

    def __init__(self, images: ImageSource, count: int, max_share: float) -> None:
        self.images, self.count, self.max_share = images, count, max_share
        self.warned_of: set[int] = set()

    def __len__(self) -> int:
        return len(self.images.unreadable)

    def warn(self) -> None:
        """Name the images that were lost since the last call. Raises UserError where they are too many."""
        for number in sorted(self.images.unreadable.keys() - self.warned_of):
            why = in_one_line(self.images.unreadable[number])
            ProgressBar.write(f"warning: {why}; its pairs are left out of the loss")
            self.warned_of.add(number)
        demand_readable(self.images.unreadable, self.count, self.max_share)

    def share(self) -> None:
        """Tell all processes which images one of them could not read, and `warn`. All processes call it together."""
        if not any(distributed.reduce_max(len(self.images.unreadable) > len(self.warned_of))):
            return
        if distributed.processes() > 1:
            found = distributed.gather_objects(dict(self.images.unreadable))
            self.images.unreadable = {number: why for one in found for number, why in one.items()}
        distributed.all_or_none(self.warn)

    def are_readable(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the image numbers (B,) could be read so far: (B,) bool."""
        return ~np.isin(numbers, list(self.images.unreadable))
