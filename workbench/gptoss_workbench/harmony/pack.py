"""Rebuild the packed vocabulary: ``python -m gptoss_workbench.harmony.pack SOURCE OUT``.

SOURCE is an ``o200k_base.tiktoken`` or the ``tokenizer.json`` of a gpt-oss checkpoint; OUT is the file to
write, e.g. ``assets/o200k.bin.xz``. Nothing is written unless the hash is right.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gptoss_workbench.errors import VocabularyError
from gptoss_workbench.harmony import ranks


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status (1: the source is not the o200k vocabulary)."""
    parser = argparse.ArgumentParser(prog="python -m gptoss_workbench.harmony.pack", description=__doc__)
    parser.add_argument("source", type=Path, help="a .tiktoken file or a tokenizer.json")
    parser.add_argument("out", type=Path, help="the packed file to write")
    options = parser.parse_args(arguments)
    try:
        if options.source.suffix == ".json":
            found = ranks.from_tokenizer_json(options.source)
        else:
            found = ranks.from_tiktoken(options.source.read_bytes(), where=str(options.source))
        options.out.write_bytes(ranks.pack(found))
    except (VocabularyError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {len(found)} ranks, {options.out.stat().st_size} bytes, sha256 {ranks.SHA256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
