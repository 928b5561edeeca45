"""What the commands share: bad input, optional libraries, the console, devices, and writing JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

NARROWEST_PIPE, NARROWEST_TERMINAL = 120, 80

# The columns of words, which give way where width is short; a number or a name broken in two would be misread.
FOLDING = frozenset(
    (
        *("layers", "of", "ops", "p20–p80", "p20–p80 ", "rule", "shape", "value", "why"),
        *("what it is", "here", "automatic order and evidence"),
    )
)


class BadInputError(Exception):
    """Bad input of a command: one line that names the argument, what was given and what is accepted."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def need(command: str, extras: str, libraries: dict[str, str]) -> None:
    """Raise BadInputError unless every module of ``libraries`` (module: package) is there; ``extras`` bring them."""
    missing = [package for module, package in libraries.items() if not _is_installed(module)]
    if missing:
        raise BadInputError(f"{command} needs {', '.join(missing)}: pip install 'fastvit[{extras}]'")


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ValueError:  # Blocked: sys.modules has None in its place.
        return False


def check_device(name: str | None) -> torch.device:
    """Return the device; None is the first GPU if there is one, else the CPU. Raises BadInputError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    accepted = "cpu, cuda and cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInputError(f"--device: got {name!r}; accepted are {accepted}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise BadInputError(f"--device: got {name!r}; accepted are {accepted}")
    if not torch.cuda.is_available():
        raise BadInputError(f"--device: got {name!r}, but torch finds no GPU; accepted is cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise BadInputError(f"--device: got {name!r}; accepted are cpu and cuda:0 to cuda:{last}")
    return device


def check_json_path(path: str | None) -> None:
    """Raise BadInputError unless ``--json`` is absent, "-", or a file that can be written."""
    if path in (None, "-"):
        return
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise BadInputError(f"--json: got {path!r}; accepted is a file in a folder that exists, or nothing for stdout")


def make_console(json_path: str | None) -> Console:
    """Return a console on stdout, or on stderr where stdout is for the JSON; a pipe gets wide, plain lines."""
    from rich.console import Console

    stream = sys.stderr if json_path == "-" else sys.stdout
    console = Console(file=stream, markup=False, highlight=False, soft_wrap=False)
    console.width = max(console.width, NARROWEST_TERMINAL if console.is_terminal else NARROWEST_PIPE)
    return console


def make_table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    """Return a table with these columns; those in ``numbers`` are aligned right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    right = set(numbers)
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column not in FOLDING)
    return table


def write_json(figures: dict[str, Any], path: str | None) -> None:
    """Write ``figures`` to ``path``, "-" being stdout; None writes nothing. What is not finite becomes a string."""
    if path is None:
        return
    text = json.dumps(_finite(figures), indent=2, allow_nan=False)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"--json: got {path!r}, which cannot be written ({error.strerror})") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")
