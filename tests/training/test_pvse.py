"""PVSE: encoders (models.py), similarity (losses.py) and terms (training/pvse.py), against cases by hand and loops."""

import math

import numpy as np
import pytest
import torch
from test_losses import LOGSUMEXP, OperationLog, every_base_loss, random_mask, unit_vectors
from test_models import LENGTHS, TOKENS, WORDS, small
from torch import nn

import losses
from images.backbones import Backbone
from losses import (
    angular_npairs_loss,
    multiple_instance_similarities,
    retrieval_loss_terms,
    triplet_npairs_loss,
    triplet_similarities,
)
from models import PVSE, PIENet, PVSEImageEncoder, PVSETextEncoder, seeded
from pipeline.errors import UserError
from training.pvse import diversity_loss, mmd_loss

# ResNet's feature map of 64 × 64 pixels has 2 × 2 places.
PIXELS = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def image_encoder(embeddings: int = 3, **image: object) -> PVSEImageEncoder:
    settings = small(**image)
    with seeded(settings.seed):
        return PVSEImageEncoder(settings.model.image, 8, embeddings, dropout=0)


def text_encoder(encoder: str = "gru", embeddings: int = 3) -> PVSETextEncoder:
    settings = small(encoder)
    with seeded(settings.seed):
        return PVSETextEncoder(settings.model.text, WORDS, 8, embeddings, dropout=0).eval()


def pvse(encoder: str = "gru", embeddings: int = 3, **image: object) -> PVSE:
    settings = small(encoder, **image)
    settings.model.pvse.embeddings = embeddings
    with seeded(settings.seed):
        return PVSE(settings.model, WORDS)


# --- Similarities of several embeddings ------------------------------------------------------------------------------


def test_similarity_is_that_of_the_closest_pair_by_hand() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [-1.0, 0.0]]])
    b = torch.tensor([[[0.8, 0.6], [0.0, -1.0]], [[-1.0, 0.0], [0.0, -1.0]], [[0.6, 0.8], [1.0, 0.0]]])
    expected = torch.tensor([[0.8, 0.0, 1.0], [0.96, 1.0, 1.0]])
    torch.testing.assert_close(multiple_instance_similarities(a, b), expected)


@pytest.mark.parametrize("ks", [(1, 1), (2, 2), (4, 4), (3, 2)])
def test_similarity_is_the_greatest_of_all_pairs(ks: tuple[int, int]) -> None:
    a, b = unit_vectors(4, ks[0], 3, seed=1), unit_vectors(5, ks[1], 3, seed=2)
    expected = [[max(float(u @ v) for u in x for v in y) for y in b] for x in a]
    torch.testing.assert_close(multiple_instance_similarities(a, b), torch.tensor(expected, dtype=torch.float64))


def test_all_three_similarities() -> None:
    a, p, n = unit_vectors(4, 2, 3, seed=1), unit_vectors(4, 2, 3, seed=2), unit_vectors(6, 2, 3, seed=3)
    ap, an, pn = triplet_similarities(a, p, n)
    torch.testing.assert_close(ap, multiple_instance_similarities(a, p).diagonal())
    torch.testing.assert_close(an, multiple_instance_similarities(a, n))
    torch.testing.assert_close(pn, multiple_instance_similarities(p, n))


@every_base_loss
def test_one_embedding_an_instance_is_the_ordinary_loss(base_loss: losses.NPairsLoss) -> None:
    x, y, x_, y_ = (unit_vectors(5, 3, seed=seed) for seed in (1, 2, 3, 4))
    ids = torch.tensor([1, 2, 1, 3, 4])
    ordinary = retrieval_loss_terms(base_loss, x, y, ids, x_, y_, ids + 2)
    single = retrieval_loss_terms(base_loss, *(z[:, None] for z in (x, y)), ids, x_[:, None], y_[:, None], ids + 2)
    assert ordinary.keys() == single.keys() == {"l_i2t", "l_sym", "l_img", "l_text"}
    for name, term in ordinary.items():
        torch.testing.assert_close(single[name], term)


