"""What a forward pass gives back: logits, and captured tensors labelled with the tokens they belong to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gptoss_workbench.errors import SiteError
from gptoss_workbench.harmony.spans import Span, parse
from gptoss_workbench.hooks import pooled
from gptoss_workbench.hooks.capture import Layout
from gptoss_workbench.hooks.edits import SINK, Edit
from gptoss_workbench.hooks.sites import EVERY, POOLED, SITES
from gptoss_workbench.model.provenance import Provenance, Settings, record
from gptoss_workbench.store.saved import save

if TYPE_CHECKING:
    from gptoss_workbench.model.model import Model

Place = tuple[str, "int | None"]


class Run:
    """One prompt's forward pass. Tensors are the ones the model computed with; ``data`` is their labelled view.

    Attributes:
        ids: token ids of the prompt.
        positions: the tokens that were captured (all unless the capture selected some).
        edits: what was changed.
        settings: its place in the batch, and how its tokens were chosen as far as they were generated.
    """

    def __init__(
        self, model: Model, ids: Sequence[int], hidden: Tensor, kept: dict[Place, Tensor],
        positions: Sequence[int], edits: Sequence[Edit] = (), logits: Tensor | None = None,
        settings: Settings = Settings(),  # noqa: B008  # a frozen value
        layout: Layout = Layout(),  # noqa: B008
    ) -> None:
        self.model, self._kept, self._logits, self._data = model, kept, logits, None
        self.ids, self.positions, self.edits = list(ids), list(positions), tuple(edits)
        self.hidden = hidden  #: (token, d_model), after the final norm
        self.layout = layout  #: how captured tensors are labelled where only parts were kept
        self._spans: list[Span] | None = None
        self.settings, self._created, self._provenance = settings, time.time(), None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        sites = ", ".join(dict.fromkeys(site for site, _ in self._kept)) or "nothing"
        edits = f", edits={list(self.edits)!r}" if self.edits else ""
        return f"<Run of {len(self.ids)} tokens on {self.model.name}, captured: {sites}{edits}>"

    @property
    def tokens(self) -> list[str]:
        """The text of each token; bytes that are no whole UTF-8 character are written as \\xNN."""
        return [self.model.vocabulary.token_text(id) for id in self.ids]

    @property
    def spans(self) -> list[Span]:
        """The prompt cut into spans; together they are the ids."""
        if self._spans is None:
            self._spans = parse(self.ids, self.model.vocabulary)
        return self._spans

    @property
    def provenance(self) -> Provenance:
        """Where this run comes from: weights, versions, prompt ids, edits. Put together on first use."""
        if self._provenance is None:
            prompt = len(self.ids) - self.settings.generated
            self._provenance = record(self.model, self.ids[:prompt], generated=self.ids[prompt:], edits=self.edits,
                                      settings=self.settings, created=self._created)
        return self._provenance

    @property
    def logits(self) -> Tensor:
        """Next-token logits (token, vocab) in the compute dtype, made on first use from the last hidden states."""
        if self._logits is None:
            with torch.no_grad():
                self._logits = self.model.transformer.unembed(self.hidden)
        return self._logits

    def tensor(self, site: str, layer: int | None = None) -> Tensor:
        """A captured tensor as computed, without padding: the dimensions of the site, ``layer`` first when it is None.

        Raises:
            SiteError: it was not captured.
        """
        if (site, layer) in self._kept:
            return self._kept[site, layer]
        stacked = [tensor for (name, _), tensor in self._kept.items() if name == site]
        if layer is not None or not stacked:
            there = ", ".join(dict.fromkeys(f"{name}" for name, _ in self._kept)) or "nothing"
            raise SiteError(
                f"The run holds no {site!r}" + (f" of layer {layer}." if layer is not None else "."),
                expected=there, got=site, hint=f'Run again with capture=["{site}"].',
            )
        return torch.stack(stacked)

    def layers(self, site: str) -> list[int]:
        """The layers of a site that were captured, ascending; empty when none was."""
        return [layer for name, layer in self._kept if name == site and layer is not None]

    @property
    def data(self) -> xr.Dataset:
        """Everything captured, one variable a site, stacked over layers. bfloat16 is widened to float32, exactly.

        ``attrs["provenance"]`` is the run's provenance as JSON, so it is saved with whatever saves the data.
        """
        if self._data is None:
            self._data = self._dataset()
        return self._data

    def _dataset(self) -> xr.Dataset:
        variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        layers: list[int] = []
        for site in dict.fromkeys(site for site, _ in self._kept):
            spec, dims = EVERY[site], self.layout.dims.get(site, EVERY[site].dims)
            values = to_numpy(self.tensor(site))
            variables[site] = (("layer", *dims) if spec.per_layer else dims, values)
            if spec.per_layer:
                layers = self.layers(site)
        _pad_scores(variables)
        used = {dim for dims, _ in variables.values() for dim in dims} | {"token"}
        coords: dict[str, object] = {**self.token_coords("token")}
        if "layer" in used:
            coords["layer"] = layers
            coords["band"] = ("layer", [self.model.config.bands[layer] for layer in layers])
        if "query" in used:
            coords["query"] = self.positions
        if "key" in used:
            keys = max(dims_values[1].shape[-1] for name, dims_values in variables.items() if "key" in dims_values[0])
            coords["key"] = _key_labels(keys - 1)
        for dim, labels in self.layout.coords.items():
            coords[dim] = (dim, _labels(labels))
        attrs = {"model": self.model.name, "dtype": self.model.dtype, "edits": [repr(edit) for edit in self.edits],
                 "provenance": self.provenance.to_json()}
        return xr.Dataset(variables, coords=coords, attrs=attrs)

    def token_coords(self, dim: str) -> dict[str, object]:
        """The labels of the captured tokens along a dimension."""
        spans = self.spans
        at = [span for span in spans for _ in range(span.start, span.stop)]
        chosen = [at[position] for position in self.positions]
        texts = self.tokens

        def column(values: Sequence[object]) -> tuple[str, np.ndarray]:
            array = np.empty(len(values), dtype=object)
            array[:] = values
            return dim, array

        return {
            dim: self.positions,
            "text": column([texts[position] for position in self.positions]),
            "id": (dim, np.array([self.ids[position] for position in self.positions], dtype=np.int64)),
            "role": column([span.role for span in chosen]),
            "channel": column([span.channel for span in chosen]),
            "recipient": column([span.recipient for span in chosen]),
            "message": (dim, np.array([span.message for span in chosen], dtype=np.int64)),
            "field": column([span.field for span in chosen]),
        }

    def select(self, **labels: object) -> xr.Dataset:
        """The captured data of the tokens that carry these labels.

        Args:
            labels: any of role, channel, recipient, message, field, text, id; a value or a list of values. E.g.
                ``run.select(channel="analysis", field="content")`` is the chain of thought.

        Raises:
            SiteError: a label that tokens do not have.
        """
        coords = self.token_coords("token")
        known = [name for name in coords if name != "token"]
        keep = np.ones(len(self.positions), dtype=bool)
        for name, wanted in labels.items():
            if name not in known:
                raise SiteError(f"Tokens have no label {name!r}.", expected=", ".join(known), got=name)
            allowed = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
            keep &= np.array([value in allowed for value in coords[name][1]], dtype=bool)  # type: ignore[index]
        chosen = np.flatnonzero(keep)
        dims = {dim: chosen for dim in ("token", "query") if dim in self.data.dims}
        return self.data.isel(dims)

    def to_dataframe(self) -> object:
        """The captured data as a pandas DataFrame, indexed by its dimensions."""
        return self.data.to_dataframe()

    def to_zarr(self, path: str | Path) -> None:
        """Write the captured data, its labels and its provenance to a new zarr store; ``wb.open_data`` reads it back.

        Raises:
            WorkbenchError: there is something at ``path``, or zarr is not installed.
        """
        save(self.data, path)


class RunBatch(Sequence[Run]):
    """The runs of a batch. Each row is a Run of its own, without padding; ``data`` stacks them, padded on the left."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = list(runs)

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index):  # type: ignore[override]
        return self._runs[index]

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __repr__(self) -> str:
        return f"<RunBatch of {len(self)} prompts>"

    @property
    def ids(self) -> list[list[int]]:
        return [run.ids for run in self._runs]

    @property
    def tokens(self) -> list[list[str]]:
        return [run.tokens for run in self._runs]

    @property
    def spans(self) -> list[list[Span]]:
        return [run.spans for run in self._runs]

    @property
    def provenance(self) -> list[Provenance]:
        """That of each row."""
        return [run.provenance for run in self._runs]

    @property
    def logits(self) -> Tensor:
        """(prompt, token, vocab), shorter prompts padded on the left with NaN."""
        longest = max(len(run) for run in self._runs)
        out = self._runs[0].logits.new_full((len(self), longest, self._runs[0].logits.shape[-1]), float("nan"))
        for i, run in enumerate(self._runs):
            out[i, longest - len(run):] = run.logits
        return out

    @property
    def data(self) -> xr.Dataset:
        """Captures with a leading ``prompt`` dimension. ``token`` counts columns of the padded batch.

        Padded places hold NaN in floating-point variables, -1 in integer ones, None in text labels. Prompts that were
        not captured are left out.
        ``attrs["provenance"]`` is a JSON list, one record a row.
        """
        shown = [number for number, run in enumerate(self._runs) if run.layout.dims]
        shown = shown or list(range(len(self)))  # nothing was captured: the tokens alone
        longest = max(len(self._runs[number].positions) for number in shown)
        keys = max(len(self._runs[number]) for number in shown)
        widest = max((_span_labels(self._runs[number]) for number in shown), key=len)
        rows = []
        for run in (self._runs[number] for number in shown):
            missing = longest - len(run.positions)
            row = run.data.reset_coords([name for name in run.token_coords("token") if name != "token"])
            for dim in ("token", "query"):
                if dim in row.dims:
                    row = row.assign_coords({dim: np.arange(missing, longest)}).reindex({dim: np.arange(longest)})
            if "key" in row.dims:
                row = row.assign_coords(key=_key_labels(keys)[keys + 1 - row.sizes["key"]:])
                row = row.reindex(key=_key_labels(keys))
            if widest and "query_span" in row.dims:
                row = row.reindex(query_span=_labels(widest[:-1]), key_span=_labels(widest))
            rows.append(_restore_ints(row, run.data))
        stacked = xr.concat(rows, dim="prompt", coords="minimal", compat="override", join="exact")
        labels = [name for name in self._runs[shown[0]].token_coords("token") if name != "token"]
        records = json.dumps([one.to_dict() for one in self.provenance])
        return stacked.set_coords(labels).assign_coords(prompt=shown).assign_attrs(provenance=records)

    def to_zarr(self, path: str | Path) -> None:
        """As for a ``Run``, of all rows together."""
        save(self.data, path)


