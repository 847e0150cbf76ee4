"""The text encoder on the graph of all words, against dense matrices written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models import GraphEncoder, word_graph
from pipeline import schema as config
from pipeline.settings import checked_tree, mistakes, validated

WORDS = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
TOKENS = torch.tensor([[1, 4, 5, 4, 2, 0], [1, 6, 2, 0, 0, 0], [1, 7, 8, 9, 10, 2], [1, 29, 29, 29, 3, 2]])
LENGTHS = torch.tensor([5, 3, 6, 6])


def encoder(channels: tuple[int, int] = (4, 2), **more: object) -> GraphEncoder:
    settings = config.TextEncoder(encoder="graph", graph_neighbors=3, graph_channels=list(channels), **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GraphEncoder(settings, WORDS, dimensions=7).eval()
        for layer in (model.first, model.second, model.project):
            torch.nn.init.normal_(layer.bias)  # zeros would hide a bias that is left out
    return model


def dense_graph(word_vectors: np.ndarray, k: int) -> np.ndarray:
    """Â = D^-½ (A + 1) D^-½, one word after the other."""
    words = len(word_vectors)
    adjacency = np.zeros((words, words))
    for word in range(3, words):
        cosines = {
            other: word_vectors[word] @ word_vectors[other] / np.linalg.norm(word_vectors[other])
            for other in range(3, words)
            if other != word
        }
        for other in sorted(cosines, key=cosines.__getitem__, reverse=True)[:k]:
            adjacency[word, other] = adjacency[other, word] = 1
    adjacency += np.eye(words)
    degrees = adjacency.sum(axis=1)
    return adjacency / np.sqrt(degrees[:, None] * degrees)


def to_dense(links: Tensor, values: Tensor, words: int) -> np.ndarray:
    return torch.sparse_coo_tensor(links, values, (words, words), check_invariants=True).to_dense().numpy()


def test_the_graph_is_that_of_the_nearest_word_vectors_either_way() -> None:
    np.testing.assert_allclose(to_dense(*word_graph(WORDS, 3), 30), dense_graph(WORDS, 3), rtol=1e-6)
    links, _ = word_graph(WORDS, 3)
    assert torch.equal(links, torch.unique(links, dim=1)), "sorted, each once"
    blocks = word_graph(WORDS, 3, block=4)
    assert all(torch.equal(one, other) for one, other in zip(blocks, word_graph(WORDS, 3), strict=True))


@pytest.mark.parametrize("words", [3, 4, 5, 8])
def test_few_words_are_linked_with_all_there_are(words: int) -> None:
    np.testing.assert_allclose(to_dense(*word_graph(WORDS[:words], 8), words), dense_graph(WORDS[:words], 8), rtol=1e-6)


@pytest.mark.parametrize("channels", [(1, 1), (4, 2), (8, 1)])
def test_embeddings_are_those_of_dense_matrices(channels: tuple[int, int]) -> None:
    model = encoder(channels)
    graph = dense_graph(WORDS, 3)

    def convolve(signals: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
        weight, bias = layer.weight.detach().numpy().astype(float), layer.bias.detach().numpy()
        found = graph @ signals @ weight.T + bias
        return np.where(found > 0, found, 0.2 * found)

    embeddings = model(TOKENS, LENGTHS).detach().numpy()
    assert embeddings.dtype == np.float32
    for text, embedding in zip(TOKENS.tolist(), embeddings, strict=True):
        counts = np.array([[float(text.count(word)) if word >= 3 else 0.0] for word in range(30)])
        signals = convolve(convolve(counts / np.sqrt(np.mean(counts**2)), model.first), model.second)
        expected = model.project.weight.detach().numpy() @ signals.flatten() + model.project.bias.detach().numpy()
        np.testing.assert_allclose(embedding, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-5)


def test_padding_and_company_never_change_an_embedding() -> None:
    model = encoder()
    together = model(TOKENS, LENGTHS)
    wider = torch.cat([TOKENS, torch.zeros(4, 9, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(wider, LENGTHS), together)
    for row, length in enumerate(LENGTHS):
        alone = model(TOKENS[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


def test_order_and_length_do_not_matter_but_frequencies_do() -> None:
    model = encoder()
    text = torch.tensor([[1, 5, 6, 6, 7, 2]])
    other_order = torch.tensor([[1, 6, 7, 5, 6, 2]])
    twice = torch.tensor([[1, 5, 6, 6, 7, 5, 6, 6, 7, 2]])
    once = torch.tensor([[1, 5, 6, 7, 2]])
    lengths = torch.tensor([6])
    torch.testing.assert_close(model(text, lengths), model(other_order, lengths))
    torch.testing.assert_close(model(text, lengths), model(twice, torch.tensor([10])))
    assert not torch.allclose(model(text, lengths), model(once, torch.tensor([5])), atol=1e-4)


def test_alike_words_share_what_they_say() -> None:
    """The signal reaches a word's neighbors, and theirs: what bag of words does not do."""
    model = encoder()
    graph = dense_graph(WORDS, 3)
    reached = model._spread(model.signals(torch.tensor([[4]]))[:, :, None])[:, 0, 0].numpy()
    assert np.array_equal(reached > 0, graph[:, 4] > 0)


