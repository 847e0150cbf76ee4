"""Where tensors are and how exactly they are multiplied. Training, evaluation and search share these."""

import os

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device. Copies from unpinned memory block until queued kernels finish, so memory is pinned."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def choose_device(name: str) -> torch.device:
    """The device that `training.device` names: auto, cpu or cuda. Raises UserError where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, and torch sees no GPU; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def use_precision(precision: str) -> None:
    """Allow TF32 products on a GPU for `tf32` only; torch's default allows them in convolutions and RNNs."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def be_deterministic(deterministic: bool) -> None:
    """Make torch compute the same result from the same input, where `deterministic` is set."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else PyTorch fills every new tensor with NaN first, a quarter of a step of a small model. Nothing here reads a
        # tensor before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of `training.precision`: bfloat16 for `bf16`, else none."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
