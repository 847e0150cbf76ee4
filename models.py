"""The two-stream model of Thomas & Kovashka (2020), Sec. 3.3: an image encoder and a text encoder into one space."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images.backbones import build_backbone, xavier_
from images.networks import input_of
from pipeline import schema
from pipeline.devices import to_device
from pipeline.errors import UserError
from pipeline.registry import TEXT_ENCODERS

SPECIAL_WORDS = 3
"""<pad>, <start> and <end> are the first words of every vocabulary."""


class ImageEncoder(nn.Module):
    """Image stream f_I: backbone, dropout, linear F to D, L2 normalisation.

    Takes pixels or, where the backbone is frozen, its features: both give the same embedding.
    """

    def __init__(self, settings: schema.ImageEncoder, dimensions: int) -> None:
        super().__init__()
        self.backbone = build_backbone(settings.backbone, settings.weights)
        self.backbone.demand_size(input_of(settings).size)
        self.trainable = settings.trainable
        self.backbone.requires_grad_(self.trainable)
        self.dropout = nn.Dropout(settings.dropout)
        self.project = nn.Linear(self.backbone.features, dimensions)
        xavier_(self.project)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Set the mode. A frozen backbone stays in eval mode, because its batch statistics are weights too."""
        super().train(mode)
        self.backbone.train(mode and self.trainable)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pixels or (B, F) backbone features to (B, D) unit vectors, float32."""
        if images.dim() == 4:
            with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
                images = self.backbone(images)
        return F.normalize(self.project(self.dropout(images.to(self.project.weight.dtype))).float(), dim=1)


class WordEmbeddings(nn.Embedding):
    """Word embeddings that start from `word_vectors` (V, E) or, by setting, from random numbers. Row 0 is padding."""

    def __init__(self, settings: schema.TextEncoder, word_vectors: np.ndarray) -> None:
        words, size = word_vectors.shape
        super().__init__(words, size, padding_idx=0)
        nn.init.xavier_uniform_(self.weight)
        with torch.no_grad():
            if settings.word_vectors == "doc2vec":
                self.weight.copy_(torch.from_numpy(np.array(word_vectors)))
            self.weight[0] = 0


def _similar_lengths(lengths: Tensor) -> list[slice]:
    """Parts of texts sorted by `lengths` (B,). A part's longest text is at most 1.5 times as long as its shortest."""
    starts = [0]
    for place, length in enumerate(lengths.tolist()):
        if length > 1.5 * lengths[starts[-1]]:
            starts.append(place)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)]


class GRUEncoder(nn.Module):
    """Text stream f_T: a GRU's last hidden state, linear to D, L2 normalisation."""

    def __init__(self, settings: schema.TextEncoder, word_vectors: np.ndarray, dimensions: int) -> None:
        super().__init__()
        self.embed = WordEmbeddings(settings, word_vectors)
        self.dropout = nn.Dropout(settings.dropout)
        self.gru = nn.GRU(self.embed.embedding_dim, settings.hidden_size, batch_first=True)
        self.project = nn.Linear(settings.hidden_size, dimensions)
        xavier_(self.gru)
        xavier_(self.project)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) word indices, padded with 0, and their (B,) lengths >= 1 to (B, D) unit vectors, float32."""
        return F.normalize(self.projected(tokens, lengths).float(), dim=1)

    def projected(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, before normalisation."""
        if tokens.is_cuda:
            return self.project(self.last_states_packed(tokens, lengths))
        return self.project(self.last_states(tokens, lengths))

    def last_states(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The state (B, H) at each text's last word. Texts of similar length are encoded together.

        A GRU never looks ahead, so padding does not change the state at a text's last word.
        """
        states, order = [], lengths.argsort(stable=True)
        for part in _similar_lengths(lengths[order]):
            rows = order[part]
            ends = to_device(lengths[rows], tokens.device)
            of_all, _ = self.gru(self.dropout(self.embed(tokens[rows, : int(ends[-1])])))
            last = (ends - 1)[:, None, None].expand(-1, 1, of_all.shape[2])
            states.append(of_all.gather(1, last).squeeze(1))
        return torch.cat(states)[to_device(order.argsort(), tokens.device)]

    def last_states_packed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `last_states`, for a GPU. On a CPU, packed sequences would keep PyTorch from its fused kernels."""
        order = lengths.argsort(
            descending=True, stable=True
        )  # sorted on the host: PyTorch's own sorting waits for the GPU
        words = self.dropout(self.embed(tokens[to_device(order, tokens.device)]))
        packed = nn.utils.rnn.pack_padded_sequence(words, lengths[order], batch_first=True)
        return self.gru(packed)[1][0][to_device(order.argsort(), tokens.device)]


class BagOfWords(nn.Module):
    """Text stream f_T for small data: mean of the word embeddings, dropout, linear to D, L2 normalisation."""

    def __init__(self, settings: schema.TextEncoder, word_vectors: np.ndarray, dimensions: int) -> None:
        super().__init__()
        self.embed = WordEmbeddings(settings, word_vectors)
        self.dropout = nn.Dropout(settings.dropout)
        self.project = nn.Linear(self.embed.embedding_dim, dimensions)
        xavier_(self.project)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) word indices, padded with 0, and their (B,) lengths >= 1 to (B, D) unit vectors, float32."""
        return F.normalize(self.projected(tokens, lengths).float(), dim=1)

    def projected(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, before normalisation."""
        # Sums while it looks up, so that (B, L, E) is never in memory.
        mean = F.embedding_bag(tokens, self.embed.weight, mode="mean", padding_idx=0)
        return self.project(self.dropout(mean))


