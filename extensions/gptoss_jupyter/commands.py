"""What ``%gptoss`` understands: its commands and their options, as parsers that completion and help read too."""

from __future__ import annotations

import argparse
import keyword
import shlex
from typing import NoReturn

from IPython.core.error import UsageError

EFFORTS = ("low", "medium", "high")
DTYPES = ("float32", "bfloat16")
PUBLISHED = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")


class CommandParser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line: what was wrong, and what would have been right."""

    def __init__(self, command: str, summary: str) -> None:
        super().__init__(
            prog=f"%gptoss {command}", description=summary, add_help=False, allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),  # the same in every window
        )
        self.color = False  # Python 3.14 would colour the help
        self.command, self.summary = command, summary

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):  # the other messages say what is possible
            message += f" (options: {', '.join(self.options) or 'none'})"
        raise UsageError(f"{self.prog}: {message}")

    @property
    def options(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def values(self, option: str) -> list[str]:
        """What may follow an option; empty where anything may, and where the option takes no value."""
        found = next((action for action in self._actions if option in action.option_strings), None)
        return [str(choice) for choice in (found.choices if found else None) or ()]

    def takes_value(self, option: str) -> bool:
        return any(option in action.option_strings and action.nargs != 0 for action in self._actions)


def variable(text: str) -> str:
    """A name that a Python variable may have."""
    if not text.isidentifier() or keyword.iskeyword(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name for a variable")
    return text


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def _load() -> CommandParser:
    parser = CommandParser("load", "Load a model; without a name, the small one that comes with the package.")
    parser.add_argument("name", nargs="?", help="a folder, or a name on the Hub such as openai/gpt-oss-20b")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the Hub")
    parser.add_argument("--dtype", choices=DTYPES, help="of everything but the packed experts")
    parser.add_argument("--device", default="cpu", metavar="D", help="where to compute, e.g. cuda (default: cpu)")
    parser.add_argument("--as", dest="target", type=variable, default="model", metavar="NAME",
                        help="the variable that gets the model (default: model)")
    return parser


def _ask() -> CommandParser:
    parser = CommandParser("ask", "Ask the model something and watch it answer; interrupt the kernel to stop it.")
    parser.add_argument("text", nargs="*", help="the question; as %%%%gptoss, the body of the cell")
    parser.add_argument("--effort", choices=EFFORTS, default="medium", help="how long to think (default: medium)")
    parser.add_argument("--system", metavar="S", help="replaces the system message's line of identity")
    parser.add_argument("--developer", metavar="D", help="instructions, the developer message")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="most tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the sampling, where the temperature is not 0")
    parser.add_argument("--capture", metavar="SITES", help="what to keep, e.g. router or router,resid_post")
    parser.add_argument("--as", dest="target", type=variable, default="gen", metavar="NAME",
                        help="the variable that gets the Generation (default: gen)")
    return parser


def _explore() -> CommandParser:
    parser = CommandParser("explore", "Open the live dashboard of the loaded model.")
    parser.add_argument("text", nargs="*", help="the prompt to begin with")
    return parser


def _doctor() -> CommandParser:
    return CommandParser("doctor", "Say what is installed here, and which models fit.")


def _help() -> CommandParser:
    parser = CommandParser("help", "Show the commands, or all about one of them.")
    parser.add_argument("name", nargs="?", help="a command")
    return parser


COMMANDS = {parser.command: parser for parser in (_load(), _ask(), _explore(), _doctor(), _help())}


def parser_of(command: str) -> CommandParser:
    """The parser of a command; UsageError, with the commands there are, for any other word."""
    if command not in COMMANDS:
        *most, last = COMMANDS
        raise UsageError(f"%gptoss has no command {command!r}: it is one of {', '.join(most)} and {last}")
    return COMMANDS[command]


def split(line: str) -> list[str]:
    """The words of a line, quotes respected as in a shell."""
    try:
        return shlex.split(line)
    except ValueError:
        raise UsageError(
            'a quote has no partner: write %gptoss ask "..." with double quotes around the text, '
            "or put the text into a %%gptoss cell"
        ) from None


def overview() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    rows = [f"  %gptoss {name:{width}}  {parser.summary}" for name, parser in COMMANDS.items()]
    return "\n".join([
        *rows,
        f"  %%gptoss {'':{width - 1}}  Ask with the body of the cell; the options of ask go on the first line.",
        "",
        "%gptoss help ask shows the options of ask, and so on.",
    ])


def details(command: str) -> str:
    """Usage, arguments and options of one command."""
    return parser_of(command).format_help().strip()
