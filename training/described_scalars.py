"""TensorBoard scalars with a description, which TensorBoard shows beside the curve."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter

from metrics import Metric

DESCRIPTIONS = {
    "data/train_loss": "Weighted sum of the loss terms on a train batch (Eq. 8).",
    "data/l_i2t": "N-pairs loss, image to text (Eq. 3), weight 1.",
    "data/l_sym": "N-pairs loss, text to image (Eq. 4), weight SYM.",
    "data/l_img": "L_img: images of neighboring texts (Eq. 7), weight IMG.",
    "data/l_text": "L_text: neighboring texts (Eq. 6), weight TEXT.",
    "data/val_loss": "Loss of the val split, each term with weight 1. It drives schedule, early stop and best.pt.",
    "data/learning_rate": "Adam's learning rate in the epoch.",
    "data/epoch": "The epoch that ends at this step.",
    "data/unreadable_images": "Images that could not be read so far. The losses mask them.",
    "speed/pairs_a_second": "Train pairs a second, of the epoch.",
}
"""By tag. A metric describes itself."""


class Board(SummaryWriter):
    """A TensorBoard writer in a run's folder whose scalars have descriptions.

    Args:
        run: the run's folder.
        metrics: the metrics that are written, of `split`.
        settings: those of torch's writer.
    """

    def __init__(self, run: Path, metrics: Iterable[Metric] = (), split: str = "val", **settings: Any) -> None:
        super().__init__(str(run), **settings)
        better = {True: "higher", False: "lower"}
        self.descriptions = DESCRIPTIONS | {
            f"{split}/{metric.name}": (
                f"{metric.title}, of the {split} split; {better[metric.higher_is_better]} is better."
            )
            for metric in metrics
        }

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None, *_: Any, **__: Any) -> None:
        """Write a scalar with its description."""
        metadata = SummaryMetadata(summary_description=self.descriptions.get(tag, ""))
        value = Summary.Value(tag=tag, simple_value=float(scalar_value), metadata=metadata)
        self._get_file_writer().add_summary(Summary(value=[value]), global_step)
