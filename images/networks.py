"""Networks for images by name from timm and open_clip, and how their images are resized.

Both state with their weights a mean and a deviation of the pixels, a size and an interpolation. These are taken. Their
cropping is not: images are resized without it (paper, Sec. 3.3).
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.errors import UserError, reason
from pipeline.schema import ImageEncoder


class Network(NamedTuple):
    """A network that ends in a linear classifier, and how its pixels are normalised."""

    module: nn.Module
    mean: tuple[float, float, float]
    """Of red, green and blue in [0, 1]."""
    std: tuple[float, float, float]
    classifiers: tuple[str, ...] | None = None
    """Names of the layers of which a file may hold others; None for the last linear layer."""
    without_classifier: Callable[[], int] | None = None
    """Takes the classifier off and returns the number of features; None where the last linear layer is to go."""


class Input(NamedTuple):
    """How the images of a backbone are resized."""

    size: int
    """Pixels of a side."""
    interpolation: str = "bilinear"
    """`bilinear`, `bicubic` and the like: a name of Pillow's, in lower case."""


class Library(NamedTuple):
    """A library of backbones, by functions of what stands behind the colon in their names."""

    network: Callable[[str, str], Network]
    """From the name and `model.image.weights`."""
    stated_input: Callable[[str], Input]


def _imported(package: str, backbone: str) -> Any:
    """A library. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"model.image.backbone {backbone} needs the package {error.name}; install it with "
            "pip install -r requirements-encoders.txt"
        ) from None


def _built(build: Callable[[], nn.Module], backbone: str) -> nn.Module:
    """What `build` returns, in float32 on the CPU. Raises UserError where weights cannot be downloaded."""
    try:
        return build().float()
    except Exception as error:  # no connection, no such weights: the libraries and the hub raise many kinds
        raise UserError(
            f"cannot get the pretrained weights of model.image.backbone {backbone} ({reason(error, 200)}); set "
            "model.image.weights to a file's path or to none"
        ) from None


def _timm_config(name: str) -> Mapping[str, Any]:
    timm = _imported("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise UserError(f"model.image.backbone timm:{name} is no model of timm; timm.list_models() lists them")
    config = timm.get_pretrained_cfg(name)
    return config.to_dict() if config else {}


def _timm_input(name: str) -> Input:
    config = _timm_config(name)
    return Input(int(config.get("input_size", (3, 224, 224))[-1]), config.get("interpolation") or "bicubic")


def _timm_network(name: str, weights: str) -> Network:
    config, timm = _timm_config(name), _imported("timm", f"timm:{name}")
    module: Any = _built(lambda: timm.create_model(name, pretrained=weights == "imagenet"), f"timm:{name}")
    named = config.get("classifier") or ()

    def without_classifier() -> int:
        module.reset_classifier(0)
        return int(getattr(module, "head_hidden_size", None) or module.num_features)

    mean, std = config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
    classifiers = (named,) if isinstance(named, str) else tuple(named)
    return Network(module, tuple(mean), tuple(std), classifiers, without_classifier)


def _open_clip_config(name: str) -> tuple[str, str, Mapping[str, Any], Mapping[str, Any]]:
    """Model, name of its pretrained weights, the configuration of its vision tower, and that of these weights."""
    open_clip = _imported("open_clip", f"open_clip:{name}")
    model, _, tag = name.partition("/")
    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(
            f"model.image.backbone open_clip:{model} is no model of open_clip; open_clip.list_models() lists them"
        )
    if tag and tag not in open_clip.list_pretrained_tags_by_model(model):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise UserError(f"model.image.backbone open_clip:{name}: there are no weights {tag} of {model}, but {tags}")
    return model, tag, config["vision_cfg"], (open_clip.get_pretrained_cfg(model, tag) if tag else {})


def _open_clip_input(name: str) -> Input:
    _, _, vision, config = _open_clip_config(name)
    size = vision.get("image_size", 224)
    return Input(int(size if isinstance(size, int) else size[0]), config.get("interpolation") or "bicubic")


def _open_clip_network(name: str, weights: str) -> Network:
    model, tag, _, config = _open_clip_config(name)
    open_clip = _imported("open_clip", f"open_clip:{name}")
    if weights == "imagenet" and not tag:
        raise UserError(
            f"model.image.backbone open_clip:{name} names no pretrained weights; name some, as in "
            "open_clip:ViT-B-32/laion2b_s34b_b79k, or set model.image.weights to a file's path or to none"
        )
    wanted = tag if weights == "imagenet" else None
    module: Any = _built(lambda: open_clip.create_model(model, pretrained=wanted).visual, f"open_clip:{name}")
    size = _open_clip_input(name).size

    @torch.no_grad()
    def without_classifier() -> int:  # it has none
        pooled = module.eval()(torch.zeros(1, 3, size, size))
        return int((pooled[0] if isinstance(pooled, tuple) else pooled).shape[1])

    mean, std = config.get("mean") or open_clip.OPENAI_DATASET_MEAN, config.get("std") or open_clip.OPENAI_DATASET_STD
    return Network(module, tuple(mean), tuple(std), (), without_classifier)


LIBRARIES = {"timm": Library(_timm_network, _timm_input), "open_clip": Library(_open_clip_network, _open_clip_input)}
"""Libraries of backbones, by what stands before the colon."""


@functools.cache
def stated_input(name: str) -> Input:
    """How a backbone's images are resized, as its library states it; 224, bilinear where there is none."""
    library, _, named = name.rpartition(":")
    return LIBRARIES[library].stated_input(named) if library in LIBRARIES else Input(224)


def input_of(encoder: ImageEncoder) -> Input:
    """How images are resized: to `model.image.size`, where that is null to the backbone's own."""
    stated = stated_input(encoder.backbone)
    return stated._replace(size=encoder.size or stated.size)


def size_warning(encoder: ImageEncoder) -> str:
    """That a library's weights were trained on images of another size; empty where they were not, or none are taken."""
    stated = stated_input(encoder.backbone)
    if encoder.backbone.partition(":")[0] not in LIBRARIES or encoder.weights == "none" or input_of(encoder) == stated:
        return ""
    return (
        f"warning: model.image.backbone {encoder.backbone} was trained on images of {stated.size} x {stated.size}, and "
        f"model.image.size is {encoder.size}; null takes its own"
    )
