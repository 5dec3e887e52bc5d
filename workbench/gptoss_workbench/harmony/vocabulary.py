"""The vocabulary of gpt-oss, with no network: text to ids and back, and what each id looks like."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_workbench.errors import PromptError, VocabularyError
from gptoss_workbench.harmony import cache, ranks
from gptoss_workbench.harmony.tokens import RANKS, SIZE

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding

_lock = threading.Lock()
_loaded: Vocabulary | None = None
_checked: set[tuple[str, int, int]] = set()  # tokenizer.json files found right: path, size, mtime


class Vocabulary:
    """The 201,088 ids of gpt-oss. Get one with :func:`load_vocabulary`; it never changes.

    Attributes:
        encoding: the ``openai_harmony.HarmonyEncoding`` beneath.
        size: the number of ids, 201088: valid ids are 0 .. size - 1.
        special_ids: the ids that are no text: 199998 .. 201087.
    """

    size = SIZE

    def __init__(self, encoding: HarmonyEncoding) -> None:
        self.encoding = encoding
        self.special_ids = frozenset(range(RANKS, SIZE))
        # openai-harmony also makes <|reserved_201088|>, one past the last row of every embedding table.
        self._specials = encoding.special_tokens_set - {f"<|reserved_{SIZE}|>"}
        self._bytes: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"Vocabulary(o200k_harmony, {SIZE} ids)"

    def __len__(self) -> int:
        return SIZE

    def encode(self, text: str) -> list[int]:
        """Text -> ids, with special tokens recognised: ``<|start|>`` becomes one id.

        This reads a raw token stream. Text from a user belongs in a conversation (``chat``), where
        special tokens stay plain text. Lone surrogates become U+FFFD.
        """
        if not isinstance(text, str):
            raise PromptError("Only text can be encoded.", expected="str", got=type(text).__name__)
        allowed = self._specials if "<|" in text else frozenset()  # to hand over the whole set takes 0.1 ms
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, special tokens by name. Bytes that are no UTF-8 become U+FFFD; nothing else is lost.

        Raises:
            PromptError: an id outside 0..201087, or something that is no id.
        """
        return self.encoding.decode(check_ids(ids), errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; those of its name for a special token. PromptError outside 0..201087."""
        known = self._bytes.get(token)
        if known is None:
            (token,) = check_ids([token])
            # surrogateescape carries any byte through str and back unharmed
            text = self.encoding.decode([token], errors="surrogateescape")
            known = self._bytes[token] = text.encode("utf-8", "surrogateescape")
        return known

    def token_text(self, token: int) -> str:
        r"""One id as text: decoded where it is UTF-8, ``\xNN`` for each byte that is not."""
        return self.token_bytes(token).decode("utf-8", "backslashreplace")


def check_ids(ids: Iterable[int]) -> list[int]:
    """Ids as Python ints (tensors and numpy integers too); PromptError if one is not in 0..201087."""
    plain = as_ids(ids)
    wrong = next((i for i, token in enumerate(plain) if not 0 <= token < SIZE), None)
    if wrong is not None:
        raise PromptError(
            "A token id outside the vocabulary.", expected=f"ids in 0..{SIZE - 1}",
            got=f"{plain[wrong]} at index {wrong}", hint="ids come from model.encode or a generation",
        )
    return plain


def as_ids(ids: Iterable[int]) -> list[int]:
    """An iterable of integers of any kind and value as a list of ints; PromptError if it is none."""
    try:
        return list(map(operator.index, ids))
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(
            "These are no token ids.", expected="a flat sequence of integers",
            got=f"{type(ids).__name__}: {error}",
            hint="encode text first: model.encode(text)" if isinstance(ids, str) else None,
        ) from error


def load_vocabulary(folder: Path | str | None = None) -> Vocabulary:
    """The vocabulary, loaded once for each process (about 0.5 s) and then shared; safe from any thread.

    Args:
        folder: a checkpoint. If it holds a ``tokenizer.json``, that one is used, and must be o200k;
            otherwise, and without a folder, the vocabulary that comes with the package is.

    Raises:
        VocabularyError: the ``tokenizer.json`` is damaged or another vocabulary's; the user's
            ``TIKTOKEN_ENCODINGS_BASE`` leads nowhere or to another file; or nothing can be written.

    openai-harmony reads its vocabulary from a folder that an environment variable names, or downloads it.
    We put the file into a per-user cache (``$XDG_CACHE_HOME/gptoss-workbench``) and set the variable while
    it loads, so there is never a download.
    """
    global _loaded
    with _lock:
        make = _packaged
        if folder is not None and (path := Path(folder) / "tokenizer.json").is_file():
            # The right file gives the very same vocabulary, so the one already loaded still serves.
            make = _proven_ranks(path) or make
        if _loaded is None:
            own = cache.users_own_folder()
            source = own or cache.cached_folder(lambda: ranks.to_tiktoken(make()))
            _loaded = Vocabulary(_load_encoding(source))
        return _loaded


def check_tokenizer(folder: Path | str, rows: int) -> None:
    """Hold the ``tokenizer.json`` of a checkpoint, if it has one, to gpt-oss and to the model's vocabulary.

    Args:
        rows: how many tokens the model has an embedding for.

    Raises:
        VocabularyError: it is damaged, has other text or special tokens, or more tokens than the model.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return
    if rows != SIZE:
        raise VocabularyError(
            "The tokenizer does not belong to this model.", where=str(path),
            expected=f"{SIZE} tokens, as the tokenizer of gpt-oss has", got=f"vocab_size = {rows} in config.json",
            hint="take tokenizer.json and config.json from the same place",
        )
    with _lock:
        _proven_ranks(path)


def _proven_ranks(path: Path) -> Callable[[], list[bytes]] | None:
    """Prove a tokenizer.json right: once for each process, then None, for something is loaded by then."""
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key in _checked:
        return None
    found = ranks.from_tokenizer_json(path)
    _checked.add(key)
    return lambda: found


def _packaged() -> list[bytes]:
    asset = resources.files("gptoss_workbench.harmony") / "assets" / "o200k.bin.xz"
    try:
        return ranks.unpack(asset.read_bytes(), where=str(asset))
    except OSError as error:
        raise VocabularyError(
            "The packed vocabulary is missing.", where=str(asset), got=error,
            hint="install gptoss-workbench again",
        ) from error


def _load_encoding(folder: Path) -> HarmonyEncoding:
    from openai_harmony import HarmonyEncodingName, HarmonyError, load_harmony_encoding

    before = os.environ.get(cache.VARIABLE)
    os.environ[cache.VARIABLE] = str(folder)
    try:
        encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    except HarmonyError as error:
        raise VocabularyError(
            "openai-harmony could not load the vocabulary.", where=str(folder / cache.FILE), got=error,
            hint="delete the file and try again",
        ) from error
    finally:
        if before is None:
            del os.environ[cache.VARIABLE]
        else:
            os.environ[cache.VARIABLE] = before
    return encoding
