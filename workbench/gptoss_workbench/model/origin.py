"""Where a model's weights came from, told without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptoss_workbench.model.files import Stamp
from gptoss_workbench.model.fingerprints import header_digest, revision_of
from gptoss_workbench.model.manifest import read_manifest
from gptoss_workbench.model.plan import GENERATION, Plan
from gptoss_workbench.model.shards import CONFIG

SHA256, SIZE, NONE = "sha256", "size", "none"
"""What is known of the weights: every file's sum was right, only their number of bytes is that of the published
model, or nobody looked."""

_VERDICTS: dict[tuple[Stamp, ...], str] = {}  # what was verified in this process, by the state of the files


@dataclass(frozen=True)
class Origin:
    """The files that a model was read from.

    Attributes:
        revision: their commit on the Hub, where they came from there.
        digest: sha256 in hexadecimal, of what ``digest_of`` names.
        digest_of: "model.safetensors" where there is one weights file and the folder states its sum; else
            "config.json and headers".
        stamps: what the weights files looked like before they were read.
    """

    revision: str | None
    digest: str
    digest_of: str
    stamps: tuple[Stamp, ...]

    @property
    def verified(self) -> str:
        """"sha256", "size" or "none": what ``wb.verify`` found about these very files, before or after loading."""
        return _VERDICTS.get(self.stamps, NONE)


def origin_of(plan: Plan, read: bool = False) -> Origin:
    """The origin of what a plan reads. Costs a read of the headers.

    Args:
        read: whether ``read_checkpoint`` has read the plan: where there is a manifest, it held every file to it.
    """
    manifest = read_manifest(plan.folder)
    if manifest and read:
        remember(plan.stamps, SHA256)
    digest, digest_of = _digest(plan, manifest)
    return Origin(revision_of(plan.folder), digest, digest_of, _key(plan.stamps))


def _digest(plan: Plan, manifest: dict[str, str]) -> tuple[str, str]:
    if len(plan.files) == 1 and plan.files[0].name in manifest:
        return manifest[plan.files[0].name], plan.files[0].name
    stops = [plan.folder / GENERATION] if (plan.folder / GENERATION).exists() else []
    return header_digest([plan.folder / CONFIG, *stops, *plan.files]), "config.json and headers"


def remember(stamps: Mapping[Path, Stamp], verdict: str) -> None:
    """Keep what was found about files, for as long as they stay as they are."""
    _VERDICTS[_key(stamps)] = verdict


def _key(stamps: Mapping[Path, Stamp]) -> tuple[Stamp, ...]:
    return tuple(stamps[file] for file in sorted(stamps))
