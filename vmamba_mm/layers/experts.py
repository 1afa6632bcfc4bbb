"""A mixture of experts: of several MLPs each token goes through a few (Mixtral, arXiv 2401.04088;
in Jamba, arXiv 2403.19887, beside Mamba layers)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.retention import GatedMlp
from vmamba_mm.ops.core.backends import compute_dtype


class MixtureOfExperts(nn.Module):
    """The sum of the ``top_k`` likeliest experts of each token, weighted by their probabilities.

    A linear router gives each expert a score; the softmax of all scores, in fp32 at least, has the
    weights, which are not scaled to a sum of 1, as of Jamba and unlike Mixtral's. No token is
    dropped, however many choose one expert. An expert that no token has chosen takes part in
    nothing, and has no gradient.

    Args:
        dim: C.
        hidden: channels between, of each expert.
        num_experts: of them a token has a choice.
        top_k: experts that a token goes through.
        act: of :class:`vmamba_mm.layers.GatedMlp`.

    Shape: (..., C) -> (..., C).

    Raises:
        ValueError: if there are fewer experts than a token goes through, or it goes through none.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int = 2,
                 act: str = 'silu'):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f'top_k={top_k!r} must be at least 1 and at most num_experts='
                             f'{num_experts!r}')
        self.top_k = top_k
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(GatedMlp(dim, hidden, act) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens)
        weights, chosen = scores.softmax(-1, compute_dtype(scores.dtype)).topk(self.top_k)
        # Each pair of a token and an expert, by experts: one product for all tokens of an expert.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        weights, total = weights.to(x.dtype).flatten(), torch.zeros_like(tokens)
        for expert, pairs in zip(self.experts, order.split(counts), strict=True):
            if len(pairs):
                rows = pairs // self.top_k
                y = expert(tokens[rows]) * weights[pairs, None]
                total = total.index_add(0, rows, y.to(total.dtype))
        return total.view(x.shape)


def load_balance_loss(scores: Sequence[Tensor], top_k: int) -> Tensor:
    """What training adds so that no expert starves (arXiv 2101.03961, equations 4 to 6), for all
    layers together; Jamba's coefficient in transformers is 0.001.

    It is E sum_e f_e p_e, where f_e is how many experts ``e`` a token chose on average and p_e its
    mean probability: ``top_k`` where all are chosen alike.

    Args:
        scores: (tokens, E) of each router, what ``router`` of :class:`MixtureOfExperts` gives; a
            forward hook collects them.
        top_k: experts that a token goes through.

    Returns:
        A scalar.
    """
    probabilities = torch.cat([layer.flatten(0, -2) for layer in scores]).softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k).indices, probabilities.shape[-1])
    share = chosen.sum(1).to(probabilities.dtype).mean(0)
    return probabilities.shape[-1] * (share * probabilities.mean(0)).sum()
