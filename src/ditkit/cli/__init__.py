"""The command line. Thin, and light: `ditkit --help` imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Any, NoReturn

from .. import __version__
from ..config import DitkitError

__all__ = ["main"]

COMMANDS = {
    "train": "train a recipe, or go on with a run",
    "sample": "draw images from a run or a checkpoint",
    "prepare": "encode a data set once, into shards that training reads",
    "evaluate": "measure a run and write its report",
    "audit": "look for copies of training data in a model's samples, and write a report",
    "compare": "run a study: a controlled comparison of many small trainings, with its report",
    "import": "make a run of a published checkpoint: DiT, SiT, JiT, or a folder of diffusers",
    "export": "write a run as its authors, or diffusers, would have published it",
    "plan": "parameters, compute and memory of a model, before anyone spends money",
    "models": "list the models",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise DitkitError(f"{message} (see {self.prog} --help)")


def _module(command: str) -> Any:
    """The module of a command; one that is a word of Python ("import") has an underscore behind it."""
    return import_module(f".{command}{'_' if iskeyword(command) else ''}", __name__)


def _parser(command: str | None) -> Parser:
    parser = Parser(
        prog="ditkit",
        description="The library of diffusion transformers.",
        epilog="ditkit COMMAND --help says more. The recipes: digits, demo, captions, captions_uniform, folder:PATH, "
        "control:RUN, "
        "and those of papers (docs/recipes.md): dit_xl_2:PATH.",
    )
    parser.add_argument("--version", action="version", version=f"ditkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line.capitalize() + ".")
        if name == command:
            _module(name).arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. An error that a person can mend is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((w for w in words if not w.startswith("-")), None)
    try:
        parser = _parser(command)
        # the options of a recipe are read by the command itself, once the recipe is known
        known, rest = parser.parse_known_args(words)
        if rest and known.command not in ("train", "prepare", "audit"):
            parser.error(f"unknown option {rest[0]}")
        return _module(known.command).run(known, rest)
    except DitkitError as error:
        print(f"ditkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ditkit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except (MemoryError, RuntimeError) as error:
        known = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if not known and not isinstance(error, MemoryError):
            raise
        advice = "use a smaller batch (--train.batch or --train.accumulate 4 in training), model or resolution"
        print(f"ditkit: out of memory: {advice}; ditkit plan says what a model needs", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ditkit: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
