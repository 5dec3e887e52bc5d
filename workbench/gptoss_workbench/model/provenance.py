"""What a result came from: model, weights, versions, settings, prompt and edits, as plain data that JSON can hold.

Nothing here runs before somebody asks: a run keeps what it was given, and ``run.provenance`` describes it then.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from gptoss_workbench.errors import WorkbenchError
from gptoss_workbench.model.describe import describe
from gptoss_workbench.model.published import differences

if TYPE_CHECKING:
    from gptoss_workbench.model.config import ModelConfig
    from gptoss_workbench.model.model import Model
    from gptoss_workbench.model.sampling import Sampling

SCHEMA = 1
"""Raised when a field changes its meaning."""

_PACKAGES = ("torch", "safetensors", "numpy")
_SECRETS = (
    (re.compile(r"hf_[A-Za-z0-9]{8,}"), "hf_..."),
    (re.compile(r"(authorization\s*:)[^\r\n]*", re.IGNORECASE), r"\1 ..."),
)


@dataclass(frozen=True, repr=False)
class Provenance:
    """Where a result comes from. Equal records mean equal circumstances; printing one shows it on a screen.

    Attributes:
        model: the name it was loaded as.
        revision: the commit on the Hub, where the weights came from there.
        digest: sha256 of what ``digest_of`` names; None for a model that was not read from files.
        digest_of: "model.safetensors" where the folder states that file's sum; else "config.json and headers".
        weights_verified: "sha256" when every weights file was held against a known sum, "size" when the tensors
            take as many bytes as the published model, "none" when nobody verified; see ``wb.verify``.
        config: sha256 of the configuration as sorted JSON.
        config_changes: constants that differ from those of the published model of this size, with both values.
        dtype, device, kernels: what computed.
        versions: of python, gptoss_workbench and the packages that can change a number.
        prompt, prompt_digest: token ids, and the sha256 of their decimals with blanks between them.
        generated: ids that were generated after the prompt.
        row, rows: place in the batch, counted from 0, and its size; sums of another batch may round otherwise.
        chunk: tokens read at a time; None for all.
        sampling: temperature, top_k, top_p, min_p, seed, max_tokens and stop ids of a generation.
        edits: what was changed, in order; a tensor stands there by its shape, its dtype and a sha256.
        method: name and arguments of the experiment, if the result is of one.
        created: UTC, when the result was computed.
        schema: version of this record.

    What looks like an access token is never kept.
    """

    model: str
    revision: str | None = None
    digest: str | None = None
    digest_of: str | None = None
    weights_verified: str = "none"
    config: str | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    device: str = ""
    kernels: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    prompt: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    row: int = 0
    rows: int = 1
    chunk: int | None = None
    sampling: Mapping[str, Any] | None = None
    edits: tuple[Mapping[str, Any], ...] = ()
    method: Mapping[str, Any] | None = None
    created: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in ("prompt", "generated", "edits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("prompt", "generated"):  # numbers only, and many of them
                object.__setattr__(self, one.name, redacted(value))

    @property
    def prompt_digest(self) -> str:
        return ids_digest(self.prompt)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the result: everything but ``created`` and ``weights_verified``."""
        said = self.to_dict()
        del said["created"], said["weights_verified"]
        return digest_of_json(said)

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        said = {one.name: getattr(self, one.name) for one in fields(self)}
        said |= {"prompt": list(self.prompt), "generated": list(self.generated), "edits": list(self.edits)}
        return {**said, "prompt_digest": self.prompt_digest}

    def to_json(self) -> str:
        """One line of ASCII; ``from_json`` gives an equal record back."""
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """The record that ``to_json`` wrote.

        Raises:
            WorkbenchError: the text is none.
        """
        try:
            said = json.loads(text)
        except (TypeError, ValueError) as error:
            raise WorkbenchError("this is no provenance record", expected="what Provenance.to_json wrote",
                                 got=f"{str(text)[:60]!r}: {error}"[:200]) from error
        return cls.from_dict(said)

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Provenance:
        """The record that ``to_dict`` wrote.

        Raises:
            WorkbenchError: fields are missing or unknown, it is of another schema, or its digest is not its prompt's.
        """
        names = {one.name for one in fields(cls)}
        if not isinstance(said, Mapping) or said.get("schema") != SCHEMA:
            got = f"schema {said.get('schema')!r}" if isinstance(said, Mapping) else type(said).__name__
            raise WorkbenchError("this is no provenance record", expected=f"an object of schema {SCHEMA}", got=got)
        if set(said) != names | {"prompt_digest"}:
            odd = sorted(map(str, set(said) ^ (names | {"prompt_digest"})))
            raise WorkbenchError("a provenance record is incomplete, or has fields of its own",
                                 expected=", ".join(sorted(names)), got=f"missing or unknown: {', '.join(odd)}"[:200])
        found = cls(**{name: said[name] for name in names})
        if said["prompt_digest"] != found.prompt_digest:
            raise WorkbenchError("a provenance record was changed: its digest is not that of its prompt",
                                 expected=found.prompt_digest, got=str(said["prompt_digest"])[:80])
        return found

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        at = f" at {self.revision}" if self.revision else ""
        yield f"model      {self.model}{at}, weights verified: {self.weights_verified}"
        yield f"digest     {self.digest or 'none'}" + (f" ({self.digest_of})" if self.digest_of else "")
        changes = f", changed: {', '.join(self.config_changes)}" if self.config_changes else ""
        yield f"config     {self.config}{changes}"
        yield f"computed   {self.dtype} on {self.device}, kernels: {self.kernels}, {self.created}"
        yield "versions   " + ", ".join(f"{name} {version}" for name, version in self.versions.items())
        if self.prompt:
            batch = f", row {self.row} of {self.rows}" if self.rows > 1 else ""
            chunk = f", {self.chunk} tokens at a time" if self.chunk else ""
            yield f"prompt     {len(self.prompt)} tokens, {self.prompt_digest}{batch}{chunk}"
        if self.sampling is not None:
            yield f"generated  {len(self.generated)} tokens: {json.dumps(self.sampling)}"
        if self.method is not None:
            yield f"method     {json.dumps(self.method)}"[:200]
        for edit in self.edits[:5]:
            yield f"edit       {json.dumps(edit)}"[:200]
        if len(self.edits) > 5:
            yield f"           and {len(self.edits) - 5} more edits"


