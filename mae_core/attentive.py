"""An attentive probe: a learnt query pools frozen patch tokens by cross-attention, then a linear layer classifies.

After Chen et al. 2022 ("Context Autoencoder"). The mean treats all patches alike, and MAE's class token was never
trained to summarize, so that both understate what the patch tokens know.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.encoder import init_linear


class AttentiveHead(nn.Module):
    """Cross-attention with one query, a LayerNorm, and a linear classifier."""

    def __init__(self, width: int, num_classes: int, num_heads: int, *, head_std: float = 0.01) -> None:
        super().__init__()
        self.num_heads = num_heads
        # One dimension, so that it is not decayed, like other tokens.
        self.query = nn.Parameter(torch.zeros(width))
        self.key_value = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        self.apply(init_linear)
        nn.init.normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=head_std)

    def forward(
        self,
        tokens: Float[Tensor, "batch patches features"],
        weights: Float[Tensor, "batch"] | None = None,
        all_sum: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Return logits. `weights` and `all_sum` are ProbeHead's, and unused: there are no statistics of a batch."""
        keys, values = self.key_value(tokens).chunk(2, dim=-1)
        query, keys, values = map(self._by_head, (self.query.expand(len(tokens), 1, -1), keys, values))
        pooled = F.scaled_dot_product_attention(query, keys, values)
        return self.head(self.norm(self.projection(pooled.transpose(1, 2).flatten(1))))

    def _by_head(self, part: Float[Tensor, "batch n features"]) -> Float[Tensor, "batch heads n head_features"]:
        return part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
