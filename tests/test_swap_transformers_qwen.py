"""Qwen's vision towers, whose windows depend on data: compiled and exported, swapped ones do no worse than plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastvit.swap import swap
from tests.swapping import SEPARATE, ops_run

pytest.importorskip("transformers")

from transformers import vision_utils

from tests import hugging
from tests.hugging import Hidden

GRIDS = ((1, 4, 6), (1, 4, 4))


def tower(is_swapped: bool, implementation: str = "sdpa") -> Hidden:
    model = hugging.qwen_vision()
    model.model.set_attn_implementation(implementation)
    if is_swapped:
        swap(model, strict=True)
    return model


class FixedGrids(nn.Module):
    """A tower for images of known sizes: what transformers computes from the grids is computed beforehand."""

    def __init__(self, model: Hidden, grids: Tensor) -> None:
        super().__init__()
        self.model, self.grids = model, grids
        plain = model.model
        windows = vision_utils.get_vision_window_index(
            grids,
            spatial_merge_size=plain.spatial_merge_size,
            window_size=plain.window_size,
            patch_size=plain.patch_size,
        )
        self.computed: dict[str, Any] = {
            "position_ids": vision_utils.get_vision_position_ids(grids, plain.spatial_merge_size),
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
            **dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True)),
        }

    def forward(self, patches: Tensor) -> Tensor:
        """Return the hidden states of the patches."""
        return self.model({"hidden_states": patches, "grid_thw": self.grids}, **self.computed)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_tower_breaks_no_more_often() -> None:
    breaks, graphs = [], []
    expected = [tower(False)(hugging.patches(grids)) for grids in (GRIDS, GRIDS[:1])]
    for is_swapped in (False, True):
        model = tower(is_swapped)
        torch._dynamo.reset()
        counters.clear()
        # Breaks are dynamo's; the next tests compile further.
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            for grids, hidden in zip((GRIDS, GRIDS[:1]), expected, strict=True):
                inputs = hugging.patches(grids)
                torch.testing.assert_close(compiled(inputs), hidden, rtol=1e-4, atol=1e-4)
            breaks.append(sum(counters["graph_break"].values()))
            graphs.append(counters["stats"]["unique_graphs"])
            ran = ops_run(lambda inputs=inputs, compiled=compiled: compiled(inputs))
        assert ran == ({SEPARATE} if is_swapped else set())
    # transformers reads the grids, and in each layer the lengths, out of tensors.
    assert breaks[0] > 0
    assert breaks[1] <= breaks[0]
    assert graphs[1] <= graphs[0]


@pytest.mark.filterwarnings("ignore")
def test_grids_that_are_data_cannot_be_exported_with_or_without_the_swap() -> None:
    for is_swapped in (False, True):
        with pytest.raises(Exception, match=r"data-dependent expression"):
            torch.export.export(tower(is_swapped), (hugging.patches(GRIDS),))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("implementation", "strict"), [("eager", True), ("sdpa", False)])
def test_a_tower_of_known_grids_is_exported(implementation: str, strict: bool) -> None:
    inputs = hugging.patches(GRIDS)
    patches = inputs["hidden_states"]
    expected = tower(False, implementation)(inputs)
    model = FixedGrids(tower(True, implementation), inputs["grid_thw"])
    with torch.no_grad():
        program = torch.export.export(model, (patches,), strict=strict)
        assert "fastvit.attention" in str(program.graph)
        torch.testing.assert_close(program.module()(patches), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_tower_of_known_grids_is_one_graph() -> None:
    inputs = hugging.patches(GRIDS)
    patches = inputs["hidden_states"]
    model = FixedGrids(tower(True), inputs["grid_thw"])
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(patches), tower(False)(inputs), rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: compiled(patches)) == {SEPARATE}