@every_base_loss
def test_equal_embeddings_of_an_instance_are_as_one(base_loss: losses.NPairsLoss) -> None:
    batch = [unit_vectors(5, 3, seed=seed) for seed in (1, 2, 3)]
    torch.testing.assert_close(base_loss(*(z[:, None].expand(-1, 4, -1) for z in batch), None), base_loss(*batch, None))


def test_base_losses_are_over_closest_pairs() -> None:
    a, p, n = unit_vectors(4, 2, 3, seed=1), unit_vectors(4, 2, 3, seed=2), unit_vectors(6, 2, 3, seed=3)
    mask = random_mask(4, 6, seed=4)
    closest = [torch.einsum("ikd,jld->ijkl", u, v).flatten(2).amax(dim=2) for u, v in ((a, p), (a, n), (p, n))]
    closest[0] = closest[0].diagonal()
    exponents = 2 * (closest[1] + closest[2]) - 3 * closest[0][:, None]
    sums = (exponents.exp() * mask).sum(dim=1)
    torch.testing.assert_close(angular_npairs_loss(a, p, n, mask, tan_squared_alpha=0.5), (1 + sums).log().mean())
    brackets = (0.2 + 2 * closest[1] - 2 * closest[0][:, None]).relu()
    torch.testing.assert_close(triplet_npairs_loss(a, p, n, mask), brackets[mask].sum() / 4)


