"""Subclasses and replaced parts of torch.nn's encoder layer: what is reported as fused runs fused in inference."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.adapters.torch_nn import FusedTransformerEncoderLayer
from fastvit.modules.multihead_attention import FusedMultiheadAttention
from fastvit.swap import swap, unswap
from tests.swapping import PACKED, normal, ops_run, state
from tests.torch_paths import lively

WIDTH, HEADS = 96, 4
OPTIONS: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 128, "batch_first": True}
BYPASSED = "the encoder layer around it is left alone and may bypass it in inference"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
        yield


class OwnLayer(nn.TransformerEncoderLayer):
    """A user's subclass that computes what torch's class does."""

    def width(self) -> int:
        """Return the width of a token."""
        return self.linear1.in_features


class OwnForward(nn.TransformerEncoderLayer):
    """A user's subclass with a forward of its own, in which torch's inference path is still open."""

    def forward(self, src: Tensor, *args: Any, **options: Any) -> Tensor:
        return 0.5 * super().forward(src, *args, **options)


class OwnBlock(nn.TransformerEncoderLayer):
    """A user's subclass with another feed-forward, which torch's inference path passes by."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


class OwnAttention(nn.MultiheadAttention):
    """A user's subclass."""


def tokens(batch: int = 3, length: int = 12) -> Tensor:
    return normal(batch, length, WIDTH, seed=1)


def layer(kind: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer) -> Any:
    return lively(kind(**OPTIONS))


def test_a_subclass_that_changes_nothing_is_swapped_and_runs_the_op_in_inference() -> None:
    model = lively(nn.TransformerEncoder(OwnLayer(**OPTIONS), 2))
    padding = torch.arange(12) >= torch.tensor([12, 7, 3])[:, None]
    kinds, before = [type(module) for module in model.modules()], state(model)
    with torch.no_grad():
        expected = [model(tokens()), model(tokens(), src_key_padding_mask=padding)]
        report = swap(model, strict=True)
        assert [row.original_type for row in report.rows] == ["OwnLayer", "MultiheadAttention"] * 2
        assert report.counts == {"fused": 4}
        for mask, wanted in zip((None, padding), expected, strict=True):
            actual: list[Tensor] = []
            assert ops_run(
                lambda mask=mask, actual=actual: actual.append(model(tokens(), src_key_padding_mask=mask))
            ) == {PACKED}
            torch.testing.assert_close(actual[0], wanted, rtol=1e-5, atol=1e-5)
        assert state(model) == before
        assert isinstance(model.layers[0], OwnLayer)
        assert isinstance(model.layers[0], FusedTransformerEncoderLayer)
        assert type(model.layers[0]) is type(model.layers[1])
        assert model.layers[0].width() == WIDTH
        assert swap(model).counts == {"already fused": 4}
        assert unswap(model).counts == {"restored": 4}
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(model(tokens()), expected[0])


def test_a_swapped_subclass_is_copied_and_stored() -> None:
    fused = layer(OwnLayer)
    swap(fused, strict=True)
    stored = io.BytesIO()
    torch.save(fused, stored)
    stored.seek(0)
    with torch.no_grad():
        for twin in (copy.deepcopy(fused), torch.load(stored, weights_only=False)):
            assert type(twin) is type(fused)
            assert torch.equal(twin(tokens()), fused(tokens()))
            assert ops_run(lambda twin=twin: twin(tokens())) == {PACKED}
            assert unswap(twin).counts == {"restored": 2}
            assert type(twin) is OwnLayer


def test_a_swapped_subclass_compiles() -> None:
    fused = layer(OwnLayer)
    swap(fused, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()), fused(tokens()))
        assert ops_run(lambda: compiled(tokens())) == {PACKED}


def _own_forward_on_the_instance(one: Any) -> None:
    plain = one.forward
    one.forward = lambda src: plain(src)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (OwnForward, lambda one: None, "a subclass of TransformerEncoderLayer that may compute something else"),
        (OwnBlock, lambda one: None, "a subclass of TransformerEncoderLayer that may compute something else"),
        (OwnLayer, _own_forward_on_the_instance, "its forward was replaced on the instance"),
        (OwnLayer, lambda one: setattr(one, "_sa_block", one._sa_block), "its _sa_block was replaced"),
    ],
    ids=["forward", "block", "forward of the instance", "block of the instance"],
)
def test_an_attention_that_its_layer_bypasses_says_so(kind: Any, change: Any, reason: str) -> None:
    model = layer(kind)
    change(model)
    with torch.no_grad():
        expected = model(tokens())
    with pytest.raises(ValueError, match=r"^strict: got True"):
        swap(model, strict=True)
    around, inside = swap(model).rows
    assert (around.action, inside.action) == ("left alone", "fused")
    assert around.reason.startswith(reason)
    assert inside.reason.endswith(BYPASSED)
    assert swap(model).rows[1].reason.endswith(BYPASSED)
    with torch.no_grad():
        assert torch.equal(model(tokens()), expected)
        assert ops_run(lambda: model(tokens())) == set()
    assert ops_run(lambda: model(tokens())) == {PACKED}


def test_an_attention_in_which_nothing_runs_fused() -> None:
    model = layer()
    model.self_attn.__class__ = OwnAttention
    assert [(row.name, row.action) for row in swap(model).rows] == [
        ("(root)", "left alone"),
        ("self_attn", "left alone"),
    ]
    name = "tests.test_swap_torch_nn_subclasses.OwnAttention"
    assert swap(model).rows[0].reason == f"nothing in its self_attn, a {name}, can run fused"
    assert type(model) is nn.TransformerEncoderLayer


class Around(nn.Module):
    """A wrapper such as an adapter's, with what torch's layer reads of its attention."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention, self.calls = attention, 0

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "attention" else getattr(self.attention, name)

    def forward(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.attention(*args, **options)


def test_a_wrapped_attention_is_called_in_inference() -> None:
    model = layer()
    model.self_attn = Around(model.self_attn).eval()
    with torch.no_grad():
        expected = model(tokens())
        assert model.self_attn.calls == 0
        assert [(row.name, row.action) for row in swap(model, strict=True).rows] == [
            ("(root)", "fused"),
            ("self_attn.attention", "fused"),
        ]
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)
        assert model.self_attn.calls == 1
        assert ops_run(lambda: model(tokens())) == {PACKED}


def test_an_attention_swapped_alone_shows_in_training_only() -> None:
    model = layer()
    assert swap(model.self_attn, strict=True).counts == {"fused": 1}
    assert ops_run(lambda: model(tokens())) == {PACKED}
    with torch.no_grad():
        assert ops_run(lambda: model(tokens())) == set()
    assert "swap(layer.self_attn)" in str(swap.__doc__)
    assert swap(model).counts == {"fused": 1, "already fused": 1}
    assert type(model.self_attn) is FusedMultiheadAttention
    with torch.no_grad():
        assert ops_run(lambda: model(tokens())) == {PACKED}
