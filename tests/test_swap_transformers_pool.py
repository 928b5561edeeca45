"""transformers' pooling heads around nn.MultiheadAttention: fused, because they drop the weights that they ask for."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.adapters.transformers_pool import FusedPoolingHeadForward
from fastvit.modules.multihead_attention import FusedMultiheadAttention
from fastvit.swap import swap, unswap
from fastvit.testing import Comparison, compare
from tests.swapping import SEPARATE, normal, ops_run, state
from tests.torch_paths import double, lively, step, torchs_own

pytest.importorskip("transformers")

from transformers import Idefics2VisionConfig, Siglip2VisionConfig, SiglipVisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2MultiheadAttentionPoolingHead
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import (
    Phi4MultimodalVisionConfig,
)
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import (
    Phi4MultimodalVisionMultiheadAttentionPoolingHead,
)
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.models.siglip2.modeling_siglip2 import Siglip2MultiheadAttentionPoolingHead

Hold = Callable[[str, Iterable[Comparison], object], None]
BATCH, LENGTH, WIDTH = 16, 49, 96
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 3, "intermediate_size": 192}

THERE = torch.arange(LENGTH)[None] < torch.arange(BATCH)[:, None] * 3 + 1
# A head, and what it is called with beside the tokens.
HEADS: dict[str, tuple[type[nn.Module], type, dict[str, Any]]] = {
    "siglip": (SiglipMultiheadAttentionPoolingHead, SiglipVisionConfig, {}),
    "siglip2": (Siglip2MultiheadAttentionPoolingHead, Siglip2VisionConfig, {}),
    "siglip2, padded": (
        Siglip2MultiheadAttentionPoolingHead,
        Siglip2VisionConfig,
        {"attention_mask": THERE.long()},
    ),
    "idefics2": (Idefics2MultiheadAttentionPoolingHead, Idefics2VisionConfig, {}),
    "phi4": (
        Phi4MultimodalVisionMultiheadAttentionPoolingHead,
        Phi4MultimodalVisionConfig,
        {"attention_mask": THERE},
    ),
}
heads = pytest.mark.parametrize("name", HEADS)


def build(name: str = "siglip") -> nn.Module:
    kind, config, _ = HEADS[name]
    settings = config(**SIZES)
    # A head inside a model gets the implementation that the model chose; Siglip2 makes its mask for it.
    settings._attn_implementation = "sdpa"
    return lively(kind(settings))


def tokens(batch: int = BATCH) -> Tensor:
    return normal(batch, LENGTH, WIDTH, seed=7)


def quietly(head: nn.Module, x: Tensor, **call: Any) -> Tensor:
    """Call the head; a step back to the plain forward is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return head(x, **call)


