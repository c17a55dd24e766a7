"""The query of a layer, before that layer is reached.

Layers change the residual stream little by little, so the hidden state that enters layer l gives a
good guess at the query of layer l+1, and what that layer will attend to is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from spdk_kv.sparse.settings import Predictor

Map = Callable[[torch.Tensor], torch.Tensor]


def norm_of(predictor: Predictor, this: Map, following: Map) -> Map | None:
    """Which norm a prediction for the following layer begins with; None: it needs no hidden state,
    for it is the query of the previous step."""
    if predictor == "previous":
        return None
    return following if predictor == "next_norm" else this


def predict(hidden: torch.Tensor, *, norm: Map, project: Map, rotate: Map) -> torch.Tensor:
    """The query that a layer would have if ``hidden`` entered it.

    Args:
        hidden: [batch, tokens, hidden]: what enters the layer before it. The last token counts.
        norm: that of `norm_of`.
        project: query projection of the layer, with its norm of queries if it has one:
            [batch, 1, hidden] to [batch, heads, 1, head_dim].
        rotate: RoPE at the position of that token, if the layer has it: same shape out as in.

    Returns:
        [batch, heads, head_dim].
    """
    with torch.no_grad():
        return rotate(project(norm(hidden[:, -1:])))[:, :, 0]
