"""Entry point: runs a command, and turns every expected error into one line and an exit status.

Exit status: 0 success; 1 an image failed, or the verdict is "different"; 2 the command could not run (no command, bad
option, file or weights); 130 interrupted; 141 whoever reads the output has gone (``flaxdet eval ... | head -3``).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from flaxdet.cli.convert import Convert
from flaxdet.cli.detect import Detect
from flaxdet.cli.eval import Eval
from flaxdet.cli.export import Export
from flaxdet.cli.train import Train
from flaxdet.cli.verify import Verify
from flaxdet.files.download import cache_dir
from flaxdet.xla.compilation_cache import keep_compiled

COMMANDS = {"detect": Detect, "train": Train, "eval": Eval, "convert": Convert, "export": Export, "verify": Verify}
DESCRIPTION = "torchvision's detectors in JAX: detect, train, evaluate, convert weights, export, verify equality."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: arguments of the command line, without the name of the program; default from ``sys.argv``.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # run as a program: the next run can use the programs that this run compiles
        keep_compiled(cache_dir() / "compiled")
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack letters of class names and paths
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if not given:
            with contextlib.redirect_stdout(sys.stderr):  # not output: nothing was done
                _parse(["--help"])
            return 2
        command = _parse(given)
        status = command if isinstance(command, int) else command.run()
        sys.stdout.flush()  # here, and not at exit, where Python can't be kept from printing the error
        return status
    except KeyboardInterrupt:
        print("flaxdet: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError as error:
        if _drop_unread_output():
            return 141  # the status that a shell reports for a program that SIGPIPE ended
        print(f"flaxdet {given[0]}: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        print(f"flaxdet {given[0]}: error: {error}", file=sys.stderr)
        return 2


def _drop_unread_output() -> bool:
    """Whether stdout or stderr is a pipe without a reader. Sends further output of such a stream to nowhere."""
    if not hasattr(select, "poll"):  # Windows: the pipes of a program are these
        return True
    unread = False
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # no file, or closed
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            unread = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    return unread


def _parse(given: list[str]) -> Any:
    """The command; or, after printing the help or an error of one line, the exit status."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="flaxdet",
                description=DESCRIPTION,
                args=given,
                config=(tyro.conf.DisallowNone,),
                sort_subcommands=False,
            )
    except SystemExit as stop:
        if stop.code:
            program = f"flaxdet {given[0]}" if given[0] in COMMANDS else "flaxdet"
            print(f"{program}: error: {_first_paragraph(errors.getvalue())} (see {program} --help)", file=sys.stderr)
        return int(stop.code or 0)


def _first_paragraph(box: str) -> str:
    """The error in tyro's framed message: the text before the first rule or empty line."""
    words = []
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if line.startswith("│"):
            if not text.strip("─"):
                break
            words.append(text)
    paragraph = " ".join(words).removesuffix(".").removesuffix(" (required)") or " ".join(box.split())
    return re.sub("'None', |, 'None'", "", paragraph)  # tyro lists None as a choice of optional options


if __name__ == "__main__":
    sys.exit(main())