def test_gradients() -> None:
    model = encoder().double()
    tokens = TOKENS[:2]

    def loss(*parameters: Tensor) -> Tensor:
        named = dict(zip([name for name, _ in model.named_parameters()], parameters, strict=True))
        return torch.func.functional_call(model, named, (tokens, LENGTHS[:2])).pow(3).sum()

    # The embedding is float32 whatever the model; its normalised double is what can be checked numerically.
    model.forward = lambda tokens, lengths: torch.nn.functional.normalize(model.projected(tokens, lengths), dim=1)
    assert torch.autograd.gradcheck(loss, tuple(p.detach().clone().requires_grad_() for p in model.parameters()))


def test_every_parameter_learns_whatever_the_seed() -> None:
    """A ReLU in place of the leaky one would leave some seeds with nothing but zeros."""
    settings = config.TextEncoder(encoder="graph", graph_neighbors=3, graph_channels=[2, 1])
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            texts = GraphEncoder(settings, WORDS, dimensions=8)
        texts(TOKENS, LENGTHS)[:, 0].sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in texts.parameters()), seed


def test_autocast_keeps_the_sparse_products_in_full_precision() -> None:
    model = encoder()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(TOKENS, LENGTHS)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, model(TOKENS, LENGTHS), rtol=0.05, atol=0.03)


def test_dropout_is_on_the_last_signals_and_only_while_training() -> None:
    model = encoder(dropout=0.5)
    assert torch.equal(model(TOKENS, LENGTHS), model(TOKENS, LENGTHS))
    model.train()
    assert not torch.equal(model(TOKENS, LENGTHS), model(TOKENS, LENGTHS))


def test_a_checkpoint_holds_parameters_and_the_graph_is_made_again() -> None:
    assert set(encoder().state_dict()) == {
        f"{layer}.{part}" for layer in ("first", "second", "project") for part in ("weight", "bias")
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu() -> None:
    model = encoder()
    on_cpu = model(TOKENS, LENGTHS)
    torch.testing.assert_close(model.cuda()(TOKENS.cuda(), LENGTHS).cpu(), on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"text": {"encoder": "graph", "word_vectors": "random"}}, "word_vectors"),
        ({"text": {"encoder": "graph"}, "pvse": {"embeddings": 2}}, "model.pvse"),
        ({"text": {"graph_channels": [8]}}, "a list of 2 or more"),
        ({"text": {"graph_channels": [8, 0]}}, "at least 1"),
        ({"text": {"graph_neighbors": 0}}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(tree: dict[str, object], message: str) -> None:
    settings, wrong = validated(checked_tree({"model": tree}, "a tree"))
    (mistake,) = wrong + mistakes(settings)
    assert message in mistake
