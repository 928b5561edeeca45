"""Swapping torch.nn's own attention: every call form against float64, and torch's behaviour where the op cannot."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.modules import multihead_attention
from fastvit.modules.multihead_attention import FusedMultiheadAttention, score_bias
from fastvit.swap import swap, unswap
from tests.swapping import PACKED, SEPARATE, normal, ops_run, run_python, state
from tests.torch_paths import check, double, lively, step, torchs_own

BATCH, LENGTH, KEYS, WIDTH, HEADS = 3, 17, 23, 32, 4


def mha(**options: Any) -> nn.MultiheadAttention:
    return lively(nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}))


def swapped(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    assert swap(module, strict=True).counts["fused"]
    return module


def blocked(*shape: int) -> Tensor:
    """Return a mask that blocks a third, and never a whole row: that is a case of its own."""
    mask = normal(*shape, seed=11) > 0.4
    mask[..., 0] = False
    return mask


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, -torch.inf, normal(*mask.shape, seed=12))


def masks(batched: bool, seqlen_q: int, seqlen_k: int) -> dict[str, dict[str, Any]]:
    padding = blocked(BATCH, seqlen_k) if batched else blocked(seqlen_k)
    flat, per_head = blocked(seqlen_q, seqlen_k), blocked((BATCH if batched else 1) * HEADS, seqlen_q, seqlen_k)
    causal = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
    return {
        "no mask": {},
        "padding": {"key_padding_mask": padding},
        "padding, additive": {"key_padding_mask": additive(padding)},
        "2-D": {"attn_mask": flat},
        "2-D, additive": {"attn_mask": additive(flat)},
        "3-D": {"attn_mask": per_head},
        "3-D, additive": {"attn_mask": additive(per_head)},
        "padding and 2-D": {"key_padding_mask": padding, "attn_mask": flat},
        "padding and 3-D, additive": {"key_padding_mask": additive(padding), "attn_mask": additive(per_head)},
        "padding with an additive 2-D": {"key_padding_mask": padding, "attn_mask": additive(flat)},
        "2-D with an additive padding": {"key_padding_mask": additive(padding), "attn_mask": flat},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal without the hint": {"attn_mask": causal},
        "causal and padding": {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True},
        "causal and padding, additive": {
            "key_padding_mask": additive(padding),
            "attn_mask": torch.where(causal, -torch.inf, 0.0),
            "is_causal": True,
        },
    }


# Options of the module, what of query, key and value is one tensor, and whether there is a batch.
FORMS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "self": ({}, "self", True),
    "self, sequence first": ({"batch_first": False}, "self", True),
    "self, no batch": ({}, "self", False),
    "self, no batch, sequence first": ({"batch_first": False}, "self", False),
    "self, no bias": ({"bias": False}, "self", True),
    "self, bias_kv": ({"add_bias_kv": True}, "self", True),
    "self, zero_attn, sequence first": ({"add_zero_attn": True, "batch_first": False}, "self", True),
    "self, bias_kv and zero_attn": ({"add_bias_kv": True, "add_zero_attn": True}, "self", True),
    "memory": ({}, "memory", True),
    "memory, sequence first": ({"batch_first": False}, "memory", True),
    "memory, no batch, no bias": ({"bias": False}, "memory", False),
    "memory of another width": ({"kdim": 24, "vdim": 24}, "memory", True),
    "query is key": ({}, "query is key", True),
    "all different": ({}, "different", True),
    "all different, sequence first": ({"batch_first": False, "add_bias_kv": True}, "different", True),
    "kdim and vdim": ({"kdim": 24, "vdim": 20}, "different", True),
    "kdim and vdim, no batch, no bias": ({"kdim": 24, "vdim": 20, "bias": False}, "different", False),
}


def inputs(module: nn.MultiheadAttention, sharing: str, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    def tokens(length: int, width: int, seed: int) -> Tensor:
        first = (BATCH, length) if module.batch_first else (length, BATCH)
        return normal(*(first if batched else (length,)), width, seed=seed)

    query = tokens(LENGTH, WIDTH, 1)
    if sharing == "self":
        return query, query, query
    if sharing == "query is key":
        return query, query, tokens(LENGTH, WIDTH, 3)
    key = tokens(KEYS, module.kdim, 2)
    return query, key, key if sharing == "memory" else tokens(KEYS, module.vdim, 3)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("form", FORMS)
def test_every_call_form(form: str) -> None:
    options, sharing, batched = FORMS[form]
    module = mha(**options)
    exact, fused = copy.deepcopy(module).double(), swapped(module)
    tensors = inputs(module, sharing, batched)
    distinct = list({id(tensor): tensor for tensor in tensors}.values())
    order = [next(i for i, other in enumerate(distinct) if other is tensor) for tensor in tensors]

    def run(model: nn.Module, call: dict[str, Any], *leaves: Tensor) -> Tensor:
        return model(*(leaves[i] for i in order), need_weights=False, **call)[0]

    expected_op = PACKED if sharing == "self" and not ("bias_kv" in form or "zero_attn" in form) else SEPARATE
    seqlen_k = KEYS if sharing in ("memory", "different") else LENGTH
    for name, call in masks(batched, LENGTH, seqlen_k).items():
        wide = {key: double(value) for key, value in call.items()}
        truth = step(functools.partial(run, exact, wide), exact, *map(double, distinct))
        own = torchs_own(lambda call=call: step(functools.partial(run, module, call), module, *distinct))
        mine = step(functools.partial(run, fused, call), fused, *distinct)
        check(mine, truth, own, f"{form}, {name}")
        assert ops_run(lambda call=call: run(fused, call, *distinct)) == {expected_op}


def test_the_weights_are_torchs_when_they_are_asked_for() -> None:
    module, x = mha(), normal(BATCH, LENGTH, WIDTH)
    fused = swapped(module)
    with pytest.warns(UserWarning, match=r"need_weights=True asks for the attention matrix"):
        fused(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        for options in ({}, {"average_attn_weights": False}, {"key_padding_mask": blocked(BATCH, LENGTH)}):
            for actual, expected in zip(fused(x, x, x, **options), module(x, x, x, **options), strict=True):
                assert torch.equal(actual, expected)
    assert ops_run(lambda: fused(x, x, x)) == set()
    assert ops_run(lambda: fused(x, x, x, need_weights=False)) == {PACKED}


def seen_by_the_op(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, dict[str, Any]]]:
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    plain = multihead_attention.attention_qkvpacked

    def spy(qkv: Tensor, **options: Any) -> Tensor:
        seen.append((qkv, options))
        return plain(qkv, **options)

    monkeypatch.setattr(multihead_attention, "attention_qkvpacked", spy)
    return seen


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_projection_is_read_in_place(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = swapped(mha(batch_first=batch_first))
    seen = seen_by_the_op(monkeypatch)
    x = normal(*((BATCH, LENGTH) if batch_first else (LENGTH, BATCH)), WIDTH)
    output = fused(x, x, x, need_weights=False)[0]
    assert seen[0][0].shape == (BATCH, LENGTH, 3, HEADS, WIDTH // HEADS)
    assert seen[0][0].untyped_storage().nbytes() == 4 * 3 * x.numel()
    assert output.is_contiguous()


def test_masks_stay_as_small_as_broadcasting_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, x = swapped(mha()), normal(BATCH, LENGTH, WIDTH)
    seen = seen_by_the_op(monkeypatch)
    calls = masks(True, LENGTH, LENGTH)
    wanted = {
        "padding": ((BATCH, 1, 1, LENGTH), torch.bool, False),
        "padding, additive": ((BATCH, 1, 1, LENGTH), torch.float32, False),
        "2-D": ((1, 1, LENGTH, LENGTH), torch.bool, False),
        "3-D": ((BATCH, HEADS, LENGTH, LENGTH), torch.bool, False),
        "padding and 2-D": ((BATCH, 1, LENGTH, LENGTH), torch.bool, False),
        "causal and padding": ((BATCH, 1, 1, LENGTH), torch.bool, True),
    }
    for name, (shape, dtype, is_causal) in wanted.items():
        fused(x, x, x, need_weights=False, **calls[name])
        bias, causal = seen[-1][1]["bias"], seen[-1][1]["is_causal"]
        assert (tuple(bias.shape), bias.dtype, causal) == (shape, dtype, is_causal), name
    assert score_bias(None, calls["causal"]["attn_mask"], True, BATCH, HEADS, 0) == (None, True)


def test_a_query_without_keys_gives_the_bias_as_where_torch_uses_sdpa() -> None:
    module, x = mha(), normal(BATCH, LENGTH, WIDTH)
    fused = swapped(module)
    padding, rows = torch.zeros(BATCH, LENGTH, dtype=torch.bool), torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    padding[1], rows[5] = True, True
    for name, mask, where in (("key_padding_mask", padding, (1,)), ("attn_mask", rows, (slice(None), 5))):
        for call in ({name: mask}, {name: torch.where(mask, -torch.inf, 0.0)}):
            expected, actual = (m(x, x, x, need_weights=False, **call)[0] for m in (module, fused))
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            bias = module.out_proj.bias.expand_as(actual[where])
            torch.testing.assert_close(actual[where], bias)
            gradient = torch.autograd.grad(actual.sum(), fused.in_proj_weight)[0]
            assert gradient.isfinite().all()
            with torch.no_grad():
                torchs, ours = (m(x, x, x, need_weights=False, **call)[0] for m in (module, fused))
            torch.testing.assert_close(ours[where], bias)
            # torch's inference path answers NaN to a bool mask; the day it does not, the docstring is to change.
            assert torchs[where].isnan().all() == (call[name].dtype == torch.bool)


def test_dropout_in_training_is_torchs() -> None:
    module, x = mha(dropout=0.3).train(), normal(BATCH, LENGTH, WIDTH)
    fused = swapped(module)
    assert "dropout p=0.3 runs the plain forward in training" in str(swap(fused))
    torch.manual_seed(5)
    expected = module(x, x, x, need_weights=False)[0]
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"attention dropout \(p=0.3\) has no kernel yet"):
        actual = fused(x, x, x, need_weights=False)[0]
    assert torch.equal(actual, expected)
    assert ops_run(lambda: fused.eval()(x, x, x, need_weights=False)) == {PACKED}


def test_a_mask_that_learns_gets_its_gradient() -> None:
    module, x = mha(), normal(BATCH, LENGTH, WIDTH)
    fused = swapped(module)
    mask = normal(LENGTH, LENGTH).requires_grad_()
    (expected,) = torch.autograd.grad(module(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum(), mask)
    with pytest.warns(UserWarning, match=r"a mask requires grad"):
        (actual,) = torch.autograd.grad(fused(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum(), mask)
    assert torch.equal(actual, expected)
    with torch.no_grad():
        assert ops_run(lambda: fused(x, x, x, attn_mask=mask, need_weights=False)) == {PACKED}


def test_hooks_fire_as_in_torch() -> None:
    fired: dict[bool, list[str]] = {False: [], True: []}
    for is_swapped, calls in fired.items():
        module = mha()
        for name in ("", "out_proj"):
            child = module.get_submodule(name)
            child.register_forward_pre_hook(lambda *_, n=name, c=calls: c.append(f"pre {n}"))
            child.register_forward_hook(lambda *_, n=name, c=calls: c.append(f"forward {n}"))
            child.register_full_backward_hook(lambda *_, n=name, c=calls: c.append(f"backward {n}"))
        module.register_forward_hook(lambda module, args, output: (2 * output[0], None))
        if is_swapped:
            assert "the hook on it stays silent" in str(swap(module))
            assert ops_run(lambda m=module: m(*3 * (normal(1, 5, WIDTH),), need_weights=False)) == {PACKED}
            calls.clear()
        x = normal(BATCH, LENGTH, WIDTH).requires_grad_()
        output = module(x, x, x, need_weights=False)[0]
        output.sum().backward()
        torch.testing.assert_close(output, 2 * mha()(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-4)
    assert fired[True] == fired[False] == ["pre ", "forward ", "backward "]


def _calls_that_do_not_fit() -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    x, y = normal(BATCH, LENGTH, WIDTH), normal(BATCH, KEYS, WIDTH)
    return {
        "hint without a mask": ((x, y, y), {"is_causal": True}),
        "4-D": ((x[None], x[None], x[None]), {}),
        "mixed ranks": ((x, y[0], y[0]), {}),
        "another batch": ((x, y[:1], y[:1]), {}),
        "key longer than value": ((x, y, y[:, 1:]), {}),
        "padding of another length": ((x, y, y), {"key_padding_mask": blocked(BATCH, LENGTH)}),
        "mask of another length": ((x, y, y), {"attn_mask": blocked(LENGTH, LENGTH)}),
        "integer mask": ((x, y, y), {"attn_mask": torch.zeros(LENGTH, KEYS, dtype=torch.long)}),
        "another width": ((x[..., 1:], y, y), {}),
    }


@pytest.mark.parametrize("name", _calls_that_do_not_fit())
def test_what_torch_refuses_is_refused(name: str) -> None:
    tensors, call = _calls_that_do_not_fit()[name]
    errors = []
    for module in (mha(), swapped(mha())):
        with pytest.raises((AssertionError, RuntimeError, ValueError)) as caught:
            module(*tensors, need_weights=False, **call)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1] or name == "another width"


class QuietAttention(nn.MultiheadAttention):
    """A user's subclass with its own forward."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        return 0.5 * super().forward(*args, **options)[0], None


