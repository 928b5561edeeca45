"""Tables that are committed beside the code: one dataclass a row, one CSV a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

RowType = TypeVar("RowType")


def read_rows(kind: type[RowType], path: Path) -> list[RowType]:
    """Return the rows of a table, each a ``kind``, whose columns are its fields: str, int or float."""
    of: Any = kind
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(of)}
    with open(path, newline="") as file:
        return [kind(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def write_rows(kind: type[Any], rows: Sequence[Any], path: Path) -> None:
    """Write the rows as :func:`read_rows` reads them."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
