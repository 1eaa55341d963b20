"""The ``rocmforge`` command.

Each subcommand is a module with ``add_arguments(parser)`` and ``run(options) -> exit status``; what
a command needs beyond the standard library it imports when it runs, so ``--help`` is quick and one
command's missing extra does not stop the others.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from rocmforge import RocmForgeError, __version__
from rocmforge.cli import demo, info, replay, selftest
from rocmforge.cli.console import CommandError

__all__ = ["main"]

COMMANDS = {
    "demo": (demo, "answer questions with a real language model through the paged cache"),
    "replay": (replay, "replay a serving trace: what hits and preemptions a pool of a size gives"),
    "info": (info, "show versions, CPU features in use, HIP devices and code objects"),
    "selftest": (selftest, "compare each operation on a HIP device with the CPU"),
}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="rocmforge", description="A paged key/value cache for large language models."
    )
    parser.add_argument("--version", action="version", version=f"rocmforge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=(module.__doc__ or "").strip())
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``rocmforge`` command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; that of the process if not given.

    Returns
    -------
    int
        Exit status: 0 is success, 1 a failure that was explained on standard error or a failed
        check, 130 an interrupt. Wrong usage exits with 2.
    """
    options = make_parser().parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
    except (CommandError, RocmForgeError) as error:
        print(f"rocmforge: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"rocmforge: not enough memory: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python flushes standard output once more at exit,
        # which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
