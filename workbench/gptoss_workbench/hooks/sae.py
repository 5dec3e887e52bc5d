"""Sparse autoencoders: what a site holds, written as a sum of few features, each of which can be changed alone.

``wb.load_sae`` reads them; see there for the files. The four architectures, with u = (normalised x) - b_dec where
``subtract_decoder_bias``, else the normalised x:

- standard: f = relu(u W_enc + b_enc) (Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023).
- topk: relu of the k largest of u W_enc + b_enc, the rest 0 (Gao et al. 2024, arXiv 2406.04093).
- jumprelu: p where p = u W_enc + b_enc is above a threshold of each feature, and positive; else 0 (Rajamanoharan et al.
  2024, arXiv 2407.14435). A BatchTopK autoencoder is one of these once it is trained (Bussmann et al. 2024, arXiv
  2412.06410).
- gated: relu(exp(r_mag) (u W_enc) + b_mag) where u W_enc + b_gate > 0, else 0 (Rajamanoharan et al. 2024, arXiv
  2404.16014).

x is decoded as f W_dec + b_dec, in the units of x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gptoss_workbench.errors import EditError, ExperimentError
from gptoss_workbench.hooks.edits import Edit, place_of
from gptoss_workbench.hooks.selection import Indices, freeze, resolve
from gptoss_workbench.hooks.values import finite

ROWS_AT_ONCE = 256  # tokens times d_sae are held: 131,072 features take half a megabyte a token
EPS = 1e-5


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder of one site, a value: equal to one that computes the same.

    Computes in float32; nothing writes into its tensors.

    Attributes:
        name: where it was read from.
        architecture: "standard", "topk", "jumprelu" or "gated".
        site, layer: what it reads and reconstructs.
        w_enc, w_dec: (d_in, d_sae) and (d_sae, d_in) float32.
        b_dec: (d_in).
        b_enc: (d_sae); the gated one's b_mag.
        threshold: (d_sae) of jumprelu.
        b_gate, r_mag: (d_sae) of the gated one.
        k: of topk.
        subtract_decoder_bias: whether b_dec is taken off before encoding.
        normalize: "none", "constant_norm_rescale" (to length sqrt(d_in)) or "layer_norm" (no scale, no shift).
        model: the model it was trained on, as the file says.
        source: the folder it was read from, or the name on the Hub; None for one that was made here.
    """

    name: str
    architecture: str
    site: str
    layer: int
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    k: int | None = None
    subtract_decoder_bias: bool = True
    normalize: str = "none"
    model: str | None = None
    source: str | None = None

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.w_enc.shape[1]

    def __repr__(self) -> str:
        k = f" {self.k}" if self.k else ""
        return f"<SAE {self.name}: {self.architecture}{k}, {self.d_sae:,} features of {self.site}.{self.layer}>"

    @cached_property
    def digest(self) -> str:
        """sha256 in hexadecimal of all that decides what it computes; of a large one it takes seconds, once."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)
                   if isinstance(getattr(self, one.name), Tensor)}
        plain = (self.architecture, self.site, self.layer, self.k, self.subtract_decoder_bias, self.normalize)
        made = hashlib.sha256(repr((plain, [(name, tuple(one.shape)) for name, one in tensors.items()])).encode())
        for tensor in tensors.values():
            made.update(tensor.detach().cpu().float().contiguous().numpy())
        return made.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether both compute the same, wherever they were read from."""
        if not isinstance(other, SAE):
            return NotImplemented
        return self is other or (self.w_enc.shape == other.w_enc.shape and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    @torch.no_grad()
    def encode(self, x: Tensor, features: Sequence[int] | None = None) -> Tensor:
        """x (..., d_in) -> how strong each feature is, (..., d_sae) float32, or of some features only.

        Raises:
            ExperimentError: x has another width, or there is no such feature.
        """
        flat = self._wide(x).reshape(-1, self.d_in)
        chosen = None if features is None else self.numbers(features)
        parts = [self._encode(rows, chosen) for rows in flat.split(ROWS_AT_ONCE)]
        found = torch.cat(parts) if parts else flat.new_zeros(0, self.d_sae if chosen is None else len(chosen))
        return found.reshape(*x.shape[:-1], found.shape[-1])

    @torch.no_grad()
    def decode(self, features: Tensor, like: Tensor | None = None) -> Tensor:
        """Features (..., d_sae) -> (..., d_in) float32.

        Args:
            like: the x they were encoded from; needed where x was normalised, to bring its length back.
        """
        if self.normalize != "none" and like is None:
            raise ExperimentError("This SAE normalises what it reads, so it decodes beside what was read.",
                                  expected="like= with the x that was encoded", got="features alone")
        made = features.to(self.w_dec) @ self.w_dec + self.b_dec
        if like is None:
            return made
        scale, shift = self._length(self._wide(like))
        return made * scale + shift

    def error(self, x: Tensor) -> Tensor:
        """What it does not explain: x - decode(encode(x)), (..., d_in) float32."""
        return self._wide(x) - self.decode(self.encode(x), like=x)

    def ablate(
        self, features: Indices, *, tokens: Indices = None, prompt: Indices = None, keep_error: bool = True,
    ) -> Edit:
        """Take features away where they are active; see ``wb.steer_features``."""
        return steer_features(self, features, scale=0.0, tokens=tokens, prompt=prompt, keep_error=keep_error)

    def steer(
        self, features: Indices, *, scale: float | None = None, add: float | None = None, set: float | None = None,
        tokens: Indices = None, prompt: Indices = None, keep_error: bool = True,
    ) -> Edit:
        """Change how strong features are; see ``wb.steer_features``."""
        return steer_features(self, features, scale=scale, add=add, set=set, tokens=tokens, prompt=prompt,
                              keep_error=keep_error)

    @torch.no_grad()
    def changed(self, x: Tensor, features: Sequence[int], how: str, value: float, keep_error: bool = True) -> Tensor:
        """What ``wb.steer_features`` puts in the place of x (token, d_in), in its dtype.

        Args:
            x: (token, head, d_head) of one width together is the same.
            how: "scale", "add" or "set".

        Raises:
            EditError: x has another width.
        """
        flat = x.flatten(1)
        if flat.shape[1] != self.d_in:
            raise EditError("The SAE is of another width than the site.", expected=f"{self.d_in} values a token",
                            got=f"{flat.shape[1]}", hint=f"It was trained on {self.model or 'another model'}.")
        if keep_error and not features:
            return x
        wide = flat.to(device=self.w_enc.device, dtype=torch.float32)
        now = self.encode(wide, features)
        apart = {"scale": now * (value - 1), "add": torch.full_like(now, value), "set": value - now}[how]
        moved = (apart @ self.w_dec[list(features)]) * self._length(wide)[0]
        rest = wide if keep_error else self.decode(self.encode(wide), like=wide)
        return (rest + moved).reshape(x.shape).to(x)

    def _encode(self, x: Tensor, chosen: list[int] | None) -> Tensor:
        """x (row, d_in) float32 -> (row, feature)."""
        scale, shift = self._length(x)
        u = (x - shift) / (scale + (EPS if self.normalize == "layer_norm" else 0.0))
        if self.subtract_decoder_bias:
            u = u - self.b_dec
        if self.k is not None:  # which are among the k depends on all of them
            strength = u @ self.w_enc + self.b_enc
            best = strength.topk(self.k, dim=-1)
            found = torch.zeros_like(strength).scatter_(-1, best.indices, best.values.relu())
            return found if chosen is None else found[:, chosen]
        columns: Any = slice(None) if chosen is None else chosen
        before = u @ self.w_enc[:, columns]
        if self.b_gate is not None and self.r_mag is not None:
            size = (before * self.r_mag[columns].exp() + self.b_enc[columns]).relu()
            return size * (before + self.b_gate[columns] > 0)
        strength = before + self.b_enc[columns]
        found = strength.relu()
        return found if self.threshold is None else found * (strength > self.threshold[columns])

    def _length(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What normalisation divides x by and takes off before, (..., 1) each."""
        if self.normalize == "constant_norm_rescale":
            return x.norm(dim=-1, keepdim=True) / self.d_in**0.5, x.new_zeros(())
        if self.normalize == "layer_norm":
            return x.std(dim=-1, keepdim=True), x.mean(dim=-1, keepdim=True)
        return x.new_ones(()), x.new_zeros(())

    def _wide(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise ExperimentError("The SAE is of another width.", expected=f"{self.d_in} values a token",
                                  got=f"{x.shape[-1]} in {tuple(x.shape)}", hint=f"It reads {self.site}.{self.layer}.")
        return x.to(device=self.w_enc.device, dtype=torch.float32)

    def numbers(self, features: Indices | Sequence[int]) -> list[int]:
        """Features by number; negative ones count from the end."""
        try:
            return resolve(freeze(features), self.d_sae, "feature")
        except Exception as error:
            raise ExperimentError("There is no such feature.", expected=f"0 to {self.d_sae - 1}",
                                  got=repr(features)[:80]) from error


def steer_features(
    sae: SAE, features: Indices, *, scale: float | None = None, add: float | None = None, set: float | None = None,
    tokens: Indices = None, prompt: Indices = None, keep_error: bool = True,
) -> Edit:
    """Change how strong features are: x becomes x + decode(f') - decode(f), f' being f with the change.

    It acts at the SAE's own site and layer. What the SAE does not explain stays as it is (Marks et al. 2024, arXiv
    2403.19647), so a change of nothing changes no bit.

    Args:
        features: an index, a list or a slice.
        scale, add, set: one of them: f' = scale f, f + add, or set.
        tokens, prompt: as for ``wb.set``.
        keep_error: False puts decode(f') there instead, without what the SAE does not explain.

    Returns:
        An Edit. In JSON an SAE stands by the folder it was read from and the sha256 of all that it holds, since its
        weights are too many; ``wb.edit_from_json`` reads the folder again, or takes ``sae=``, and refuses another SAE.

    Raises:
        ExperimentError: no such feature.
        EditError: not exactly one change, or one that is no finite number.

    Pitfalls: features of a model's size are often split among several, so one alone may do little. Strengths far
    beyond those seen in text leave the data that the SAE was trained on.
    """
    given = {name: value for name, value in (("scale", scale), ("add", add), ("set", set)) if value is not None}
    if len(given) != 1:
        raise EditError("A feature is changed in one way.", expected="one of scale=, add=, set=",
                        got=", ".join(given) or "none")
    ((how, value),) = given.items()
    args: tuple[tuple[str, Any], ...] = (("sae", sae), ("features", tuple(sae.numbers(features))),
                                         (how, finite(value, f"The {how} of a feature")))
    return Edit("steer_features", place_of(sae.site, sae.layer, tokens, prompt),
                args if keep_error else (*args, ("keep_error", False)))