def _own_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x, *_, **__: (3 * x, None)
    return module


def _extra_parameter(module: nn.Module) -> nn.Module:
    module.relative = nn.Parameter(torch.zeros(2))
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: QuietAttention(WIDTH, HEADS), "a subclass of MultiheadAttention that may compute something else"),
        (lambda: _own_forward(mha()), "its forward was replaced on the instance"),
        (lambda: _extra_parameter(mha()), "it has parts that fastvit does not know: relative"),
        (lambda: nn.MultiheadAttention(300, 1), "head_dim 300: at most 256"),
    ],
)
def test_what_is_left_alone_and_why(make: Callable[[], nn.Module], reason: str) -> None:
    module = nn.Sequential(make())
    kind = type(module[0])
    with pytest.raises(ValueError, match=r"^strict"):
        swap(module, strict=True)
    assert reason in swap(module).left_alone[0].reason
    assert type(module[0]) is kind


def test_nested_tensors_are_attended_to_one_by_one() -> None:
    module = mha().requires_grad_(False)
    fused = swapped(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([normal(length, WIDTH, seed=length) for length in (5, 17, 1)])
        expected = module(nested, nested, nested, need_weights=False)[0]
        actual = fused(nested, nested, nested, need_weights=False)[0]
        assert actual.is_nested
        for mine, theirs in zip(actual.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert ops_run(lambda: fused(nested, nested, nested, need_weights=False)) == {PACKED}
        with pytest.raises(AssertionError, match=r"NestedTensor outside of its fast path"):
            fused.train()(nested, nested, nested, need_weights=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["self", "memory, sequence first", "self, bias_kv"])
def test_low_precision_and_autocast(dtype: torch.dtype, form: str) -> None:
    options, sharing, batched = FORMS[form]
    module = mha(**options)
    tensors = inputs(module, sharing, batched)
    seqlen_k = LENGTH if sharing == "self" else KEYS
    for call in (
        {},
        {"key_padding_mask": blocked(BATCH, seqlen_k)},
        {"attn_mask": additive(blocked(LENGTH, seqlen_k))},
    ):
        wide = {key: double(value) for key, value in call.items()}
        truth = {"output": copy.deepcopy(module).double()(*map(double, tensors), need_weights=False, **wide)[0]}
        low = copy.deepcopy(module).to(dtype)
        narrow = {t: t.to(dtype) for t in tensors}
        with torch.autocast("cpu", dtype):
            own = torchs_own(lambda call=call: {"output": module(*tensors, need_weights=False, **call)[0]})
            mine = swapped(module)(*tensors, need_weights=False, **call)[0]
            # A mask in autocast's own dtype, which torch's attention takes too.
            narrow_mask = {key: value.to(dtype) for key, value in call.items() if value.is_floating_point()}
            run = functools.partial(swapped(module), *tensors, need_weights=False, **narrow_mask)
            assert ops_run(run) in ({PACKED}, {SEPARATE})
        check({"output": mine}, truth, own, f"{form}, autocast")
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in call.items()}
        run = functools.partial(low, *(narrow[t] for t in tensors), need_weights=False, **cast)
        own = torchs_own(lambda run=run: {"output": run()[0]})
        mine = swapped(low)(*(narrow[t] for t in tensors), need_weights=False, **cast)[0]
        check({"output": mine}, truth, own, f"{form}, {dtype}")


def test_an_unswapped_module_is_what_it_was() -> None:
    module, x = mha(), normal(BATCH, LENGTH, WIDTH)
    before, expected = state(module), module(x, x, x)[0]
    swap(module, backend="reference")
    assert type(module) is FusedMultiheadAttention
    assert isinstance(module, nn.MultiheadAttention)
    assert unswap(module).counts == {"restored": 1}
    assert state(module) == before
    assert type(module) is nn.MultiheadAttention
    assert torch.equal(module(x, x, x)[0], expected)


def test_compile_with_a_dynamic_batch_and_two_lengths() -> None:
    fused = swapped(mha())
    torch._dynamo.reset()

    def attend(x: Tensor, padding: Tensor) -> Tensor:
        return fused(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((2, 17), (5, 17), (3, 23)):
        x, padding = normal(batch, length, WIDTH).requires_grad_(), blocked(batch, length)
        actual, expected = compiled(x, padding), attend(x, padding)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: compiled(x, padding)) == {PACKED}


def test_pickle_into_a_fresh_interpreter(tmp_path: Any) -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    swap(model, backend="reference")
    path = tmp_path / "model.pt"
    torch.save(model, path)
    program = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
from fastvit.swap import swap, unswap
print(swap(model, backend="reference").counts, len(unswap(model).rows), *(type(m).__module__ for m in model))
"""
    expected = "{'already fused': 3} 3 torch.nn.modules.conv torch.nn.modules.transformer"
    assert run_python(program, path).strip() == expected
