"""torch.func, forward mode and counters over the ops and a swapped model: right, or refused with a message."""

from __future__ import annotations

import contextlib
import copy
import functools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit.swap import swap
from fastvit.testing import compare, livened
from tests.swapping import PACKED, PATCHES, SEPARATE, images, normal, ops_run

timm = pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def no_slow_fallback() -> Iterator[None]:
    """Let torch raise, instead of warn and loop, where an op has no batching rule."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def double(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).double()


def tiny(seed: int = 0, **options: Any) -> nn.Module:
    options = {"depth": 2, "img_size": 32, "num_classes": 10, "patch_size": 8, **options}
    return livened(timm.create_model("vit_tiny_patch16_224", **options), seed)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


BATCH, HEADS, SEQLEN, DIM = 2, 3, 7, 8
QKV_DIMS = [(0, 0, 0), (0, None, None), (None, 1, 2), (2, 0, 1)]


def queries(dims: tuple[int | None, ...], size: int = 4) -> list[Tensor]:
    stacked = [double(size, BATCH, HEADS, SEQLEN, DIM, seed=seed) for seed in range(3)]
    return [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(stacked, dims, strict=True)]


@pytest.mark.parametrize("dims", QKV_DIMS, ids=str)
@pytest.mark.parametrize("bias", ["none", "shared", "full", "mapped", "mapped broadcast"])
def test_vmap_over_attention(dims: tuple[int | None, ...], bias: str) -> None:
    sizes = {
        "shared": (1, HEADS, SEQLEN, SEQLEN),
        "full": (BATCH, 1, SEQLEN, SEQLEN),
        "mapped": (4, BATCH, HEADS, SEQLEN, SEQLEN),
        "mapped broadcast": (4, 1, 1, SEQLEN, SEQLEN),
    }
    mask = None if bias == "none" else double(*sizes[bias], seed=9)
    bias_dim = 0 if bias.startswith("mapped") else None

    def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        return fastvit.attention(query, key, value, bias=mask, return_lse=True)

    outputs, lse = vmap(ours, (*dims, bias_dim))(*queries(dims), mask)

    def theirs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = query @ key.mT * DIM**-0.5 + (0.0 if mask is None else mask)
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    expected = vmap(theirs, (*dims, bias_dim))(*queries(dims), mask)
    same((outputs, lse), expected)


def test_vmap_calls_the_kernel_once() -> None:
    qkv = double(4, BATCH, SEQLEN, 3, HEADS, DIM)
    calls = FlopCounterMode(display=False)
    with calls:
        actual = vmap(fastvit.attention_qkvpacked)(qkv)
    same(actual, torch.stack([fastvit.attention_qkvpacked(one) for one in qkv]))
    assert calls.get_flop_counts()["Global"] == {torch.ops.fastvit.attention_qkvpacked: 4 * 4 * 2 * 3 * 7 * 7 * 8}
    same(vmap(vmap(fastvit.attention_qkvpacked))(qkv[None, :, None].squeeze(2)), actual[None])


@pytest.mark.parametrize(
    ("dims", "runs"),
    [
        ((0, None, None), 1),
        ((1, None, None), 1),
        ((None, 0, 0), 1),
        ((None, 2, None), 1),
        ((0, 0, 0), 4),
        ((0, None, 0), 4),
    ],
    ids=str,
)
def test_vmap_over_patch_embed(dims: tuple[int | None, ...], runs: int) -> None:
    stacked = [double(4, 2, 3, 8, 12), double(4, 5, 3, 4, 4, seed=1), double(4, 5, seed=2)]
    args = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(stacked, dims, strict=True)]

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, stride=4).flatten(2).transpose(1, 2)

    weighting = double(2, 6, 5, seed=3)

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: (function(*given) * weighting).sum()

    same(vmap(fastvit.patch_embed, dims)(*args), vmap(theirs, dims)(*args))
    every = (0, 1, 2)
    same(vmap(grad(loss(fastvit.patch_embed), every), dims)(*args), vmap(grad(loss(theirs), every), dims)(*args))
    with torch.profiler.profile() as profile:
        vmap(fastvit.patch_embed, dims)(*args)
    assert {event.key: event.count for event in profile.key_averages()}[PATCHES] == runs + 1  # and the batched call


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return fastvit.attention(query, key, value)


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda *t: grad(lambda *u: f(*u).square().sum(), (0, 1, 2))(*t),
        lambda f: lambda *t: vjp(f, *t)[1](double(BATCH, HEADS, SEQLEN, DIM, seed=5)),
        lambda f: lambda *t: jacrev(f, 1)(*(u[:1, :1] for u in t)),
        lambda f: lambda *t: grad(lambda *u: vmap(f)(*u).square().sum(), (0, 2))(*(u[None] for u in t)),
        lambda f: lambda *t: vmap(vmap(grad(lambda *u: f(*u).square().sum(), 1)))(*(u[None, :, None] for u in t)),
        lambda f: lambda *t: grad(lambda u: f(u, u, t[2]).square().sum())(t[0]),
    ],
    ids=["grad", "vjp", "jacrev", "grad of vmap", "vmap of vmap of grad", "one input twice"],
)
def test_derivatives_of_attention(transform: Callable[..., Any]) -> None:
    tensors = queries((None, None, None))
    same(transform(attend)(*tensors), transform(torchs)(*tensors))


def test_batched_gradients_of_the_classic_interface() -> None:
    tensors = [t.requires_grad_() for t in queries((None, None, None))]
    weights = double(4, BATCH, HEADS, SEQLEN, DIM, seed=6)
    results = [torch.autograd.grad(f(*tensors), tensors, weights, is_grads_batched=True) for f in (attend, torchs)]
    same(*results)


def test_an_expanded_gradient_of_the_lse() -> None:
    tensors = [t.requires_grad_() for t in queries((None, None, None))]
    _, lse = fastvit.attention(*tensors, return_lse=True)
    expected = (tensors[0] @ tensors[1].mT * DIM**-0.5).logsumexp(-1)
    for weights in (torch.ones(()).double().expand(lse.shape), double(HEADS, BATCH, SEQLEN).transpose(0, 1)):
        same(*(torch.autograd.grad(out, tensors[:2], weights, retain_graph=True) for out in (lse, expected)))


WEIGHT = double(5, 3, 4, 4, seed=1)


def embed(x: Tensor) -> Tensor:
    return fastvit.patch_embed(x, WEIGHT)


def packed(x: Tensor) -> Tensor:
    return fastvit.attention_qkvpacked(x)


OPS = [
    (embed, (2, 3, 8, 12), "patch_embed"),
    (packed, (2, 5, 3, 2, 4), "attention_qkvpacked"),
    (lambda x: fastvit.attention(x, x, x), (1, 2, 5, 4), "attention"),
]


def dual(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODE = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda y: f(y).sum())(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "forward_ad": dual,
    "forward_ad with grad": lambda f, x: dual(f, x.requires_grad_()),
    "vmap of jvp": lambda f, x: vmap(lambda y: jvp(f, (y,), (y,)))(x[None]),
    "jvp of vmap": lambda f, x: jvp(vmap(f), (x[None],), (x[None],)),
    "jvp of grad": lambda f, x: jvp(grad(lambda y: f(y).sum()), (x,), (x,)),
}


@pytest.mark.parametrize("how", FORWARD_MODE)
@pytest.mark.parametrize(("function", "shape", "name"), OPS, ids=[row[2] for row in OPS])
def test_forward_mode_is_refused_never_zero(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], name: str, how: str
) -> None:
    with pytest.raises(NotImplementedError, match=rf"^fastvit {name}: forward-mode .* not supported; use reverse mode"):
        FORWARD_MODE[how](function, double(*shape))


@pytest.mark.parametrize(("function", "shape", "name"), OPS, ids=[row[2] for row in OPS])
def test_forward_mode_through_something_else_is_let_through(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], name: str
) -> None:
    x, tangent = double(*shape), double(*shape, seed=4)
    constant = function(x)
    outputs, derivative = jvp(lambda y: function(x).sum() * y, (x,), (tangent,))
    same((outputs, derivative), (constant.sum() * x, constant.sum() * tangent))


@pytest.mark.parametrize(("function", "shape", "name"), OPS, ids=[row[2] for row in OPS])
def test_second_derivatives_are_refused_never_zero(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], name: str
) -> None:
    first = grad(lambda y: function(y).square().sum())
    with pytest.raises(NotImplementedError, match=r"^fastvit \w+: the second derivative is not supported"):
        grad(lambda y: first(y).square().sum())(double(*shape))


def per_sample(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (one[None],)), label[None])

    return vmap(grad(loss), (None, 0, 0))(parameters, x, labels)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_per_sample_gradients_of_a_swapped_model(qk_norm: bool) -> None:
    model = tiny(qk_norm=qk_norm)
    x, labels = images(3, 32), torch.tensor([1, 5, 2])
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    truth: dict[str, list[Tensor]] = {}
    own: dict[str, list[Tensor]] = {}
    for network, dtype, into in ((exact, torch.float64, truth), (plain, torch.float32, own)):
        for one, label in zip(x, labels, strict=True):
            network.zero_grad()
            F.cross_entropy(network(one[None].to(dtype)), label[None]).backward()
            for name, parameter in network.named_parameters():
                into.setdefault(name, []).append(parameter.grad.clone())
    swap(model, strict=True)
    mine: dict[str, Tensor] = {}
    ran = ops_run(lambda: mine.update(per_sample(model, x, labels)))
    assert ran == ({SEPARATE, PATCHES} if qk_norm else {PACKED, PATCHES})
    assert mine.keys() == truth.keys()
    with sdpa_kernel(SDPBackend.MATH):
        batched = per_sample(plain, x, labels)
    for name, expected in truth.items():
        exactly = torch.stack(expected)
        candidates = (torch.stack(own[name]), batched[name])
        yardstick = max(candidates, key=lambda t, exactly=exactly: (t.double() - exactly).abs().max())
        comparison = compare(mine[name], exactly, yardstick, name)
        assert comparison.passed, comparison


def test_functional_call_uses_the_given_weights() -> None:
    model, other = tiny(), tiny(seed=1)
    swap(model)
    with torch.no_grad():
        actual = functional_call(model, dict(other.named_parameters()), (images(2, 32),))
        torch.testing.assert_close(actual, other(images(2, 32)), rtol=1e-4, atol=1e-4)
        assert (actual - model(images(2, 32))).abs().max() > 0.1


def test_an_ensemble_of_swapped_models() -> None:
    models = [tiny(seed=seed).double() for seed in range(3)]
    x = images(2, 32).double()
    expected = torch.stack([model(x) for model in models])
    for model in models:
        swap(model)
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    with torch.no_grad():
        actual = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
    same(actual, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_transforms_under_autocast(inside: bool) -> None:
    qkv, autocast = normal(4, 2, 7, 3, 3, 8), functools.partial(torch.autocast, "cpu", torch.bfloat16)

    def loss(one: Tensor) -> Tensor:
        with autocast() if inside else contextlib.nullcontext():
            return fastvit.attention_qkvpacked(one).float().square().sum()

    with contextlib.nullcontext() if inside else autocast():
        mine = vmap(grad(loss))(qkv)
        expected = []
        for one in qkv:
            leaf = one.clone().requires_grad_()
            loss(leaf).backward()
            expected.append(leaf.grad)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, torch.stack(expected), rtol=0, atol=0)
    # bfloat16 ran: float32 is not met to its own rounding, and is met to bfloat16's.
    exact = vmap(grad(lambda one: fastvit.attention_qkvpacked(one).square().sum()))(qkv)
    assert 1e-4 < (mine - exact).abs().max() < 0.1


def test_compiled_transforms() -> None:
    tensors = queries((None, None, None))
    function = vmap(grad(lambda *t: fastvit.attention(*(u[None] for u in t)).square().sum(), (0, 1, 2)))
    expected = function(*tensors)
    torch._dynamo.reset()
    same(torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors), expected)


def test_flop_counter_counts_as_for_torch() -> None:
    model, counts = tiny(qk_norm=False), []
    x = images(2, 32).requires_grad_()
    for swapped in (False, True):
        if swapped:
            swap(model)
        # torch's CPU attention has no formula of its own; its math path is matrix products, which are counted.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            logits = model(x)
            forward = counter.get_total_flops()
            logits.square().sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
        ops = counter.get_flop_counts()["Global"]
    heads, seqlen, head_dim = 3, 17, 64
    product = 2 * 2 * heads * seqlen * seqlen * head_dim
    # The counter's hooks on every module have q_norm and k_norm called, so query and key are tensors of their own.
    assert ops[torch.ops.fastvit.attention] == 2 * 2 * product
    assert ops[torch.ops.fastvit.attention_backward] == 2 * 5 * product
    assert counts[1][0] == counts[0][0]
    # Ours computes QKᵀ again in backward; torch's math path kept the matrix.
    assert counts[1][1] == counts[0][1] + 2 * product


def test_flops_of_unequal_lengths_and_head_dims() -> None:
    query, key, value = double(2, 3, 5, 8), double(2, 3, 11, 8), double(2, 3, 11, 4)
    with FlopCounterMode(display=False) as counter:
        fastvit.attention(query.requires_grad_(), key, value).sum().backward()
    ops = counter.get_flop_counts()["Global"]
    assert ops[torch.ops.fastvit.attention] == 2 * 2 * 3 * 5 * 11 * (8 + 4)
    assert ops[torch.ops.fastvit.attention_backward] == 2 * 2 * 3 * 5 * 11 * (3 * 8 + 2 * 4)


def test_importing_fastvit_stays_light() -> None:
    program = """
import torch, sys
before = set(sys.modules)
import fastvit
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert "triton" not in new, new
for name in ("torch.distributed.tensor", "torch.utils.flop_counter", "fastvit.ops.sharding"):
    assert name in before or name not in sys.modules, name
# Libraries ask whether a module is there before they import it.
import importlib.util
for name in ("torch.distributed.tensor", "torch.utils.flop_counter"):
    assert importlib.util.find_spec(name) is not None
from torch.utils.flop_counter import flop_registry
assert torch.ops.fastvit.attention in flop_registry
from torch.distributed.tensor import DTensor
assert torch.ops.fastvit.attention.default in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert not any(type(finder).__module__.startswith("fastvit") for finder in sys.meta_path)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
