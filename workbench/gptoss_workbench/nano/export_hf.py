"""The nano model as a literal Hugging Face folder: `python -m gptoss_workbench.nano.export_hf PATH DIR`.

All 201,088 rows are written out (about 100 MB), and tokenizer.json is made from the ranks, so that any
program that reads gpt-oss reads the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from gptoss_workbench.harmony import load_vocabulary, tokens
from gptoss_workbench.nano.export import CONFIG, WEIGHTS

# The pieces that text is cut into before merging, as o200k defines them.
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PIECES = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def byte_characters() -> list[str]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def merges(ranks: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Every way to join two tokens into a third, by the rank of the third: the merges of BPE."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    found: list[tuple[bytes, bytes]] = []
    for token in ranks:
        halves = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in rank_of and pair[1] in rank_of]
        found += sorted(pairs, key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
    return found


def tokenizer_json(ranks: Sequence[bytes]) -> dict[str, Any]:
    """The contents of a tokenizer.json that encodes as o200k_harmony does."""
    alphabet = byte_characters()

    def written(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    specials = [
        {"id": token, "content": tokens.special_name(token), "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for token in range(tokens.RANKS, tokens.SIZE)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {written(token): rank for rank, token in enumerate(ranks)},
            "merges": [[written(first), written(second)] for first, second in merges(ranks)],
        },
    }


def export_hf(source: Path, folder: Path, tokenizer: bool = True) -> None:
    """Expand the compact folder `source`; `tokenizer=False` leaves the 28 MB of tokenizer.json out."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / WEIGHTS)
    rows = tensors.pop("row_of_token").long()
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = tensors.pop(f"{name}.rows")[rows]
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text((source / CONFIG).read_text())
    generation = {
        "bos_token_id": tokens.STARTOFTEXT,
        "do_sample": False,
        "eos_token_id": [tokens.RETURN, tokens.ENDOFTEXT, tokens.CALL],
        "pad_token_id": tokens.ENDOFTEXT,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if tokenizer:
        vocabulary = load_vocabulary()
        ranks = [vocabulary.token_bytes(token) for token in range(tokens.RANKS)]
        text = json.dumps(tokenizer_json(ranks), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>",
                 "eos_token": "<|return|>", "pad_token": "<|endoftext|>", "model_max_length": 131_072}
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="folder of the compact model")
    parser.add_argument("folder", type=Path, help="where the full folder goes")
    parser.add_argument("--no-tokenizer", action="store_true")
    options = parser.parse_args(arguments)
    export_hf(options.path, options.folder, tokenizer=not options.no_tokenizer)


if __name__ == "__main__":
    main()
