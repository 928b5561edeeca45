"""The straight way of an eager call to the C++ of the cpu backend: when it is taken, and that the bits are the same."""

from __future__ import annotations

import contextvars
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.kernels import native
from fastvit.ops import eager

OPS = torch.ops.fastvit


class Subclass(Tensor):
    pass


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class QuietFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def watchers() -> tuple[AbstractContextManager[Any], ...]:
    """Return who wants to see an op, or may change what it does."""
    return (
        fastvit.backend("reference"),
        torch.autocast("cpu", dtype=torch.bfloat16),
        Quiet(),
        QuietFunctions(),
        torch.autograd.forward_ad.dual_level(),
    )


def three(*sizes: int, keys: int | None = None, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, seqlen, head_dim = sizes
    keys = seqlen if keys is None else keys
    return (
        torch.randn(sizes),
        torch.randn(batch, heads, keys, head_dim),
        torch.randn(batch, heads, keys, head_dim if width is None else width),
    )


def transposed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the same values, their last dimension not contiguous."""
    return tuple(tensor.mT.contiguous().mT for tensor in tensors)


CASES: dict[str, Callable[[], tuple[tuple[Tensor, ...], dict[str, Any]]]] = {
    "self": lambda: (three(2, 3, 49, 32), {}),
    "float64, causal": lambda: (tuple(t.double() for t in three(2, 3, 17, 8)), {"is_causal": True}),
    "bfloat16, scale": lambda: (tuple(t.bfloat16() for t in three(2, 3, 50, 64)), {"scale": 2.0}),
    "cross, other width": lambda: (three(2, 3, 1, 16, keys=33, width=130), {}),
    "bias of a head": lambda: (three(2, 3, 20, 16), {"bias": torch.randn(3, 1, 20)}),
    "mask with empty rows": lambda: (three(2, 3, 20, 16), {"bias": torch.rand(2, 1, 20, 20) > 0.9}),
    "expanded bias": lambda: (three(2, 3, 20, 16), {"bias": torch.randn(20, 1).half().float().expand(2, 1, 20, 20)}),
    "rows not contiguous": lambda: (transposed(three(2, 3, 20, 16)), {}),
    "one of them": lambda: ((*three(2, 3, 20, 16)[:2], *transposed(three(2, 3, 20, 16)[2:])), {}),
    "views of a projection": lambda: (torch.randn(2, 20, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0), {}),
    "no batch": lambda: (three(0, 3, 20, 16), {}),
    "no heads": lambda: (three(2, 0, 20, 16), {}),
    "no queries": lambda: (three(2, 3, 0, 16, keys=5), {}),
    "no keys": lambda: (three(2, 3, 5, 16, keys=0), {}),
}


def assert_same(straight: tuple[Tensor, Tensor], chosen: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(straight, chosen, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_the_straight_way_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = CASES[name]()
    assert eager.attention_goes_straight(None, *tensors, options.get("bias"))
    straight = fastvit.attention(*tensors, **options, return_lse=True)
    monkeypatch.setattr(fastvit.ops.backends, "direct_calls", False)
    assert not eager.attention_goes_straight(None, *tensors, options.get("bias"))
    assert_same(straight, fastvit.attention(*tensors, **options, return_lse=True))


@pytest.mark.parametrize("size", [(2, 20, 3, 3, 16), (0, 20, 3, 3, 16), (2, 0, 3, 3, 16), (1, 50, 3, 2, 33)])
@pytest.mark.parametrize("layout", ["contiguous", "rows not contiguous", "heads first"])
def test_the_straight_way_of_a_packed_projection_gives_the_same(
    size: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = torch.randn(size)
    if layout == "rows not contiguous":
        # To .contiguous() an empty tensor of any strides is contiguous.
        qkv = torch.randn(*size[:3], size[4], size[3]).mT
        assert qkv.stride(-1) > 1
    elif layout == "heads first":
        qkv = qkv.transpose(1, 3).contiguous().transpose(1, 3)
    options: dict[str, Any] = {"bias": torch.randn(size[3], 1, size[1]), "return_lse": True}
    assert eager.packed_goes_straight(None, qkv, None)
    straight = fastvit.attention_qkvpacked(qkv, **options)
    monkeypatch.setattr(fastvit.ops.backends, "direct_calls", False)
    assert_same(straight, fastvit.attention_qkvpacked(qkv, **options))


def goes(tensors: tuple[Tensor, ...], backend: str | None = None, bias: Tensor | None = None) -> bool:
    query, key, value = tensors
    qkv = torch.stack((query, key, value), 2) if type(query) is Tensor else query.unsqueeze(2)
    packed = eager.packed_goes_straight(backend, qkv.transpose(1, 3), bias)
    straight = eager.attention_goes_straight(backend, query, key, value, bias)
    assert packed is straight
    return straight


def test_who_wants_to_see_the_op_sees_it() -> None:
    tensors = three(1, 2, 5, 8)
    assert goes(tensors)
    assert goes(tensors, "cpu")
    assert not goes(tensors, "reference")
    assert not goes(tuple(tensor.as_subclass(Subclass) for tensor in tensors))
    assert not goes(tensors, bias=torch.zeros(1, 1, 5, 5).as_subclass(Subclass))
    assert not goes(tuple(tensor.to("meta") for tensor in tensors))
    for context in watchers():
        with context:
            assert not goes(tensors), context
    wanted = tuple(tensor.requires_grad_() for tensor in tensors)
    assert not goes(wanted)
    with torch.no_grad():
        assert goes(wanted)
    with torch.inference_mode(), fastvit.backend("cpu"):
        assert goes(three(1, 2, 5, 8))
    inside: list[bool] = []
    torch.vmap(lambda *given: (inside.append(goes(given)), given[0])[1])(*(t[None] for t in three(1, 2, 5, 8)))
    torch.jit.trace(lambda *given: (inside.append(goes(given)), given[0])[1], three(1, 2, 5, 8), check_trace=False)
    assert inside == [False, False]


def patches(
    batch: int = 2, channels: int = 3, size: tuple[int, int] = (8, 12), patch: tuple[int, int] = (4, 6), width: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, channels, *size), torch.randn(width, channels, *patch), torch.randn(width)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_straight_way_of_patch_embed_gives_the_same(
    batch: int, dtype: torch.dtype, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, weight, bias = (tensor.to(dtype) for tensor in patches(batch, size=(32, 48), patch=(16, 8), width=40))
    given = (images, torch.nn.Parameter(weight), bias if has_bias else None)
    with torch.no_grad():
        assert eager.patch_embed_goes_straight(None, *given)
        straight = fastvit.patch_embed(*given)
        monkeypatch.setattr(fastvit.ops.backends, "direct_calls", False)
        assert not eager.patch_embed_goes_straight(None, *given)
        chosen = fastvit.patch_embed(*given)
    assert_same((straight, straight), (chosen, chosen))


def test_patch_embed_goes_straight_only_where_nobody_looks_and_everything_fits() -> None:
    images, weight, bias = patches()
    goes = eager.patch_embed_goes_straight
    assert goes(None, images, weight, bias)
    assert goes("cpu", images, weight, None)
    assert not goes("reference", images, weight, bias)
    for context in watchers():
        with context:
            assert not goes(None, images, weight, bias), context
    assert not goes(None, images, torch.nn.Parameter(weight), bias)
    assert not goes(None, images.as_subclass(Subclass), weight, bias)
    assert not goes(None, images, weight, bias.as_subclass(Subclass))
    assert not goes(None, images.to("meta"), weight, bias)
    # Read in place or copied by the long way, which gives the same.
    for layout in (
        (images.to(memory_format=torch.channels_last), weight, bias),
        (images, weight.to(memory_format=torch.channels_last), bias),
        (images, weight, bias.repeat_interleave(2)[::2]),
    ):
        assert not goes(None, *layout)
        torch.testing.assert_close(fastvit.patch_embed(*layout), fastvit.patch_embed(images, weight, bias))
    for wrong, message in (
        ((images[0], weight, bias), "images: got"),
        ((images, weight[0], bias), "weight: got"),
        ((images.double(), weight, bias), "weight: got"),
        ((images.int(), weight.int(), None), "images: got"),
        ((images[:, :2].contiguous(), weight, bias), "images: got 2 channels"),
        ((images[:, :, :7].contiguous(), weight, bias), "images: got 7×12"),
        ((images[:, :, :3].contiguous(), weight, bias), "images: got 3×12"),
        ((images[:, :, :0].contiguous(), weight, bias), "images: got 0×12"),
        ((images, weight[:0], bias[:0]), "weight: got"),
        ((images, weight, bias[:4].contiguous()), "bias: got"),
        ((images, weight, bias.double()), "bias: got"),
        ((images, weight, bias[None].contiguous()), "bias: got"),
    ):
        assert not goes(None, *wrong)
        with pytest.raises((TypeError, ValueError), match=message):
            fastvit.patch_embed(*wrong)
    with pytest.raises(TypeError, match="images: got list"):
        fastvit.patch_embed([], weight, bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"padding": (2, 3)}, {"stride": (2, 3)}, {"stride": (4, 6), "padding": 1}])
def test_a_stride_or_a_padding_is_not_lost_on_the_straight_way(options: dict[str, Any]) -> None:
    images, weight, bias = patches()
    expected = torch.nn.functional.conv2d(images, weight, bias, **{"stride": (4, 6), **options})
    torch.testing.assert_close(fastvit.patch_embed(images, weight, bias, **options), expected.flatten(2).mT)


def test_a_profile_names_patch_embed() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastvit.patch_embed(*patches())
    assert [event.name for event in profile.events() if event.name.startswith("fastvit")] == ["fastvit::patch_embed"]


def test_a_task_keeps_its_backend_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = three(1, 2, 5, 8)
    with fastvit.backend("reference"):
        inside = contextvars.copy_context()
    assert goes(tensors)
    assert not inside.run(goes, tensors)
    monkeypatch.setattr(native, "attention_forward", lambda *_, **__: pytest.fail("the cpu backend ran"))
    expected = fastvit.attention(*tensors)
    torch.testing.assert_close(inside.run(fastvit.attention, *tensors), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_profile_names_the_op(packed: bool) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if packed:
            fastvit.attention_qkvpacked(torch.randn(1, 5, 3, 2, 8))
        else:
            fastvit.attention(*three(1, 2, 5, 8))
    names = [event.name for event in profile.events() if event.name.startswith("fastvit")]
    assert names == ["fastvit::attention_qkvpacked" if packed else "fastvit::attention"]


def test_what_does_not_fit_is_refused_by_the_checks() -> None:
    query, key, value = three(1, 2, 5, 8)
    for wrong in (
        (query[0], key, value),
        (query.double(), key, value),
        (query, key[:, :1], value),
        (query, key[..., :4], value),
        (query, key, value[:, :, :4]),
        (query, key[0], value[0]),
        tuple(tensor[..., :0] for tensor in (query, key, value)),
        tuple(tensor.repeat(1, 1, 1, 33) for tensor in (query, key, value)),
        tuple(tensor.int() for tensor in (query, key, value)),
    ):
        assert not eager.attention_goes_straight(None, *wrong, None)
        with pytest.raises((TypeError, ValueError), match=r"^(query|key|value): got"):
            fastvit.attention(*wrong)
    for wrong_packed in (torch.randn(1, 5, 2, 2, 8), torch.randn(1, 5, 3, 16), torch.randn(1, 5, 3, 1, 257)):
        assert not eager.packed_goes_straight(None, wrong_packed, None)
        with pytest.raises(ValueError, match=r"^qkv: got"):
            fastvit.attention_qkvpacked(wrong_packed)


@pytest.mark.parametrize("name", ["_is_tracing", "_len_torch_dispatch_stack"])
def test_a_torch_without_what_we_ask_takes_the_long_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, name)
    specification = importlib.util.spec_from_file_location("another_eager", eager.__file__)
    assert specification is not None
    assert specification.loader is not None
    another = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(another)
    tensors = three(1, 1, 4, 8)
    assert eager.attention_goes_straight(None, *tensors, None)
    assert not another.attention_goes_straight(None, *tensors, None)
    assert not another.packed_goes_straight(None, torch.randn(1, 4, 3, 1, 8), None)
