"""The o200k ranks in their four forms, each proven by the hash that openai-harmony demands.

*Ranks* are a list of 199,998 byte strings in rank order. The forms: the ``.tiktoken`` file (lines of
base64 and rank), the packed asset (lengths, then bytes, xz), and ``model.vocab`` of a ``tokenizer.json``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import lzma
from pathlib import Path

from gptoss_workbench.errors import VocabularyError
from gptoss_workbench.harmony.tokens import NAMES, RANKS, SIZE

SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
"""sha256 of ``o200k_base.tiktoken``, as openai-harmony has it built in."""


def to_tiktoken(ranks: list[bytes], *, where: str | None = None) -> bytes:
    """Ranks -> the bytes of ``o200k_base.tiktoken`` (3,613,922 of them).

    Args:
        ranks: byte strings in rank order.
        where: the place the ranks came from, for the error.

    Raises:
        VocabularyError: they are not the o200k ranks.
    """
    data = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    got = hashlib.sha256(data).hexdigest()
    if got != SHA256:
        raise VocabularyError(
            "This is not the o200k vocabulary of gpt-oss.", where=where, expected=f"sha256 {SHA256}",
            got=f"sha256 {got} of {len(ranks)} ranks", hint="take the file of a gpt-oss checkpoint",
        )
    return data


def from_tiktoken(data: bytes, *, where: str | None = None) -> list[bytes]:
    """The bytes of a ``.tiktoken`` file -> ranks; VocabularyError if they are not o200k's."""
    try:
        ranks = [base64.b64decode(line.split()[0], validate=True) for line in data.splitlines() if line]
    except (binascii.Error, IndexError) as error:
        raise VocabularyError(
            "A damaged vocabulary file.", where=where, expected="lines of base64 and rank", got=error,
            hint="download the file again",
        ) from error
    to_tiktoken(ranks, where=where)
    return ranks


def pack(ranks: list[bytes]) -> bytes:
    """Ranks -> the packed asset: one length byte for each rank, then all their bytes, xz-compressed."""
    return lzma.compress(bytes(map(len, ranks)) + b"".join(ranks), preset=9 | lzma.PRESET_EXTREME)


def unpack(blob: bytes, *, where: str | None = None) -> list[bytes]:
    """The packed asset -> ranks. The caller proves them with :func:`to_tiktoken`."""
    try:
        raw = lzma.decompress(blob)
    except lzma.LZMAError as error:
        raise VocabularyError(
            "The packed vocabulary is damaged.", where=where, expected="an xz file", got=error,
            hint="install gptoss-workbench again",
        ) from error
    ends = list(itertools.accumulate(raw[:RANKS], initial=RANKS))
    return [raw[start:stop] for start, stop in itertools.pairwise(ends)]


def from_tokenizer_json(path: Path) -> list[bytes]:
    """The ``tokenizer.json`` of a checkpoint -> ranks: the ids in ``model.vocab``. Where it lists special tokens in
    ``added_tokens``, they must be those of gpt-oss.

    Raises:
        VocabularyError: the file is damaged, or holds another vocabulary.
    """
    alphabet = _byte_of_character()
    ranks: list[bytes | None] = [None] * RANKS
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        vocab, added = whole["model"]["vocab"], whole.get("added_tokens") or []
        specials = {token["content"]: token["id"] for token in added}
        for text, token in vocab.items():
            if 0 <= token < RANKS:
                ranks[token] = bytes(alphabet[character] for character in text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VocabularyError(
            "A tokenizer.json that cannot be read.", where=str(path),
            expected="JSON with model.vocab: text in the byte-level alphabet -> id",
            got=f"{type(error).__name__}: {error}"[:200], hint="download the file again, in full",
        ) from error
    found = [token for token in ranks if token is not None]
    if len(found) != RANKS:
        raise VocabularyError(
            "A tokenizer.json of another vocabulary.", where=str(path), expected=f"the ids 0..{RANKS - 1}",
            got=f"{len(found)} of them", hint="take the tokenizer.json of a gpt-oss checkpoint",
        )
    to_tiktoken(found, where=str(path))
    if specials:
        _check_specials(specials, path)
    return found


def _check_specials(specials: dict[str, int], path: Path) -> None:
    """Special tokens are found by id, so one that moved would mean something else to the model."""
    def refuse(expected: str, got: str) -> VocabularyError:
        return VocabularyError("The tokenizer does not belong to this model.", where=str(path), expected=expected,
                               got=got, hint="take the tokenizer.json of a gpt-oss checkpoint")

    for token, name in NAMES.items():
        if specials.get(name) != token:
            raise refuse(f"{name} to be {token}", f"{specials.get(name, 'no such token')}")
    odd = next((name for name, token in specials.items() if not RANKS <= token < SIZE), None)
    if odd is not None:
        raise refuse(f"special tokens from {RANKS} to {SIZE - 1}", f"{odd[:80]!r} is {specials[odd]}")


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
