"""Keys and values of the tokens already read."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Rotated keys and values of every layer, and the position of each cached column.

    Tensors are never written in place: appending makes new ones. So a fork costs nothing, and what was captured or
    forked earlier can't change later. Sliding layers keep every key too; the mask hides what their band can't reach.

    Shapes: keys, values per layer (prompt, key, kv_head, d_head); positions (prompt, key) int64, negative for padding.
    """

    def __init__(self, num_layers: int, batch: int, device: torch.device | str = "cpu") -> None:
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self.positions = torch.empty(batch, 0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Columns cached so far, padding included."""
        return self.positions.shape[1]

    def extend(self, positions: Tensor) -> Tensor:
        """Add the columns of a new chunk, (prompt, token), and give the positions of all columns."""
        self.positions = torch.cat((self.positions, positions), dim=1)
        return self.positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a chunk's keys and values (prompt, token, kv_head, d_head) to a layer; give all of that layer's."""
        old_k, old_v = self._keys[layer], self._values[layer]
        if old_k is not None and old_v is not None:
            k, v = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)
        self._keys[layer], self._values[layer] = k, v
        return k, v

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that has been read."""
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None
        return keys, values

    def fork(self) -> KVCache:
        """An independent continuation from here; shares what is already cached."""
        other = KVCache(len(self._keys), self.positions.shape[0], self.positions.device)
        other._keys, other._values, other.positions = list(self._keys), list(self._values), self.positions
        return other

    def select(self, rows: Tensor) -> KVCache:
        """The same cache for some rows of the batch, in the given order (rows may repeat)."""
        other = KVCache(len(self._keys), 0, self.positions.device)
        other.positions = self.positions[rows]
        other._keys = [None if k is None else k[rows] for k in self._keys]
        other._values = [None if v is None else v[rows] for v in self._values]
        return other
