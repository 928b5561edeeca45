"""The table of architectures: its rows hold the rule, its page and the README fit them, and it can be made again."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks import architectures, harness, zoo

pytest.importorskip("timm", reason="the table has timm's models")


def test_the_rows_are_of_all_architectures_and_hold_the_rule() -> None:
    rows = architectures.read()
    assert [(row.library, row.model) for row in rows] == [(each.library, each.name) for each in zoo.architectures()]
    assert len(rows) >= 40
    assert {row.library for row in rows} == {"timm", "torchvision", "transformers", "open_clip", "torch.nn"}
    for row in rows:
        assert max(row.outputs, row.gradients) <= 1.0, row
        assert row.graph_breaks == 0, row
        assert row.export.startswith("yes"), row
        assert row.swapped or row.left_alone, row


def test_the_page_and_the_readme_fit_the_rows() -> None:
    rows = architectures.read()
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page_of(rows)
    readme = (harness.ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"what it does to each of {len(rows)} architectures", readme)


def test_a_row_is_made_again() -> None:
    committed = {(row.library, row.model): row for row in architectures.read()}
    (chosen,) = (each for each in zoo.architectures() if each.name == "vit_tiny_patch16_224")
    row = architectures.measure(chosen)
    before = committed[row.library, row.model]
    assert (row.swapped, row.left_alone, row.tensors) == (before.swapped, before.left_alone, before.tensors)
    assert (row.graph_breaks, row.export) == (0, "yes")
    assert 0 < max(row.outputs, row.gradients) <= 1.0
    assert row.speed > 0


class Broken(nn.Module):
    """Breaks the graph, and cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        return x + x.detach().numpy().sum().item()


def test_what_breaks_is_seen() -> None:
    row = architectures.measure(zoo.Architecture("made up", "broken", Broken, (torch.randn(2, 9, 32),)))
    assert row.graph_breaks > 0
    assert row.export.startswith("no: ")


def test_no_page_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        architectures.main(["-k", "vit_tiny", "--write"])
    assert "--write: got -k as well" in capsys.readouterr().err