def _span_labels(run: Run) -> Sequence[object]:
    return run.layout.coords.get("key_span", ())


def to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _labels(labels: Sequence[object]) -> np.ndarray:
    """Whole numbers as such, or objects where words are among them."""
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, dtype=np.int64)
    mixed = np.empty(len(labels), dtype=object)
    mixed[:] = labels
    return mixed


def _key_labels(keys: int) -> np.ndarray:
    labels = np.empty(keys + 1, dtype=object)
    labels[:] = [*range(keys), SINK]
    return labels


def _pad_scores(variables: dict[str, tuple[tuple[str, ...], np.ndarray]]) -> None:
    """Scores have no sink; they get a NaN column so that they share their keys with the pattern."""
    dims_and_values = variables.get("attn.scores")
    if dims_and_values is not None:
        dims, values = dims_and_values
        blank = np.full((*values.shape[:-1], 1), np.nan, dtype=values.dtype)
        variables["attn.scores"] = (dims, np.concatenate((values, blank), axis=-1))


def _restore_ints(padded: xr.Dataset, original: xr.Dataset) -> xr.Dataset:
    """Padding turned integers into floats with NaN; -1 marks the padded places instead."""
    for name, variable in padded.data_vars.items():
        source = original[name].dtype
        if np.issubdtype(source, np.integer) and variable.dtype != source:
            padded[name] = variable.fillna(-1).astype(source)
        elif source.kind == "O":
            padded[name] = variable.where(variable.notnull(), None)
    return padded


