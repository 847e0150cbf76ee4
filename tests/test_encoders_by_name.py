"""Image backbones of timm and open_clip, of random weights, and features that users bring in a file."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, one_line_error, run_script
from PIL import Image

import encode
import evaluate
import train_cross_modal_retrieval_model as training
from images.backbones import Backbone, pretrained_digest
from images.files import load_image
from images.networks import Input, input_of, size_warning
from pipeline.errors import UserError
from pipeline.files import read_array, read_json
from pipeline.pairs import load_images
from pipeline.schema import ImageEncoder
from training.distributed import synchronise_batch_norm
from training.encoder import RunEncoder
from training.image_sources import weights_digest

VIT, CONVOLUTIONAL = "vit_tiny_patch16_224", "mobilenetv3_small_050"
PIXELS = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture
def open_clip(tmp_path: Path) -> Any:
    """open_clip with a small model `tiny`, whose images have 48 x 48 pixels."""
    library = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    vision = {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    library.add_model_config(tmp_path / "tiny.json")
    return library


@pytest.mark.parametrize("name", [VIT, CONVOLUTIONAL])
def test_a_backbone_of_timm_gives_what_timm_gives(timm: Any, tmp_path: Path, name: str) -> None:
    """With weights from a file, as timm saves them, and the mean and deviation that its configuration states."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    torch.save({"state_dict_ema": None, "state_dict": model.state_dict(), "epoch": 3}, tmp_path / "weights.pth.tar")
    backbone = Backbone(f"timm:{name}", str(tmp_path / "weights.pth.tar")).eval()
    config = timm.data.resolve_model_data_config(model)
    normalised = PIXELS / 255 - torch.tensor(config["mean"])[:, None, None]
    normalised = normalised / torch.tensor(config["std"])[:, None, None]
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(normalised), pre_logits=True)
        torch.testing.assert_close(backbone(PIXELS), expected, atol=1e-4, rtol=1e-4)
    assert expected.shape[1] == backbone.features
    assert config["mean"] == ((0.5, 0.5, 0.5) if name == VIT else (0.485, 0.456, 0.406))


def test_normalisation_over_processes_keeps_the_activations_of_timm(timm: Any) -> None:
    """timm's normalisation holds the activation that follows it."""
    backbone = Backbone(f"timm:{CONVOLUTIONAL}", "none").eval()
    with torch.no_grad():
        for part in backbone.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.bias.normal_(generator=torch.Generator().manual_seed(0))  # untrained, hardly anything is below 0
        expected = backbone(PIXELS)
        synchronise_batch_norm(backbone)
        torch.testing.assert_close(backbone(PIXELS), expected)
    assert any(isinstance(part, torch.nn.SyncBatchNorm) for part in backbone.modules())


def test_size_and_interpolation_are_those_that_the_library_states(timm: Any, open_clip: Any, tmp_path: Path) -> None:
    stated = {
        "timm:vit_base_patch16_384": Input(384, "bicubic"),
        "timm:resnet18.tv_in1k": Input(224, "bilinear"),
        "timm:mobilenetv3_small_050": Input(224, "bicubic"),
        "open_clip:ViT-B-32-quickgelu/openai": Input(224, "bicubic"),
        "open_clip:ViT-L-14-336/openai": Input(336, "bicubic"),
        "open_clip:tiny": Input(48, "bicubic"),
        "resnet50": Input(224, "bilinear"),
    }
    assert {name: input_of(ImageEncoder(backbone=name, size=None)) for name in stated} == stated
    other = ImageEncoder(backbone="open_clip:tiny", size=32, weights="a.pt")
    assert input_of(other) == Input(32, "bicubic")
    assert "was trained on images of 48 x 48, and model.image.size is 32" in size_warning(other)
    other.size = None
    assert not size_warning(other) and not size_warning(ImageEncoder(backbone="resnet50", size=32))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC)
    found = load_image(tmp_path / "image.png", 20, interpolation="bicubic")
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1
    assert np.abs(np.asarray(found).astype(int) - np.asarray(load_image(tmp_path / "image.png", 20))).max() > 3