@every_base_loss
def test_gradient_of_several_embeddings(base_loss: losses.NPairsLoss) -> None:
    batch = [unit_vectors(3, 2, 3, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    assert torch.autograd.gradcheck(lambda a, p, n: base_loss(a, p, n, None), batch)


def test_only_the_closest_pair_is_pulled() -> None:
    a, b = unit_vectors(1, 3, 4, seed=1).requires_grad_(), unit_vectors(1, 3, 4, seed=2).requires_grad_()
    multiple_instance_similarities(a, b).sum().backward()
    closest = torch.einsum("kd,ld->kl", a[0], b[0]).argmax().item()
    for x, one in ((a, closest // 3), (b, closest % 3)):
        assert [bool(row.any()) for row in x.grad[0]] == [k == one for k in range(3)]


@every_base_loss
def test_no_waiting_for_the_device(base_loss: losses.NPairsLoss) -> None:
    x, y = (unit_vectors(12, 2, 4, seed=seed).requires_grad_() for seed in (1, 2))
    with OperationLog() as log:
        terms = retrieval_loss_terms(base_loss, x, y, torch.arange(12) // 2)
        (sum(terms.values()) + diversity_loss(x) + mmd_loss(x, y)).backward()
    assert not log.names & {"_local_scalar_dense", "nonzero", "index", "masked_select", "unique", "_unique2"}


def test_embeddings_that_do_not_fit() -> None:
    a, matrix = torch.ones(4, 2, 3), torch.ones(4, 3)
    for x, y in [(a, matrix), (matrix, matrix), (a, a[:, :, :2])]:
        with pytest.raises(ValueError, match="must be"):
            multiple_instance_similarities(x, y)
    for batch in [(a, a[:, :1], a), (a, a, matrix), (matrix, matrix, a), (a, a, a[:, :, :2])]:
        with pytest.raises(ValueError, match="must"):
            angular_npairs_loss(*batch)


# --- Diversity -------------------------------------------------------------------------------------------------------


def test_diversity_by_hand() -> None:
    c = 0.6
    residuals = torch.tensor([[[2.0, 0.0], [2.0 * c, 2.0 * 0.8]], [[0.0, 5.0], [1.0, 0.0]]])
    # The first Gram matrix is [[1, c], [c, 1]], the second the identity.
    torch.testing.assert_close(diversity_loss(residuals), torch.tensor((math.sqrt(2) * c / 4 + 0) / 2))


def test_diversity_of_orthogonal_and_of_equal_residuals() -> None:
    assert diversity_loss(torch.eye(5)[None, :4] * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]) == 0
    equal = torch.ones(2, 4, 3)
    torch.testing.assert_close(diversity_loss(equal), torch.tensor(math.sqrt(4 * 4 - 4) / 16))


def test_diversity_of_one_residual_is_nothing() -> None:
    residuals = torch.rand(3, 1, 4, requires_grad=True)
    loss = diversity_loss(residuals)
    loss.backward()
    assert loss == 0 and (residuals.grad == 0).all()


def test_diversity_is_the_norm_of_the_gram_matrix_without_its_diagonal() -> None:
    residuals = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = residuals.numpy() / np.linalg.norm(residuals.numpy(), axis=2, keepdims=True)
    expected = np.mean([np.linalg.norm(r @ r.T - np.eye(3)) / 9 for r in rows])
    assert diversity_loss(residuals).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(diversity_loss, [residuals.requires_grad_()])


# --- Maximum mean discrepancy ----------------------------------------------------------------------------------------


def rbf_mean(x: np.ndarray, y: np.ndarray, gamma: float) -> float:
    return np.mean([math.exp(-gamma * np.sum((u - v) ** 2)) for u in x for v in y])


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_mmd_is_the_sum_over_all_pairs(gamma: float) -> None:
    x, y = unit_vectors(4, 2, 3, seed=1), unit_vectors(5, 2, 3, seed=2)
    u, v = x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy()
    expected = rbf_mean(u, u, gamma) - 2 * rbf_mean(u, v, gamma) + rbf_mean(v, v, gamma)
    assert expected > 0.01
    assert mmd_loss(x, y, gamma=gamma).item() == pytest.approx(expected)
    torch.testing.assert_close(mmd_loss(x.flatten(0, 1), y.flatten(0, 1), gamma=gamma), mmd_loss(x, y, gamma=gamma))


def test_mmd_of_two_points_by_hand() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(mmd_loss(x, y), torch.tensor(2 - 2 * math.exp(-0.5 * 2)))


def test_mmd_of_equal_sets_is_nothing_in_any_order() -> None:
    x = unit_vectors(5, 2, 3, seed=1)
    assert mmd_loss(x, x.clone()).item() == pytest.approx(0, abs=1e-12)
    assert mmd_loss(x, x.flip(0, 1)).item() == pytest.approx(0, abs=1e-12)


def test_mmd_gradient() -> None:
    batch = [unit_vectors(3, 2, 3, seed=seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(mmd_loss, batch)


@pytest.mark.parametrize("regulariser", [diversity_loss, lambda x: mmd_loss(x, x.roll(1, 2))], ids=["diversity", "mmd"])
def test_regularisers_under_autocast(regulariser: object) -> None:
    x = unit_vectors(4, 2, 16, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert regulariser(x) == regulariser(x.clone())
        under_autocast = regulariser(x)
    assert under_autocast == regulariser(x) and under_autocast.dtype == torch.float32
    assert regulariser(x.bfloat16()).dtype == torch.float32


def test_regularisers_of_shapes_that_do_not_fit() -> None:
    for residuals in (torch.ones(3, 4), torch.ones(0, 2, 3)):
        with pytest.raises(ValueError, match="residuals must be"):
            diversity_loss(residuals)
    for x, y in [(torch.ones(3, 4), torch.ones(3, 1, 4)), (torch.ones(3, 4), torch.ones(3, 5)), (torch.ones(4),) * 2]:
        with pytest.raises(ValueError, match="embeddings must be"):
            mmd_loss(x, y)


# --- PIE-Net ---------------------------------------------------------------------------------------------------------


def pie_net(embeddings: int = 3) -> PIENet:
    with seeded(small().seed):
        return PIENet(embeddings, 6, 4, 0.0)


def test_attention_sums_to_one_and_padding_gets_nothing() -> None:
    pie, local = pie_net(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    weights = pie.attention(local, padding)
    assert weights.shape == (2, 3, 5)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 3))
    assert (weights[1, :, 2:] == 0).all() and (weights[0] > 0).all() and (weights[1, :, :2] > 0).all()
    torch.testing.assert_close(weights[1, :, :2], pie.attention(local[1:, :2])[0])


def test_pie_net_is_its_equations() -> None:
    pie = pie_net()
    with torch.no_grad():
        for parameter in pie.parameters():  # LayerNorm's too, which start at 1 and 0
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    generator = torch.Generator().manual_seed(1)
    overall, local = torch.randn(2, 4, generator=generator), torch.randn(2, 5, 6, generator=generator)
    embeddings, residuals = pie(overall, local)
    w1, w2, fc = pie.hidden.weight, pie.heads.weight, pie.residual
    assert w1.shape == (3, 6) and w2.shape == (3, 3)
    for i in range(2):
        a = torch.softmax(w2 @ torch.tanh(w1 @ local[i].T), dim=1)
        expected = torch.sigmoid(a @ local[i] @ fc.weight.T + fc.bias)
        torch.testing.assert_close(residuals[i], expected)
        for k in range(3):
            z = overall[i] + expected[k]
            z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * pie.norm.weight + pie.norm.bias
            torch.testing.assert_close(embeddings[i, k], z)


def test_dropout_is_on_the_residuals_while_training() -> None:
    pie = PIENet(2, 6, 50, 0.5)
    overall, local = torch.zeros(3, 50), torch.randn(3, 5, 6)
    share = (pie.train()(overall, local)[1] == 0).float().mean()
    assert 0.3 < share < 0.7
    assert (pie.eval()(overall, local)[1] > 0).all()


# --- Encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["gru", "bag_of_words"])
@pytest.mark.parametrize("embeddings", [1, 3])
def test_embeddings_are_unit_vectors_of_the_joint_space(encoder: str, embeddings: int) -> None:
    model = pvse(encoder, embeddings).eval()
    x, y = model(PIXELS, TOKENS, LENGTHS)
    (x_again, x_residuals), (y_again, y_residuals) = model(PIXELS, TOKENS, LENGTHS, residuals=True)
    assert torch.equal(x, x_again) and torch.equal(y, y_again)
    for vectors, residuals in ((x, x_residuals), (y, y_residuals)):
        assert vectors.shape == residuals.shape == (4, embeddings, 8)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=2), torch.ones(4, embeddings))
        assert ((residuals > 0) & (residuals < 1)).all()
        if embeddings > 1:
            assert not torch.allclose(vectors[:, 0], vectors[:, 1])


@pytest.mark.parametrize("encoder", ["gru", "bag_of_words"])
def test_padding_never_changes_an_embedding(encoder: str) -> None:
    texts = text_encoder(encoder)
    together = texts(TOKENS, LENGTHS)
    wider = texts(torch.cat([TOKENS, torch.zeros(4, 5, dtype=torch.int64)], dim=1), LENGTHS)
    torch.testing.assert_close(wider, together)
    for row, length in enumerate(LENGTHS):
        alone = texts(TOKENS[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize("encoder", ["gru", "bag_of_words"])
def test_text_embeddings_are_made_of_the_ordinary_encoder_and_its_words(encoder: str) -> None:
    texts = text_encoder(encoder)
    ordinary = texts.encoder.projected(TOKENS, LENGTHS)
    torch.testing.assert_close(nn.functional.normalize(ordinary, dim=1), texts.encoder(TOKENS, LENGTHS))
    for row, length in enumerate(LENGTHS):
        words = texts.encoder.embed(TOKENS[row, :length])
        expected, _ = texts.pie(ordinary[row : row + 1], words[None])
        torch.testing.assert_close(texts(TOKENS, LENGTHS)[row], nn.functional.normalize(expected[0], dim=1))


def test_image_embeddings_are_made_of_the_feature_map() -> None:
    images = image_encoder().eval()
    feature_map = images.backbone.feature_map(PIXELS)
    _, _, height, width = feature_map.shape
    local = torch.stack([feature_map[:, :, i, j] for i in range(height) for j in range(width)], dim=1)
    assert local.shape == (4, 4, 512)
    torch.testing.assert_close(images.backbone.local_features(PIXELS), local)
    expected, residuals = images.pie(images.project(images.backbone(PIXELS)), local)
    embeddings, ours = images.with_residuals(PIXELS)
    torch.testing.assert_close(embeddings, nn.functional.normalize(expected, dim=2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, residuals)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_features_are_the_mean_of_the_feature_map(name: str) -> None:
    backbone = Backbone(name, "none").eval()
    images = torch.nn.functional.interpolate(PIXELS.float(), 96).to(torch.uint8)
    feature_map = backbone.feature_map(images)
    assert feature_map.shape == (4, backbone.features, 3, 3)
    torch.testing.assert_close(feature_map.mean(dim=(2, 3)), backbone(images), rtol=1e-4, atol=1e-5)
    assert not any(part._forward_pre_hooks for part in backbone.modules())


def test_backbones_without_the_feature_map_that_pvse_needs() -> None:
    with pytest.raises(UserError, match=r"mobilenet_v2 .* no global average pooling"):
        Backbone("mobilenet_v2", "none").feature_map(PIXELS)
    with pytest.raises(UserError, match=r"mobilenet_v3_small are not the mean"):
        image_encoder(backbone="mobilenet_v3_small")
    with pytest.raises(UserError, match=r"convnext_tiny are not the mean"):
        image_encoder(backbone="convnext_tiny")


def test_cached_local_features_give_the_embedding_that_pixels_give() -> None:
    images = image_encoder(trainable=False).train()
    cached = images.backbone.local_features(PIXELS)
    torch.testing.assert_close(images(cached), images(PIXELS))
    torch.testing.assert_close(images(cached.half()), images(PIXELS), rtol=0, atol=5e-3)


def test_a_frozen_backbone_neither_learns_nor_counts_batches() -> None:
    images = image_encoder(trainable=False).train()
    assert images.pie.training and not images.backbone.training
    before = {name: value.clone() for name, value in images.backbone.state_dict().items()}
    images(PIXELS)[:, :, 0].sum().backward()
    assert not any(parameter.requires_grad for parameter in images.backbone.parameters())
    assert images.project.weight.grad is not None and images.pie.hidden.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in images.backbone.state_dict().items())


def test_a_trainable_backbone_is_left_in_training() -> None:
    images = image_encoder()
    assert images.training and images.backbone.training


def test_everything_learns() -> None:
    model = pvse(embeddings=2).train()
    (x, x_residuals), (y, y_residuals) = model(PIXELS, TOKENS, LENGTHS, residuals=True)
    terms = retrieval_loss_terms(LOGSUMEXP, x, y, torch.arange(4))
    regularisers = 0.1 * (diversity_loss(x_residuals) + diversity_loss(y_residuals)) + 0.01 * mmd_loss(x, y)
    (sum(terms.values()) + regularisers).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_under_bf16_autocast() -> None:
    model = pvse(embeddings=2).eval()
    x, y = model(PIXELS, TOKENS, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        x_half, y_half = model(PIXELS, TOKENS, LENGTHS)
    assert x_half.dtype == y_half.dtype == torch.float32
    for full, half in ((x, x_half), (y, y_half)):
        assert (full * half).sum(dim=2).min() > 0.99


def test_new_weights_are_xaviers() -> None:
    images = image_encoder()
    for linear in (images.pie.hidden, images.pie.heads, images.pie.residual):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert linear.bias is None or not linear.bias.any()


def test_a_checkpoint_brings_back_the_model() -> None:
    model = pvse(trainable=False).eval()
    with torch.no_grad():
        model.images.pie.heads.weight.mul_(-1)
    state = model.checkpoint()
    assert not any(name.startswith("images.backbone") for name in state)
    again = pvse(trainable=False).eval()
    again.load_checkpoint(state)
    for ours, theirs in zip(model(PIXELS, TOKENS, LENGTHS), again(PIXELS, TOKENS, LENGTHS), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError):
        pvse("bag_of_words", trainable=False).load_checkpoint(state)


def test_the_seed_decides_the_weights() -> None:
    first, again = pvse().state_dict(), pvse().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
