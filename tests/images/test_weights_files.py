"""`model.image.weights` as their publishers wrap them."""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from images.backbones import Backbone
from pipeline.errors import UserError

torch.manual_seed(0)
MODEL = torchvision.models.resnet18(num_classes=365)
STATE = MODEL.state_dict()
OLD = OrderedDict((name, value) for name, value in STATE.items() if not name.endswith("num_batches_tracked"))


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


WRAPPED: dict[str, Any] = {
    "places": {"epoch": 90, "arch": "resnet18", "state_dict": prefixed("module."), "best_prec1": torch.tensor(54.1)},
    "without counters": OLD,
    "with options": {"model": STATE, "args": argparse.Namespace(lr=0.1)},
    "model_state_dict": {"model_state_dict": STATE},
    "ema": {"model_ema": STATE, "epoch": 3},
    "without a classifier": {f"backbone.{name}": value for name, value in STATE.items() if "fc." not in name},
    "momentum encoder": prefixed("module.encoder_q."),
    "numpy scalar": {"state_dict": STATE, "best": np.float64(3.2)},
    "half": {name: value.half() if value.is_floating_point() else value for name, value in STATE.items()},
}


def same(path: Path, change: Callable[[torch.Tensor], torch.Tensor] = lambda value: value) -> bool:
    own = Backbone("resnet18", str(path)).network.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    return len(names) > 90 and all(torch.equal(own[name], change(STATE[name])) for name in names)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_are_found(tmp_path: Path, name: str) -> None:
    torch.save(WRAPPED[name], tmp_path / "weights.pth")
    assert same(
        tmp_path / "weights.pth", (lambda value: value.half().float()) if name == "half" else lambda value: value
    )


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "model.safetensors")
    assert same(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MODEL, "holds torchvision.models.resnet.ResNet, which is code and is not loaded"),
        ({"epoch": 3}, "holds no weights by name"),
        ({**STATE, "conv1.weight": torch.zeros(3)}, "size mismatch"),
        ({"other.weight": torch.zeros(3)}, "does not fit this backbone"),
    ],
)
def test_what_holds_no_weights_ends_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as error:
        Backbone("resnet18", str(tmp_path / "weights.pth"))
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text and "trust" not in text and "weights_only" not in text


@pytest.mark.filterwarnings("ignore")  # torch's, of what it calls deprecated
def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="it is a TorchScript program, which is code and is not loaded"):
        Backbone("resnet18", str(path))