@pytest.mark.parametrize(("name", "fits"), [("open_clip:tiny", 48), (f"timm:{VIT}", 224)])
def test_a_size_that_does_not_fit_is_told_beside_one_that_does(timm: Any, open_clip: Any, name: str, fits: int) -> None:
    backbone = Backbone(name, "none")
    backbone.demand_size(fits)
    with pytest.raises(UserError, match=f"model.image.size 96 does not fit .* such as {fits}"):
        backbone.demand_size(96)


def test_a_backbone_of_open_clip_gives_what_open_clip_gives(open_clip: Any, tmp_path: Path) -> None:
    """From a checkpoint of the whole model, text tower and all, in either format."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("tiny").eval()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "a.pt"
    )
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "a.safetensors")
    pixels = PIXELS[..., :48, :48]
    mean, std = (
        torch.tensor(one)[:, None, None] for one in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        expected = model.encode_image((pixels / 255 - mean) / std)
        for name in ("a.pt", "a.safetensors"):
            backbone = Backbone("open_clip:tiny", str(tmp_path / name)).eval()
            torch.testing.assert_close(backbone(pixels), expected, atol=1e-5, rtol=1e-4)
    assert backbone.features == 12


def test_pretrained_weights_of_a_library_are_part_of_a_runs_identity(
    timm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    build, digests = timm.create_model, set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: build(name))
        pretrained_digest.cache_clear()
        digests.add(weights_digest(ImageEncoder(backbone=f"timm:{CONVOLUTIONAL}")))
    assert len(digests) == 2
    pretrained_digest.cache_clear()


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        ("timm:resnet_none", "none", "is no model of timm"),
        ("open_clip:none", "none", "is no model of open_clip"),
        ("open_clip:ViT-B-32/none", "imagenet", "there are no weights none of ViT-B-32, but openai"),
        ("open_clip:ViT-B-32", "imagenet", "names no pretrained weights; name some"),
    ],
)
def test_a_name_that_a_library_does_not_know_ends_in_one_line(
    timm: Any, open_clip: Any, backbone: str, weights: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        Backbone(backbone, weights)
    assert "model.image.backbone" in str(error.value) and "\n" not in str(error.value)


def test_weights_that_cannot_be_downloaded_end_in_one_line(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no\nconnection")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"model.image.backbone timm:\w+ \(no connection\); set model.image.w"):
        Backbone(f"timm:{CONVOLUTIONAL}", "imagenet")


@pytest.mark.parametrize(("library", "package"), [("timm", "timm"), ("open_clip", "open_clip")])
def test_without_the_library_one_line_names_what_to_install(
    library: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        Backbone(f"{library}:anything", "none")
    message = str(error.value)
    assert "model.image.backbone" in message and "pip install -r requirements-encoders.txt" in message


def test_a_backbone_of_a_library_is_trained_evaluated_and_encodes(timm: Any, prepared: Path) -> None:
    backbone = ["--model.image.backbone", f"timm:{CONVOLUTIONAL}", "--model.image.weights", "none"]
    run = training.main(["1", "0", "0", *TINY, "--work", str(prepared), *backbone, "--training.max_epochs", "1"])
    assert len(read_json(run / "inputs.json")["model.image.backbone"]) == 4  # none
    evaluate.main(["--run", str(run)])
    images = load_images(prepared)
    vectors, problems = RunEncoder(run).images([images.root / images.paths[0]])
    assert not problems and np.isfinite(vectors).all()


def given(work: Path, folder: Path) -> tuple[Path, np.ndarray]:
    """A file with features for every image, in another order than the dataset's."""
    images = load_images(work)
    features = np.random.default_rng(0).normal(size=(len(images.paths), 5)).astype(np.float32)
    order = np.random.default_rng(1).permutation(len(features))
    folder.mkdir(exist_ok=True)
    np.save(folder / "features.npy", features[order])
    named = [images.paths[number] for number in order]
    named[1] = str(images.root.absolute() / named[1])
    named[2] = os.path.relpath(images.root / named[2], folder)
    (folder / "images.txt").write_text("\n".join(named) + "\n")
    return folder / "features.npy", features


