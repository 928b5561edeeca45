"""The table of architectures: its rows hold the rule, its page and the README fit them, and it can be made again."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

import fastvit
from benchmarks import architectures, harness, zoo
from benchmarks.report import without_mark

pytest.importorskip("timm", reason="the table has timm's models")


def test_the_rows_are_of_the_architectures_and_hold_the_rule() -> None:
    rows = architectures.read()
    known = [(each.library, each.name) for each in zoo.architectures()]
    named = [(row.library, row.model) for row in rows]
    assert named == [name for name in known if name in named]
    assert len(rows) >= 40
    assert {row.library for row in rows} == {"timm", "torchvision", "transformers", "open_clip", "torch.nn"}
    for row in rows:
        assert max(row.outputs, row.gradients) <= 1.0, row
        assert row.graph_breaks == 0, row
        assert row.export.startswith("yes"), row
        assert row.swapped or row.left_alone, row
        assert not row.idle, row
    if reasons := architectures.stale(rows):
        print(f"stale: {'; '.join(reasons)}: run python -m benchmarks architectures --write")


def test_a_row_that_claims_what_did_not_run_and_an_older_table_are_seen() -> None:
    row = architectures.read()[0]
    for ran, idle in (("2/2 attention, 1/1 patch embedding", False), ("", False), ("12/12 attention", False)):
        assert dataclasses.replace(row, inference=ran).idle == idle
    for ran in ("1/2 attention, 1/1 patch embedding", "0/10 attention"):
        assert dataclasses.replace(row, inference=ran).idle
    now = [
        dataclasses.replace(row, library=each.library, model=each.name, sources=harness.source_hash())
        for each in zoo.architectures()
    ]
    assert architectures.stale(now) == []
    assert architectures.stale(now[1:]) == [f"{now[0].library} {now[0].model} is missing"]
    assert architectures.stale([*now[1:], dataclasses.replace(now[0], sources="old")]) == ["the kernels have changed"]


def test_what_ran_is_seen() -> None:
    (beit,) = (each for each in zoo.architectures() if each.name == "beit_base_patch16_224")
    model = beit.build()
    fastvit.swap(model)
    with pytest.warns(UserWarning, match=r"relative position bias requires grad"):
        assert architectures.ran(model, beit.inputs, {}) == "0/2 attention, 1/1 patch embedding"
    with torch.no_grad():
        assert architectures.ran(model, beit.inputs, {}) == "2/2 attention, 1/1 patch embedding"
    assert not any(module._forward_pre_hooks for module in model.modules())
    fastvit.unswap(model)
    assert architectures.ran(model, beit.inputs, {}) == ""


def test_the_page_and_the_readme_fit_the_rows() -> None:
    rows = architectures.read()
    page = architectures.PAGE.read_text(encoding="utf-8")
    assert without_mark(page) == without_mark(architectures.page_of(rows))
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
    assert row.inference == row.training == "2/2 attention, 1/1 patch embedding"
    assert (row.fastvit, row.sources) == (fastvit.__version__, harness.source_hash())
    assert row.commit
    assert row.measured


class Broken(nn.Module):
    """Breaks the graph, and cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        torch._dynamo.graph_break()
        return x + x.detach().numpy().sum().item()


def test_what_breaks_is_seen() -> None:
    row = architectures.measure(zoo.Architecture("made up", "broken", Broken, (torch.randn(2, 9, 32),)))
    assert row.graph_breaks > 0
    assert row.export.startswith("no: ")


def test_no_page_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        architectures.main(["-k", "vit_tiny", "--write"])
    assert "--write: got -k as well" in capsys.readouterr().err