def join_chunks(kept: dict[Place, list[Tensor]], keys: int | None = None) -> dict[Place, Tensor]:
    """Chunks of one prompt put together along the tokens; attention maps grow keys that were not there yet, at zero.

    Args:
        keys: how many keys the maps have in the end; None for those of the last chunk.
    """
    joined = {}
    for (site, layer), chunks in kept.items():
        if site in POOLED:
            joined[site, layer] = pooled.join(site, chunks)
            continue
        spec = SITES[site]
        if "key" in spec.dims:
            has_sink = site == "attn.pattern"
            width = chunks[-1].shape[-1] if keys is None else keys + has_sink
            chunks = [_with_keys(chunk, width, has_sink) for chunk in chunks]
        axis = spec.dims.index(spec.token_dim)
        joined[site, layer] = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=axis)
    return joined


def _with_keys(chunk: Tensor, width: int, has_sink: bool) -> Tensor:
    """A key that came later has no weight: 0 in a pattern, -inf in scores; the sink stays last."""
    if chunk.shape[-1] == width:
        return chunk
    extra = chunk.new_full((*chunk.shape[:-1], width - chunk.shape[-1]), 0.0 if has_sink else float("-inf"))
    body, sink = (chunk[..., :-1], chunk[..., -1:]) if has_sink else (chunk, chunk[..., :0])
    return torch.cat((body, extra, sink), dim=-1)