class GraphEncoder(nn.Module):
    """Text stream f_T of Yu et al. (2018, arXiv 1802.00985): a text is a signal on the graph of all words.

    The signal is the frequency of each of the V words in the text. Two graph convolutions Z = φ(Â X Θ + b) spread it to
    similar words (Kipf & Welling 2017). A fully connected layer maps the V nodes to the joint space. L2 normalisation.
    The graph of the 8 nearest word vectors, the signal, the two convolutions and the layer are theirs. These are ours:

    - Few channels: 8, and 1 after the second convolution. A batch's signals are (V, B, C) numbers and the layer has
      V·C·D weights, for up to 10⁵ words. With 1 channel the layer is as large as word embeddings would be, and the
      sparse product of the second convolution as cheap as that of the first.
    - φ is a leaky ReLU. The signal is nowhere negative. With a ReLU, a channel whose weight starts below 0 would be 0
      for every text and stay so.
    - The signal has a root mean square of 1 over the nodes, as Xavier's initialisation expects. So a text's length does
      not matter.
    """

    def __init__(self, settings: schema.TextEncoder, word_vectors: np.ndarray, dimensions: int) -> None:
        super().__init__()
        self.words = len(word_vectors)
        self.links: Tensor
        self.link_values: Tensor
        first, second = settings.graph_channels
        # Not in a checkpoint: they are made from word_vectors, which are an input of every run.
        links, values = word_graph(word_vectors, settings.graph_neighbors)
        self.register_buffer("links", links, persistent=False)
        self.register_buffer("link_values", values, persistent=False)
        self.first, self.second = nn.Linear(1, first), nn.Linear(first, second)
        self.dropout = nn.Dropout(settings.dropout)
        self.project = nn.Linear(self.words * second, dimensions)
        xavier_(self)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) word indices, padded with 0, and their (B,) lengths >= 1 to (B, D) unit vectors, float32."""
        return F.normalize(self.projected(tokens, lengths).float(), dim=1)

    def projected(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, before normalisation."""
        with torch.autocast(tokens.device.type, enabled=False):  # no sparse product in bfloat16
            signals = F.leaky_relu(self.first(self._spread(self.signals(tokens)[:, :, None])), 0.2)
            # Â (X Θ) is (Â X) Θ, with fewer channels to spread.
            spread = self._spread(F.linear(signals, self.second.weight)) + self.second.bias
            nodes = F.leaky_relu(spread, 0.2).transpose(0, 1).flatten(1)
        return self.project(self.dropout(nodes))

    def signals(self, tokens: Tensor) -> Tensor:
        """(B, L) word indices to the frequencies of all words (V, B), root mean square 1; special words have 0."""
        counts = torch.zeros(self.words, len(tokens), device=tokens.device, dtype=self.link_values.dtype)
        of_text = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        ones = (tokens >= SPECIAL_WORDS).to(counts.dtype)
        counts.index_put_((tokens, of_text), ones, accumulate=True)
        return F.normalize(counts, dim=0) * self.words**0.5

    def _spread(self, signals: Tensor) -> Tensor:
        """Â X of signals (V, B, C)."""
        size = (self.words, self.words)
        graph = torch.sparse_coo_tensor(self.links, self.link_values, size, is_coalesced=True, check_invariants=False)
        return torch.sparse.mm(graph, signals.flatten(1)).view(signals.shape)