class Settings(NamedTuple):
    """How one prompt was run, beside the prompt and the edits; attributes as in ``Provenance``.

    ``generated`` counts how many of a run's ids, its last ones, were generated.
    """

    row: int = 0
    rows: int = 1
    chunk: int | None = None
    generated: int = 0
    how: Sampling | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: frozenset[int] = frozenset()

    def sampling(self) -> dict[str, Any] | None:
        if self.how is None:
            return None
        return {**asdict(self.how), "seed": self.seed, "max_tokens": self.max_tokens, "stop": sorted(self.stop)}


def record(
    model: Model, prompt: Sequence[int], *, generated: Sequence[int] = (), edits: Sequence[Any] = (),
    settings: Settings | None = None, created: float,
) -> Provenance:
    """Describe what was run.

    Args:
        prompt, generated: token ids.
        edits: the ``Edit`` values.
        created: seconds since 1970.
    """
    settings = settings or Settings()
    origin = model.origin
    return Provenance(
        model=model.name,
        revision=origin.revision if origin else None,
        digest=origin.digest if origin else None,
        digest_of=origin.digest_of if origin else None,
        weights_verified=origin.verified if origin else "none",
        config=config_digest(model.config), config_changes=describe(differences(model.config)),
        dtype=model.dtype, device=device_name(str(model.device)), kernels=model.transformer.kernels.name,
        versions=dict(versions()),
        prompt=tuple(prompt), generated=tuple(generated),
        row=settings.row, rows=settings.rows, chunk=settings.chunk, sampling=settings.sampling(),
        edits=tuple(describe(edit) for edit in edits), created=utc(created),
    )


@cache
def config_digest(config: ModelConfig) -> str:
    return digest_of_json(describe(asdict(config)))


def digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def with_method(provenance: Provenance, method: str, **arguments: Any) -> str:
    """The record of an experiment made from a run, as JSON for the ``attrs`` of its result."""
    return replace(provenance, method={"name": method, "arguments": describe(arguments)}).to_json()


def ids_digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@cache
def versions() -> dict[str, str]:
    """Of everything that can change a number."""
    import gptoss_workbench

    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"gptoss_workbench": gptoss_workbench.__version__, "python": platform.python_version(), **found}


@cache
def device_name(device: str) -> str:
    """The device, and which GPU it is."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def redacted(value: Any) -> Any:
    """The same plain data without anything that looks like an access token."""
    if isinstance(value, str):
        for pattern, instead in _SECRETS:
            value = pattern.sub(instead, value)
        return value
    if isinstance(value, Mapping):
        return {redacted(name): redacted(one) for name, one in value.items()}
    if isinstance(value, list):
        return [redacted(one) for one in value]
    if isinstance(value, tuple):
        return tuple(redacted(one) for one in value)
    return value