@heads
def test_heads_keep_their_numbers(name: str, hold: Hold) -> None:
    head, call = build(name), HEADS[name][2]
    exact = copy.deepcopy(head).double()
    truth = step(lambda x: exact(x, **call), exact, double(tokens()))
    own = torchs_own(lambda: step(lambda x: head(x, **call), head, tokens()))
    unswapped, before, plain = head(tokens(), **call), state(head), type(head)
    report = swap(head, strict=True)
    assert [row.original_type for row in report.rows] == [plain.__name__, "MultiheadAttention"]
    assert "asks attention for no weights, which it drops" in str(report)
    assert state(head) == before
    mine: dict[str, Tensor] = {}
    ran = ops_run(lambda: mine.update(step(lambda x: quietly(head, x, **call), head, tokens())))
    assert ran == {SEPARATE}
    assert mine.keys() == truth.keys()
    hold("transformers pooling heads", [compare(mine[key], truth[key], own[key], key) for key in truth], name)
    if call:
        unpadded = {key: torch.ones_like(mask) for key, mask in call.items()}
        assert (mine["output"] - head(tokens(), **unpadded)).abs().max() > 0.1
    assert unswap(head).counts == {"restored": 2}
    assert type(head) is plain
    assert state(head) == before
    assert torch.equal(head(tokens(), **call), unswapped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@heads
def test_low_precision_and_autocast(name: str, dtype: torch.dtype, hold: Hold) -> None:
    head, call = build(name), HEADS[name][2]
    low, x = copy.deepcopy(head).to(dtype), tokens()
    with torch.no_grad():
        truth = copy.deepcopy(low).double()(x.to(dtype).double(), **call)
        own = low(x.to(dtype), **call)
        swap(low, strict=True)
        hold("transformers pooling heads", [compare(quietly(low, x.to(dtype), **call), truth, own, "output")], name)
        truth = copy.deepcopy(head).double()(x.double(), **call)
        with torch.autocast("cpu", dtype):
            own = head(x, **call)
            swap(head, strict=True)
            mine = quietly(head, x, **call)
    assert mine.dtype == own.dtype
    hold("transformers pooling heads, autocast", [compare(mine, truth, own, "output")], name)


@heads
def test_hooks_fire_in_the_same_order(name: str) -> None:
    orders, call = [], HEADS[name][2]
    for is_swapped in (False, True):
        head, fired = build(name), []
        for path, module in head.named_modules():
            # A forward hook on attention gets the weights: it has a test of its own.
            if path != "attention":
                module.register_forward_hook(lambda *_, p=path, f=fired: f.append(f"forward {p}"))
            module.register_forward_pre_hook(lambda *_, p=path, f=fired: f.append(f"pre {p}"))
            module.register_full_backward_hook(lambda *_, p=path, f=fired: f.append(f"backward {p}"))
        if is_swapped:
            assert "torch never calls out_proj, so the hook on it stays silent" in str(swap(head))
        x = tokens().requires_grad_()
        assert ops_run(lambda x=x, head=head: quietly(head, x, **call).sum().backward()) == (
            {SEPARATE} if is_swapped else set()
        )
        orders.append(fired)
    assert orders[0] == orders[1]
    assert {"pre attention", "backward attention", "forward mlp"} <= set(orders[0])
    # torch reads the weights of out_proj and never calls it, so no hook on it fires in either.
    assert not any("out_proj" in event for event in orders[0])


@heads
def test_a_hook_on_attention_sees_its_weights(name: str) -> None:
    head, call = build(name), HEADS[name][2]
    expected = head(tokens(), **call)
    _, weights = head.attention(head.probe.repeat(BATCH, 1, 1), tokens(), tokens())
    swap(head)
    seen: list[Tensor] = []
    handle = head.attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with pytest.warns(UserWarning, match=r"a hook on attention may read the attention weights") as caught:
        actual = head(tokens(), **call)
    assert any(str(warning.message).startswith("Fused" + HEADS[name][0].__name__) for warning in caught)
    assert torch.equal(actual, expected)
    assert (seen[0].sum(-1) - 1).abs().max() < 1e-5
    if not call:
        assert torch.equal(seen[0], weights)
    assert "a hook on attention may read the attention weights: runs the plain forward" in str(swap(head))
    handle.remove()
    assert ops_run(lambda: quietly(head, tokens(), **call)) == {SEPARATE}


def test_a_hook_that_asks_for_the_weights_gets_them() -> None:
    head = build()
    expected = head(tokens())
    swap(head)
    head.attention.register_forward_pre_hook(
        lambda module, args, options: (args, {**options, "need_weights": True}), with_kwargs=True
    )
    with pytest.warns(UserWarning, match=r"FusedMultiheadAttention: need_weights=True asks for the attention matrix"):
        assert torch.equal(head(tokens()), expected)


class Doubling(nn.MultiheadAttention):
    """A user's attention, which does not know what its caller drops."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output, weights = super().forward(query, key, value)
        return 2 * output, weights


def _own_forward(head: nn.Module) -> None:
    head.forward = lambda hidden_state: 3 * hidden_state[:, 0]


def _wide_heads(head: nn.Module) -> None:
    head.attention = nn.MultiheadAttention(300, 1, batch_first=True)


def _own_attention(head: nn.Module) -> None:
    head.attention = Doubling(WIDTH, 3, batch_first=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_own_forward, "its forward was replaced on the instance"),
        (_wide_heads, "its attention is left alone"),
        (_own_attention, r"its attention is a tests.test_swap_transformers_pool.Doubling"),
    ],
)
def test_what_is_left_alone_and_why(change: Callable[[nn.Module], None], reason: str) -> None:
    head = build()
    change(head)
    kind = type(head)
    row = next(row for row in swap(head).rows if row.original_type == kind.__name__)
    assert (row.action, row.reason) == ("left alone", reason)
    assert type(head) is kind


def test_another_attention_after_the_swap_is_called_as_the_head_does() -> None:
    head = build()
    swap(head)
    doubling = Doubling(WIDTH, 3, batch_first=True)
    doubling.load_state_dict(head.attention.state_dict())
    head.attention = doubling
    with pytest.warns(UserWarning, match=r"attention is a Doubling, which may want its weights"):
        actual = head(tokens())
    plain = build()
    plain.attention = doubling
    assert torch.equal(actual, plain(tokens()))


def test_the_attention_alone_can_be_taken_back() -> None:
    head = build()
    expected = head(tokens())
    swap(head)
    unswap(head.attention)
    torch.testing.assert_close(quietly(head, tokens()), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(head, FusedPoolingHeadForward)
    assert ops_run(lambda: head(tokens())) == set()
    assert swap(head).counts == {"already fused": 1, "fused": 1}
    assert ops_run(lambda: head(tokens())) == {SEPARATE}


def test_a_backend_by_name() -> None:
    head = build()
    swap(head, backend="reference")
    assert "backend=reference" in repr(head)
    torch.testing.assert_close(quietly(head, tokens()), build()(tokens()), rtol=1e-4, atol=1e-4)
    swap(head, backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run this call"):
        head(tokens())


@heads
def test_copies_pickles_and_attributes(name: str) -> None:
    head, call = build(name), HEADS[name][2]
    swap(head)
    assert head.get_submodule("attention") is head.attention
    assert type(head.attention) is FusedMultiheadAttention
    expected = head(tokens(), **call)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(quietly(twin, tokens(), **call), expected)
        assert ops_run(lambda twin=twin: twin(tokens(), **call)) == {SEPARATE}
        unswap(twin)
        assert type(twin) is HEADS[name][0]


@pytest.mark.parametrize("name", ["siglip", "siglip2, padded"])
def test_compile_and_export(name: str) -> None:
    head, call = build(name), HEADS[name][2]
    swap(head)
    expected = step(lambda x: head(x, **call), head, tokens())
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    actual = step(lambda x: compiled(x, **call), head, tokens())
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert ops_run(lambda: compiled(tokens(), **call)) == {SEPARATE}
    if call:
        program = torch.export.export(head, (tokens(),), call)
        torch.testing.assert_close(program.module()(tokens(), **call), expected["output"], rtol=1e-4, atol=1e-4)
    else:
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(head, (tokens(3),), dynamic_shapes=({0: batch},))
        for size in (1, 5):
            torch.testing.assert_close(program.module()(tokens(size)), head(tokens(size)), rtol=1e-4, atol=1e-4)
    assert "fastvit.attention" in str(program.graph)


def test_symbolic_tracing() -> None:
    head = build()
    swap(head)
    traced = torch.fx.symbolic_trace(head)
    torch.testing.assert_close(traced(tokens()), head(tokens()))
    assert ops_run(lambda: traced(tokens())) == {SEPARATE}
