"""The network: input standardisation, stacked convolutions, output head.

Features are all it knows of an item, so an item that nobody touched yet gets an embedding too; item_dimensions adds a
learned vector. Memory: one mini-batch, and those vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Convolution, normalise
from pipeline.contracts import config

CLIP = 10.0
"""Standardised features are cut to this many standard deviations: one outlier must not drown a vector."""
FIRST_SPREAD = 0.1
"""Standard deviation of learned item vectors before training: content, of deviation 1, speaks louder at first."""
_INITIALISATION = 1
"""Keeps this use of the seed apart from the loader's."""


class PinSage(nn.Module):
    """K convolutions and the head G2 ReLU(G1 h + g); with K = 0 the head alone, on content.

    The head's inner width is the embedding's (not published). Weights depend on the seed alone.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_features: int, settings: config.Model, seed: int = 0, num_items: int = 0) -> None:
        super().__init__()
        width, count = settings.output_dimensions, settings.num_layers
        inputs = num_features + settings.item_dimensions
        self.items = nn.Embedding(num_items, settings.item_dimensions) if settings.item_dimensions else None
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        fan_outs = settings.fan_outs or (None,) * count
        keeps_all = settings.head_input == "all"
        self.convolutions = nn.ModuleList(
            Convolution(width if layer else inputs, settings, fan_outs[layer], carries=keeps_all and layer > 0)
            for layer in range(count)
        )
        outputs = width * (count if keeps_all else 1)
        self.G1 = nn.Linear(outputs if count else inputs, width)
        self.G2 = nn.Linear(width, width, bias=False)
        self.normalise_output = settings.normalise_output
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        state = np.random.SeedSequence((seed, _INITIALISATION)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.items is not None:
            nn.init.normal_(self.items.weight, std=FIRST_SPREAD, generator=generator)
        for convolution in self.convolutions:
            if isinstance(convolution, Convolution) and convolution.attention is not None:
                nn.init.zeros_(convolution.attention.weight)  # it begins as importance pooling

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Features' means and standard deviations, [F] each; a constant feature (0) is divided by 1."""
        self.mean.copy_(torch.as_tensor(mean, dtype=torch.float32))
        scale = torch.as_tensor(std, dtype=torch.float32)
        self.std.copy_(torch.where(scale > 0, scale, 1.0))

    def standardise(self, features: Tensor, ids: Tensor) -> Tensor:
        """[U, F] as stored, of any float type, and ids [U], to the first convolution's h0 [U, F + item_dimensions].

        An item that had no number when the network was made, or whose id is below 0, has zeros for a learned vector.
        """
        content = ((features.to(self.mean.dtype) - self.mean) / self.std).clamp(-CLIP, CLIP)
        if self.items is None:
            return content
        known = (ids >= 0) & (ids < self.items.num_embeddings)
        learned = self.items(torch.where(known, ids, 0)) * known[:, None]
        return torch.cat([content, learned], dim=1)

    def head(self, h: Tensor) -> Tensor:
        """[B, width of the last layer] to embeddings [B, d]."""
        embeddings = self.G2(F.relu(self.G1(h), inplace=True)).to(h.dtype)
        return normalise(embeddings) if self.normalise_output else embeddings

    def forward(self, features: Tensor, ids: Tensor, index: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
        """Embeddings [sizes[-1], d] of a mini-batch's seeds.

        features is [sizes[0], F], ids [sizes[0]]; layer k pools the lists index[:sizes[k]], weights[:sizes[k]], whose
        entries are below sizes[k - 1]: see model/minibatch.py.
        """
        h = self.standardise(features, ids)
        for convolution, size in zip(self.convolutions, sizes[1:], strict=True):
            h = convolution(h, index[:size], weights[:size])
        return self.head(h)