def word_graph(word_vectors: np.ndarray, k: int, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Â = D^-½ (A + 1) D^-½ (Kipf & Welling 2017) of the words, as positions (2, E) int64, sorted, and values (E,).

    A links two words where one is among the other's k nearest by cosine. word_vectors: (V, E). Special words are linked
    only to themselves.
    """
    words = len(word_vectors)
    vectors = F.normalize(torch.from_numpy(np.array(word_vectors[SPECIAL_WORDS:], dtype=np.float32)), dim=1)
    k = min(k, len(vectors) - 1)
    nearest = torch.empty(len(vectors), max(k, 0), dtype=torch.int64)
    for start in range(0, len(vectors) if k > 0 else 0, block):
        rows = torch.arange(start, min(start + block, len(vectors)))
        cosines = vectors[rows] @ vectors.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        nearest[rows] = cosines.topk(k, dim=1).indices
    word = torch.arange(len(vectors))[:, None].expand_as(nearest)
    links = torch.stack([word.flatten(), nearest.flatten()]) + SPECIAL_WORDS
    links = torch.cat([links, links.flip(0), torch.arange(words).expand(2, -1)], dim=1)
    links = torch.unique(links, dim=1)  # sorted by row, then column
    degrees = torch.bincount(links[0], minlength=words).float()
    return links, degrees[links[0]].rsqrt() * degrees[links[1]].rsqrt()


class TwoStream(nn.Module):
    """Both streams. `word_vectors` (V, E) gives the word embeddings' shape and, by setting, their start values."""

    def __init__(self, settings: schema.Model, word_vectors: np.ndarray) -> None:
        super().__init__()
        self.images = ImageEncoder(settings.image, settings.dimensions)
        self.texts = TEXT_ENCODERS.load(settings.text.encoder)(settings.text, word_vectors, settings.dimensions)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor, *, passes: int = 1) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) of images and (M, D) of texts; see the two encoders for the inputs.

        passes: number of equal parts of the images, encoded one after the other. Batch normalisation takes each part's
            own statistics.
        """
        return torch.cat([self.images(part) for part in images.chunk(passes)]), self.texts(tokens, lengths)

    def checkpoint(self) -> dict[str, Tensor]:
        """The state dict without a frozen backbone, which comes from `model.image.weights` or from the seed."""
        frozen = () if self.images.trainable else ("images.backbone.",)
        return {name: value for name, value in self.state_dict().items() if not name.startswith(tuple(frozen))}

    def load_checkpoint(self, state: dict[str, Tensor]) -> None:
        """Load what `checkpoint` returned. Raises RuntimeError where it is another model's."""
        own = self.state_dict()
        if state.keys() != self.checkpoint().keys():
            raise RuntimeError("other parameters")
        self.load_state_dict(own | state)


# PVSE