def test_features_in_a_file_take_the_backbones_place(prepared: Path, tmp_path: Path) -> None:
    """In training, evaluation, search by text and the images' space; a new image has a problem and no vector."""
    path, features = given(prepared, tmp_path / "own")
    words = [*TINY, "--work", str(prepared), "--model.image.backbone", f"features:{path}"]
    run_script("extract_image_features.py", *words)
    of_pair = load_images(prepared).of_pair
    np.testing.assert_array_equal(read_array(prepared / "image_features" / "vectors.npy"), features[of_pair])
    run = training.main(["1", "0", "0", *words, "--training.max_epochs", "1"])
    assert torch.load(run / "best.pt", weights_only=True)["model"]["images.project.weight"].shape == (16, 5)
    evaluate.main(["--run", str(run)])
    encoder = RunEncoder(run)
    vectors, problems = encoder.images([tmp_path / "new.png"])
    assert np.isnan(vectors).all() and "of no others" in problems[0]
    word = next(word for word in encoder.vocabulary if word.isalpha())
    assert json.loads(run_script("search.py", "--run", run, word, "--json").stdout)["images"]
    np.save(path, features)
    with pytest.raises(UserError, match="trained on another model.image.backbone"):
        RunEncoder(run)


def test_features_that_encode_wrote_are_read(prepared: Path, tmp_path: Path) -> None:
    run = training.main(["1", "0", "0", *TINY, "--work", str(prepared), "--training.max_epochs", "1"])
    images, out = load_images(prepared), tmp_path / "features.npy"
    encode.main(["--run", str(run), "--images", str(images.root), "--out", str(out)])
    words = [*TINY, "--work", str(prepared), "--model.image.backbone", f"features:{out}"]
    assert training.main(["1", "0", "0", *words, "--training.max_epochs", "1"]).is_dir()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("list", "beside .* is neither features.csv nor images.txt; put images.txt there"),
        ("csv", "cannot read .*features.csv.*; it must be a CSV file in UTF-8"),
        ("unlisted", "does not list 1 of"),
        ("nan", "is NaN or infinite"),
        ("file", "there is no file"),
    ],
)
def test_a_file_that_lacks_images_ends_in_one_line(prepared: Path, tmp_path: Path, broken: str, message: str) -> None:
    path, features = given(prepared, tmp_path / "own")
    listed = path.with_name("images.txt")
    if broken == "list":
        listed.unlink()
    elif broken == "unlisted":
        listed.write_text(listed.read_text().replace(listed.read_text().split("\n")[3], "another.png"))
    elif broken == "csv":
        path.with_suffix(".csv").write_bytes(b"row,path\n0,caf\xe9.png\n")
    elif broken == "file":
        path.unlink()
    else:
        features[4, 1] = np.nan
        np.save(path, features)
    words = [*TINY, "--work", str(prepared), "--model.image.backbone", f"features:{path}"]
    with pytest.raises(UserError, match=message) as error:
        training.main(["1", "0", "0", *words])
    assert "model.image.backbone" in str(error.value) and "\n" not in str(error.value)


def test_features_in_a_file_cannot_be_fine_tuned(prepared: Path) -> None:
    words = [
        *TINY,
        "--work",
        str(prepared),
        "--model.image.backbone",
        "features:a.npy",
        "--model.image.trainable",
        "true",
    ]
    message = one_line_error(run_script("train_cross_modal_retrieval_model.py", "1", "0", "0", *words, ok=False))
    assert "model.image.backbone 'features:FILE.npy' goes with model.image.trainable false" in message
