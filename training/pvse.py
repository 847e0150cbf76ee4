"""PVSE's terms beside the retrieval loss (Song & Soleymani, CVPR 2019): several embeddings an instance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses import full_precision


def pvse_terms(
    x: Tensor,
    y: Tensor,
    residuals: Sequence[Tensor],
    readable: Tensor | None = None,
    neighbor_readable: Tensor | None = None,
) -> dict[str, Tensor]:
    """PVSE's `l_diversity` of both streams, and `l_mmd`. Lost images add 0 to the first and are left out of the second.

    x, y: (B, K, D). residuals: of the images and of the texts, (B, K, D), or (2B, K, D) with the drawn neighbors.
    readable, neighbor_readable: as in `losses.retrieval_loss_terms`.
    """
    of_images, of_texts = residuals
    if readable is not None and neighbor_readable is not None:
        is_there = torch.cat([readable, neighbor_readable])[: len(of_images)]
        of_images = of_images * is_there[:, None, None]
        x, y = x[readable], y[readable]
    mmd = mmd_loss(x, y) if len(x) else of_images.sum() * 0
    return {"l_diversity": diversity_loss(of_images) + diversity_loss(of_texts), "l_mmd": mmd}


def diversity_loss(residuals: Tensor) -> Tensor:
    """How alike the K attended residuals of an instance are, mean_b ‖R_b R_bᵀ − 1‖_F / K² with unit rows R_b, a scalar.

    PVSE's diversity term (Song & Soleymani 2019), once a modality, with the division by K² of their published code. It
    is 0 for orthogonal residuals and for K = 1. residuals: (B, K, D). Raises ValueError for other shapes.
    """
    if residuals.ndim != 3 or 0 in residuals.shape:
        raise ValueError(f"residuals must be (B, K, D), got {tuple(residuals.shape)}")
    with torch.autocast(residuals.device.type, enabled=False):
        rows = torch.nn.functional.normalize(full_precision(residuals), dim=2)
        diagonal = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
        off_diagonal = (rows @ rows.transpose(1, 2)).masked_fill(diagonal, 0)
        return torch.linalg.vector_norm(off_diagonal, dim=(1, 2)).mean() / rows.shape[1] ** 2


def mmd_loss(x: Tensor, y: Tensor, *, gamma: float = 0.5) -> Tensor:
    """Maximum mean discrepancy of two sets of L2-normalised embeddings under the kernel exp(−γ‖u − v‖²), a scalar.

    PVSE's domain discrepancy term (Song & Soleymani 2019): mean k(x, x) − 2 mean k(x, y) + mean k(y, y), which is 0 for
    equal sets. Their published code takes ‖u − v‖ unsquared; the radial basis function that they name squares it.

    x: (B, K, D), y: (M, K, D), or (B, D) and (M, D). Raises ValueError where the shapes do not fit.
    """
    if not (x.ndim == y.ndim and x.ndim in (2, 3)) or x.shape[-1] != y.shape[-1] or 0 in (*x.shape, *y.shape):
        raise ValueError(f"embeddings must be (B, K, D) and (M, K, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        x, y = (full_precision(z).flatten(0, -2) for z in (x, y))
        kernels = ((2 * gamma * (u @ v.T - 1)).exp().mean() for u, v in ((x, x), (x, y), (y, y)))
        within_x, between, within_y = kernels
        return within_x - 2 * between + within_y
