"""Keys and values in buffers of fixed size, for decoding by a recording: the next column is read on the device."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gptoss_workbench.model.cache import KVCache
from gptoss_workbench.model.config import ModelConfig

SMALLEST = 256
"""Columns of the smallest buffers."""


def capacity_for(columns: int) -> int:
    """How many columns buffers get that must hold some: a power of two, so that few sizes, hence recordings, occur."""
    return max(SMALLEST, 1 << (columns - 1).bit_length())


class StaticCache:
    """As ``KVCache`` for chunks of one token, but written in place.

    Columns beyond the newest hold zeros or what a generation before left there; their positions are later ones, so
    nobody looks at them.

    Args:
        batch: prompts.
        capacity: columns.
        column: (1,) int64, where the next token's keys and values go. Read on the device, when they are written.
        kernels: whose ``store_kv`` writes.

    Shapes: keys, values (layer, prompt, column, kv_head, d_head); positions (prompt, column) int64.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, column: Tensor, kernels: ModuleType, dtype: torch.dtype,
    ) -> None:
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=column.device)
        self.values = torch.zeros(shape, dtype=dtype, device=column.device)
        self.positions = torch.zeros(batch, capacity, dtype=torch.int64, device=column.device)
        self._column, self._kernels = column, kernels

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def load(self, cache: KVCache | StaticCache, columns: int) -> None:
        """Take over the first columns of another cache, layer by layer."""
        for layer in range(len(self.keys)):
            keys, values = cache.of_layer(layer)
            self.keys[layer, :, :columns] = keys[:, :columns]
            self.values[layer, :, :columns] = values[:, :columns]
        first = cache.positions[:, :1]  # positions count up from column to column
        self.positions.copy_(first + torch.arange(self.capacity, device=first.device))

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """(prompt, column, kv_head, d_head) of both."""
        return self.keys[layer], self.values[layer]

    def extend(self, positions: Tensor) -> Tensor:
        """As ``KVCache.extend``: the positions of all columns."""
        return self.positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next column of a layer, (prompt, 1, kv_head, d_head); give all columns."""
        keys, values = self.of_layer(layer)
        self._kernels.store_kv(keys, values, k, v, self._column)
        return keys, values
