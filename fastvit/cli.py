"""The ``fastvit`` command: arguments and dispatch; what the commands do is in ``fastvit.commands``.

Exit status: 0 fine, 1 something missed the tolerance rule, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from fastvit.commands import DTYPES, BadInputError
from fastvit.ops.backends import BACKENDS
from fastvit.version import __version__

COMMANDS = {
    "demo": "swap the layers of a timm model, prove that it computes the same, and time both on a photograph",
    "check": "apply the tolerance rule to every backend of this machine, over the shapes of real vision transformers",
    "env": "say what is installed, what was built, and what each backend can do here: for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``argv`` is the command line without the program, or sys.argv's."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name or a cause may hold characters that a narrow locale cannot write; a "?" is better than a traceback.
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    try:
        if not command and not {"-h", "--help", "--version"} & set(arguments):
            given = repr(arguments[0]) if arguments else "nothing"
            raise BadInputError(f"command: got {given}; accepted are {', '.join(COMMANDS)} (fastvit --help)")
        parsed = _parser().parse_args(arguments)
        status: int = import_module(f"fastvit.commands.{parsed.command}").run(parsed)
        sys.stdout.flush()
    except BadInputError as error:
        print(f"fastvit {command}".rstrip() + f": {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away, which is its right; keep the interpreter from complaining at exit.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInputError(message.removeprefix("argument "))


def _parser() -> _Parser:
    parser = _Parser(
        prog="fastvit",
        description="Make a PyTorch vision transformer faster by swapping two layers, and prove it computes the same.",
        epilog="exit status: 0 fine; 1 the tolerance rule was missed; 2 bad input",
    )
    parser.add_argument("--version", action="version", version=f"fastvit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    commands.required = True
    for add in (_add_demo, _add_check, _add_env):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help=COMMANDS["demo"], description=COMMANDS["demo"])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model (default: %(default)s)")
    parser.add_argument(
        "--image",
        default="astronaut",
        help="an image file, or a photograph by name: astronaut, chelsea, coffee, rocket (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=_at_least_one, default=1, help="images in the batch, copies of the photograph (default: 1)"
    )
    _add_dtype(parser, "float32")
    _add_backend(parser, "the automatic choice")
    _add_device(parser, "cuda if there is a GPU, else cpu")
    parser.add_argument("--threads", type=_at_least_one, help="threads on the CPU (default: torch's choice)")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights: .safetensors or a timm checkpoint (default: random weights)"
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder of the pictures (default: ./%(default)s)")
    parser.add_argument(
        "--repeats", type=_at_least_one, help="timed runs of each version (default: what fits about 20 s in all)"
    )
    _add_json(parser)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help=COMMANDS["check"], description=COMMANDS["check"])
    _add_backend(parser, "every backend that can run here")
    _add_dtype(parser, None)
    _add_device(parser, "cpu, and cuda if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each kind: seconds instead of a minute")
    _add_json(parser)


def _add_env(commands: Any) -> None:
    parser = commands.add_parser("env", help=COMMANDS["env"], description=COMMANDS["env"])
    _add_json(parser)


def _add_dtype(parser: argparse.ArgumentParser, default: str | None) -> None:
    shown = default or "all three"
    parser.add_argument(
        "--dtype", type=_one_of(DTYPES), default=default, help=f"{', '.join(DTYPES)} (default: {shown})"
    )


def _add_backend(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--backend", type=_one_of(BACKENDS), help=f"{', '.join(BACKENDS)} (default: {default})")


def _add_device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", help=f"cpu, cuda or cuda:N (default: {default})")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write every figure to FILE; without FILE, to standard output, and the tables to standard error",
    )


def _one_of(names: Any) -> Callable[[str], str]:
    def accept(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted are {', '.join(names)}")
        return text

    return accept


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are whole numbers from 1 up")
    return int(text)
