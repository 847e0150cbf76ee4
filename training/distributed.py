"""Several processes that train one model together, started by torchrun, on one machine or several.

Each encodes its share of every minibatch, and all compute the loss of the whole batch. The process of rank 0, the
writer, alone writes and prints. In a single process every function here is the identity and sends nothing.
"""

import contextlib
import datetime
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import Stopped, UserError

T = TypeVar("T")

LONGEST_WAIT = datetime.timedelta(days=7)
"""How long a process waits for the writer, which computes features and validates. torchrun ends all when one dies."""


class Shared(UserError):
    """A UserError that all processes raise together, so that the writer can say it for all."""


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Connect the processes, and let only the writer print.

    An error is raised further, so that the script says it. Where all processes have the same one, only the writer does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    # CPU tensors go over gloo, so that a message does not make a GPU wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST_WAIT)
    writer = is_writer()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if writer else nowhere):
            yield
    except (UserError, Stopped) as end:
        if writer or not isinstance(end, (Shared, Stopped)):
            raise
        sys.exit(128 + end.signal if isinstance(end, Stopped) else 2)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in ("by peer", "Broken pipe")):
            raise
        if writer:
            raise UserError("another process has ended; what it said is above; go on with --resume") from None
        sys.exit(1)
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def gpu() -> torch.device:
    """The GPU of this process. Raises UserError where the machine has fewer GPUs than processes."""
    if processes() == 1:
        return torch.device("cuda")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise UserError(f"torch sees {there} GPUs here; give torchrun --nproc_per_node={there}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


# Messages


def by_writer(action: Callable[[], T]) -> T:
    """Run `action` in the writer only. All processes return its result, or raise its UserError."""
    if processes() == 1:
        return action()
    message: list[Any] = [None, None]  # the result, the error
    if is_writer():
        try:
            message[0] = action()
        except UserError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message)
    if message[1] is not None:
        raise Shared(message[1])
    result: T = message[0]
    return result


def all_or_none(action: Callable[[], T]) -> T:
    """Run `action` in every process. A UserError of one is raised in all."""
    value: T | None = None
    mistake: UserError | None = None
    try:
        value = action()
    except UserError as error:
        mistake = error
    if messages := [message for message in gather_objects(mistake and str(mistake)) if message is not None]:
        raise mistake if mistake and processes() == 1 else Shared(messages[0])
    return cast(T, value)


def writer_first(action: Callable[[], T]) -> T:
    """Run `action` in the writer and then, when its files are written, in the other processes."""
    value = all_or_none(action if is_writer() else lambda: None)
    return cast(T, all_or_none(lambda: value if is_writer() else action()))


def gather_objects(value: T) -> list[T]:
    """The value of each process, by rank."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def reduce_max(*numbers: int) -> list[int]:
    """The maximum over processes of each number. A flag is a number too."""
    if processes() == 1:
        return list(numbers)
    together = torch.tensor([int(number) for number in numbers])
    dist.all_reduce(together, dist.ReduceOp.MAX)
    maxima: list[int] = together.tolist()
    return maxima


# Shares of a minibatch


def shares(count: int) -> list[int]:
    """How many of `count` pairs each process takes, by rank. They differ by one at most."""
    return [len(part) for part in np.array_split(np.arange(count), processes())]


def share(count: int) -> slice:
    """Which of `count` pairs this process takes."""
    sizes = shares(count)
    start = sum(sizes[: rank()])
    return slice(start, start + sizes[rank()])


class _Gather(torch.autograd.Function):
    """(B_r, …) of each process r, B_r = sizes[r], to (B, …) in all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])  # collectives need equal shapes
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every process computes the same loss and so has this gradient already. DistributedDataParallel takes the mean
        # of the parameters' gradients; the gradient of the joined batch is their sum.
        return gradient.split(ctx.sizes)[rank()] * len(ctx.sizes), None


def gather_with_gradient(x: Tensor, sizes: list[int]) -> Tensor:
    """Join the embeddings that the processes computed, in the order of the minibatch.

    DistributedDataParallel's averaged gradients are then those of one process with the whole batch.
    x: (k B_r, …), k blocks (pairs, neighbors) of B_r = sizes[rank] rows each. Returns (k B, …), B the
    sum of sizes, in blocks too.
    """
    if processes() == 1:
        return x
    blocks = x.unflatten(0, (-1, sizes[rank()])).transpose(0, 1)
    return _Gather.apply(blocks, sizes).transpose(0, 1).flatten(0, 1)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Replace the batch normalisation in a model by one over the minibatches of all processes."""
    if any(type(part).__module__.startswith("timm.") for part in model.modules()):
        from timm.layers import convert_sync_batchnorm  # its normalisation may hold the activation

        convert_sync_batchnorm(model)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: it is the children that are replaced


def parallel(model: nn.Module, device: torch.device, *, trainable_images: bool) -> nn.Module:
    """The model, wrapped so that all processes get the mean of their gradients.

    On GPUs trained batch normalisation is over the whole minibatch. PyTorch has none of that kind for CPUs: there it is
    over each process's share, and the running statistics are the writer's.
    """
    if processes() == 1:
        return model
    if trainable_images and device.type == "cuda":
        synchronise_batch_norm(model)
    # The auxiliary classifiers of Inception and GoogLeNet are in no loss.
    unused = any(getattr(part, "aux_logits", False) for part in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name that torch 2.6 does not know
        return nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=trainable_images and unused
        )