class PIENet(nn.Module):
    """Polysemous instance embedding (Song & Soleymani, CVPR 2019): K embeddings of one instance.

    - A = softmax(w₂ tanh(w₁ Xᵀ)) attends K times to the instance's local features X.
    - Υ = σ(fc(A X)) are the residuals.
    - LayerNorm(global feature + Υ) are the embeddings.

    As in their published code, the attention's hidden layer is half as wide as the local features, the attention has
    no biases, and dropout is on Υ.

    Args:
        embeddings: K.
        local_size: number C of a local feature's dimensions.
        dimensions: D of the joint space.
        dropout: on the residuals.
    """

    def __init__(self, embeddings: int, local_size: int, dimensions: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(local_size, local_size // 2, bias=False)
        self.heads = nn.Linear(local_size // 2, embeddings, bias=False)
        self.residual = nn.Linear(local_size, dimensions)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dimensions)
        xavier_(self)

    def attention(self, local: Tensor, padding: Tensor | None = None) -> Tensor:
        """Weights (B, K, N) that sum to 1 over the local features (B, N, C), 0 where padding (B, N) is True."""
        scores = self.heads(torch.tanh(self.hidden(local))).transpose(1, 2).float()
        if padding is not None:
            scores = scores.masked_fill(padding[:, None], -torch.inf)
        return scores.softmax(dim=2)

    def forward(self, overall: Tensor, local: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Global features (B, D) and local ones (B, N, C) to embeddings and residuals, both (B, K, D)."""
        attended = self.attention(local, padding).to(local.dtype) @ local
        residuals = self.dropout(torch.sigmoid(self.residual(attended)))
        return self.norm(overall[:, None] + residuals), residuals


class PVSEImageEncoder(ImageEncoder):
    """PVSE's image stream. The feature map's projected mean is the global feature, its places are the local ones.

    Takes pixels or, where the backbone is frozen, its `local_features`: both give the same embeddings.

    Raises:
        UserError: a backbone whose features are not the mean of a feature map.
    """

    def __init__(self, settings: schema.ImageEncoder, dimensions: int, embeddings: int, dropout: float) -> None:
        super().__init__(settings, dimensions)
        self._require_pooled_map(input_of(settings).size)
        self.dropout = nn.Dropout(dropout)
        self.pie = PIENet(embeddings, self.backbone.features, dimensions, dropout)

    @torch.no_grad()
    def _require_pooled_map(self, size: int) -> None:
        black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        self.backbone.eval()
        pooled, features = self.backbone.feature_map(black).mean(dim=(2, 3)), self.backbone(black)
        self.train(self.training)
        if pooled.shape != features.shape or not torch.allclose(pooled, features, rtol=1e-3, atol=1e-4):
            raise UserError(
                f"the features of model.image.backbone {self.backbone.name} are not the mean of a feature map, "
                "which PVSE needs; choose a ResNet or efficientnet_lite0"
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pixels or (B, N, F) local features to (B, K, D) unit vectors, float32."""
        return self.with_residuals(images)[0]

    def with_residuals(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the attended residuals (B, K, D) for the diversity loss."""
        if images.dim() == 4:
            with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
                images = self.backbone.local_features(images)
        local = images.to(self.project.weight.dtype)  # cached features may have half precision
        embeddings, residuals = self.pie(self.dropout(self.project(local.mean(dim=1))), local)
        return F.normalize(embeddings.float(), dim=2), residuals


class PVSETextEncoder(nn.Module):
    """PVSE's text stream. A text encoder gives the global feature, its word embeddings are the local ones.

    Theirs is a bidirectional GRU of hidden size D / 2 on words of 300 dimensions, without a projection. Ours is the
    encoder of `settings`, as for the other methods of the paper's Table 1.
    """

    def __init__(
        self,
        settings: schema.TextEncoder,
        word_vectors: np.ndarray,
        dimensions: int,
        embeddings: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.encoder = TEXT_ENCODERS.load(settings.encoder)(settings, word_vectors, dimensions)
        self.dropout = nn.Dropout(dropout)
        self.pie = PIENet(embeddings, word_vectors.shape[1], dimensions, dropout)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) word indices, padded with 0, and their (B,) lengths >= 1 to (B, K, D) unit vectors, float32."""
        return self.with_residuals(tokens, lengths)[0]

    def with_residuals(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the attended residuals (B, K, D) for the diversity loss."""
        overall = self.dropout(self.encoder.projected(tokens, lengths))
        words = self.encoder.dropout(self.encoder.embed(tokens))
        padding = torch.arange(tokens.shape[1], device=tokens.device) >= to_device(lengths, tokens.device)[:, None]
        embeddings, residuals = self.pie(overall, words, padding)
        return F.normalize(embeddings.float(), dim=2), residuals


class PVSE(TwoStream):
    """Polysemous visual-semantic embedding (Song & Soleymani, CVPR 2019): K embeddings an image and a text.

    `settings.pvse.dropout` is on both streams' global features and residuals. `settings.text.dropout` is on words. They
    have one rate for all, 0 by default, and K = 2 on COCO. Thomas & Kovashka give neither.
    """

    def __init__(self, settings: schema.Model, word_vectors: np.ndarray) -> None:
        nn.Module.__init__(self)  # TwoStream's would build the ordinary encoders
        size, count, dropout = settings.dimensions, settings.pvse.embeddings, settings.pvse.dropout
        self.images: PVSEImageEncoder = PVSEImageEncoder(settings.image, size, count, dropout)
        self.texts: PVSETextEncoder = PVSETextEncoder(settings.text, word_vectors, size, count, dropout)

    def forward(  # type: ignore[override]  # DistributedDataParallel passes only `forward` on
        self, images: Tensor, tokens: Tensor, lengths: Tensor, *, passes: int = 1, residuals: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Embeddings (N, K, D) of images and (M, K, D) of texts, with `residuals` a pair with the residuals of each."""
        if not residuals:
            return super().forward(images, tokens, lengths, passes=passes)
        x, of_images = zip(*(self.images.with_residuals(part) for part in images.chunk(passes)), strict=True)
        return (torch.cat(x), torch.cat(of_images)), self.texts.with_residuals(tokens, lengths)


def build_model(settings: schema.Model, word_vectors: np.ndarray, seed: int) -> TwoStream:
    """The model, initialised by `seed`. word_vectors: (V, E)."""
    kind = PVSE if settings.pvse.embeddings else TwoStream
    with seeded(seed):
        model = kind(settings, word_vectors)
        if settings.initialisation == "authors":
            initialise_as_authors(model)
    return model


def initialise_as_authors(model: TwoStream) -> None:
    """Initialise again as the authors' code: projections by `xavier_normal_` with biases of 0.1, GRUs by default."""
    for part in (model.images, *model.texts.modules()):
        if isinstance(project := getattr(part, "project", None), nn.Linear):
            nn.init.xavier_normal_(project.weight)
            nn.init.constant_(project.bias, 0.1)
        if isinstance(part, nn.GRU):
            part.reset_parameters()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside, and restore its random state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
