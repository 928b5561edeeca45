"""Hooks on every module there is, as torch's counters register: a swapped model fires what a plain one does."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torchs_module
from torch.utils.flop_counter import FlopCounterMode

from fastvit.models import vit
from fastvit.modules.fused import has_global_hooks
from fastvit.swap import swap
from fastvit.testing import livened
from tests.swapping import PACKED, PATCHES, SEPARATE, images, normal, ops_run

pytest.importorskip("timm", reason="most cases are timm's")

Case = tuple[nn.Module, tuple[Any, ...]]


def timms(fused_attn: bool = True, **options: Any) -> Case:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, num_classes=10, **options)
    model.blocks[0].attn.fused_attn = fused_attn
    return model, (images(),)


def eva() -> Case:
    import timm

    return timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=56, num_classes=10), (images(2, 56),)


def mvitv2() -> Case:
    from tests.test_swap_timm_overlapping import mvit

    return mvit(), (images(),)


def qwen() -> Case:
    pytest.importorskip("transformers")
    from tests import hugging

    return hugging.qwen_vision().float(), (hugging.patches(),)


def pooled() -> Case:
    pytest.importorskip("transformers")
    from tests.test_swap_survives import transformers_

    return transformers_(), (images(2, 32),)


def open_clip() -> Case:
    from tests.test_swap_survives import open_clips_own

    return open_clips_own(), (images(2, 32),)


def torch_nn() -> Case:
    return nn.TransformerEncoderLayer(96, 4, 128, dropout=0.0, batch_first=True), (normal(2, 9, 96),)


def reference() -> Case:
    return vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3), (images(2, 32),)


# Each with the ops that run while somebody listens, when Identities are called, so that query and key are tensors of
# their own, and proj is; and with those that run otherwise.
CASES: dict[str, tuple[Callable[[], Case], set[str], set[str]]] = {
    "timm": (timms, {SEPARATE}, {PACKED, PATCHES}),
    "timm, written out": (lambda: timms(False), set(), {PACKED, PATCHES}),
    "timm, qk_norm": (lambda: timms(qk_norm=True), {SEPARATE}, {SEPARATE, PATCHES}),
    "timm's EVA": (eva, {SEPARATE}, {SEPARATE, PATCHES}),
    "timm's MViTv2": (mvitv2, set(), {PATCHES}),
    "Qwen2.5-VL": (qwen, {SEPARATE}, {SEPARATE}),
    "SigLIP": (pooled, {SEPARATE, PATCHES}, {SEPARATE, PATCHES}),
    "open_clip's own": (open_clip, {SEPARATE, PATCHES}, {SEPARATE, PATCHES}),
    "torch.nn": (torch_nn, {PACKED}, {PACKED}),
    "reference": (reference, set(), {PACKED, PATCHES}),
}


@contextlib.contextmanager
def everywhere(hook: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Call ``hook`` before and after every module's forward, and in its backward."""
    handles = [
        torchs_module.register_module_forward_pre_hook(lambda module, *_: hook(module, "pre")),
        torchs_module.register_module_forward_hook(lambda module, *_: hook(module, "forward")),
        torchs_module.register_module_full_backward_hook(lambda module, *_: hook(module, "backward")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("case", CASES)
def test_global_hooks_fire_as_in_the_plain_model(case: str) -> None:
    make, ops, usual_ops = CASES[case]
    model, inputs = make()
    livened(model).eval()
    fired: list[list[str]] = [[], []]
    outputs = []
    for is_swapped in (False, True):
        if is_swapped:
            assert swap(model).swapped
        names = {id(module): name for name, module in model.named_modules()}
        mine = fired[is_swapped]

        def listen(module: nn.Module, when: str, names: dict[int, str] = names, mine: list[str] = mine) -> None:
            mine.append(f"{when} {names[id(module)]}")

        with everywhere(listen), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert has_global_hooks()
            outputs.append(model(*inputs))
            outputs[-1].sum().backward()
        assert not has_global_hooks()
    assert fired[0] == fired[1]
    assert len(fired[0]) > 10
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    with everywhere(lambda *_: None), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert ops_run(lambda: model(*inputs)) == ops
    with torch.no_grad():
        assert ops_run(lambda: model(*inputs)) == usual_ops


def test_a_global_hook_is_named_and_may_change_values() -> None:
    plain, (x,) = timms()
    livened(plain).eval()
    fused = copy.deepcopy(plain)
    swap(fused)
    quiet = fused(x)

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output if isinstance(module, nn.Conv2d | nn.Identity) else None

    handle = torchs_module.register_module_forward_hook(double)
    try:
        with pytest.warns(UserWarning, match=r"FusedPatchEmbed: proj has a global hook, which fires only if"):
            actual = fused(x)
        torch.testing.assert_close(actual, plain(x), rtol=1e-4, atol=1e-4)
        assert (actual - quiet).abs().max() > 0.01
        assert "proj has a global hook" in str(swap(fused))
    finally:
        handle.remove()
    assert torch.equal(fused(x), quiet)
    assert "global hook" not in str(swap(fused))


def test_torchs_counter_sees_every_module_of_a_swapped_model() -> None:
    counts = []
    for is_swapped in (False, True):
        model, (x,) = timms()
        if is_swapped:
            swap(model)
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(x)
        counts.append({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})
    assert any(name.endswith("patch_embed.proj") for name in counts[0])
    # A CPU's attention has a formula in ours alone.
    attention = {name for name in counts[0] if counts[1][name] != counts[0][name]}
    assert all(name in ("Global", "VisionTransformer") or "block" in name for name in attention)
    assert counts[0].keys() == counts[1].keys()
    heads, seqlen, head_dim = 3, 17, 64
    added = 2 * 2 * 2 * heads * seqlen * seqlen * head_dim
    assert counts[1]["Global"] - counts[0]["Global"] == added


def test_compiled_models_notice_global_hooks() -> None:
    model, (x,) = timms()
    livened(model).eval()
    swap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        assert ops_run(lambda: compiled(x)) == {PACKED, PATCHES}
        handle = torchs_module.register_module_forward_hook(
            lambda module, args, output: 2 * output if isinstance(module, nn.Conv2d) else None
        )
        try:
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
            assert (compiled(x) - expected).abs().max() > 0.01
        finally:
            handle.remove()
        torch.testing.assert_close(compiled(x), expected)
        assert ops_run(lambda: compiled(x)) == {PACKED, PATCHES}
