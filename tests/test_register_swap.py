"""The public registry: a worked example, replacing, subclasses, and an error for each wrong use."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit import adapters
from fastvit.adapters import reference_vit, register_swap, registered
from fastvit.models import vit
from fastvit.modules import FusedAttentionForward, FusedForward
from fastvit.swap import swap, unswap
from fastvit.testing import compare, livened
from tests.swapping import PACKED, hold_the_rule, normal, ops_run, run_python


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test tables of its own."""
    registered()
    monkeypatch.setattr(adapters, "_FUSED", dict(adapters._FUSED))
    monkeypatch.setattr(adapters, "_ORIGINALS", dict(adapters._ORIGINALS))


class PlainAttention(nn.Module):
    """Somebody's attention: qkv, proj and num_heads, no head_dim, no scale, and no masks."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value)
        return self.proj(heads.transpose(1, 2).flatten(2))


class FusedPlainAttention(FusedAttentionForward, PlainAttention):
    """Its fused version."""


class OtherFusedAttention(FusedAttentionForward, PlainAttention):
    """Another one."""


class HalvingAttention(PlainAttention):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class MaskedAttention(PlainAttention):
    """A subclass with an argument more."""

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return super().forward(x if rope is None else x + rope)


class ScaledAttention(PlainAttention):
    """A subclass with a softmax scale of its own."""

    scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(heads.transpose(1, 2).flatten(2))


class FusedScaled(FusedAttentionForward, ScaledAttention): ...


class FusedHalving(FusedAttentionForward, HalvingAttention): ...


class FusedMasked(FusedAttentionForward, MaskedAttention): ...


class Behind(PlainAttention, FusedAttentionForward): ...


class Silent(FusedForward, PlainAttention): ...


def example() -> str:
    """Return the code of register_swap's docstring."""
    lines = inspect.getdoc(register_swap).splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("::"))
    end = next(number for number, line in enumerate(lines) if number > start and line and not line.startswith("    "))
    return inspect.cleandoc("\n".join(lines[start + 1 : end]))


def test_the_worked_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = example()
    assert len([line for line in code.splitlines() if line]) <= 15
    module = types.ModuleType("the_worked_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, module.__name__, "exec"), module.__dict__)
    assert "0  MyAttention -> fused" in capsys.readouterr().out
    attention = livened(module.MyAttention(96, 3))
    print(f"worst {hold_the_rule(attention, normal(8, 17, 96, seed=1), 1, {PACKED}):.2f}")
    x = normal(2, 17, 96)
    expected = attention(x)
    swap(attention)
    torch.testing.assert_close(attention(x), expected)
    masked = attention(x, is_causal=True)
    assert (masked - expected).abs().max() > 0.01


def test_a_whole_adapter_in_one_line() -> None:
    module = livened(PlainAttention(96, 3))
    assert swap(module).left_alone[0].reason.startswith("no fused version of ")
    register_swap(PlainAttention, FusedPlainAttention)
    hold_the_rule(module, normal(8, 17, 96, seed=1), 1, {PACKED})
    # What the plain class lacks is not needed: the spec in the report, a deep copy and 16 bits.
    assert "the automatic order picks" in str(swap(module))
    twin = copy.deepcopy(module).to(torch.bfloat16)
    assert twin(normal(2, 17, 96).to(torch.bfloat16)).dtype == torch.bfloat16
    strange = PlainAttention(96, 3)
    strange.rel_pos = nn.Parameter(torch.zeros(3, 17, 17))
    assert "parts that fastvit does not know: rel_pos" in swap(strange).left_alone[0].reason


def test_a_scale_of_its_own_is_used() -> None:
    register_swap(ScaledAttention, FusedScaled)
    module = livened(ScaledAttention(96, 3))
    hold_the_rule(module, normal(8, 17, 96, seed=1), 1, {PACKED})
    x = normal(2, 17, 96)
    assert (module(x) - PlainAttention.forward(module, x)).abs().max() > 0.01


def test_registering_twice_and_replacing() -> None:
    register_swap(PlainAttention, FusedPlainAttention)
    register_swap(PlainAttention, FusedPlainAttention)
    early, x = livened(PlainAttention(96, 3)), normal(2, 17, 96)
    expected = early(x)
    swap(early)
    with pytest.raises(ValueError, match=r"^original: got .*FusedPlainAttention.* is registered; replace=True"):
        register_swap(PlainAttention, OtherFusedAttention)
    assert registered()[PlainAttention] is FusedPlainAttention
    register_swap(PlainAttention, OtherFusedAttention, replace=True)
    late = livened(PlainAttention(96, 3))
    assert swap(late).counts == {"fused": 1}
    assert type(late) is OtherFusedAttention
    # What was swapped before keeps its class, says so, runs, and finds its way back.
    assert swap(early).counts == {"already fused": 1}
    assert swap(early).rows[0].original_type == "PlainAttention"
    assert type(early) is FusedPlainAttention
    torch.testing.assert_close(early(x), expected)
    for module in (early, late):
        assert [row.original_type for row in unswap(module).rows] == ["PlainAttention"]
        assert type(module) is PlainAttention
        assert torch.equal(module(x), expected)


def test_a_subclass_is_left_alone_until_it_is_registered_itself() -> None:
    register_swap(PlainAttention, FusedPlainAttention)
    model = nn.Sequential(livened(PlainAttention(96, 3)), livened(HalvingAttention(96, 3)))
    x = normal(2, 17, 96)
    expected = model(x)
    report = swap(model)
    assert [row.name for row in report.left_alone] == ["1"]
    assert "a subclass of PlainAttention that may compute something else" in report.left_alone[0].reason
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert type(model[1]) is HalvingAttention


def test_an_argument_that_the_plain_forward_lacks_is_refused_in_a_fallback() -> None:
    register_swap(PlainAttention, FusedPlainAttention)
    module = PlainAttention(96, 3)
    module.attn_drop = nn.Dropout(0.5)
    swap(module.train())
    with pytest.warns(UserWarning, match=r"attention dropout"):
        module(normal(2, 17, 96))
    with pytest.raises(TypeError, match=r"attn_mask"):
        module(normal(2, 17, 96), is_causal=True)


def local_class() -> type[nn.Module]:
    class Inner(FusedAttentionForward, PlainAttention):
        pass

    return Inner


def renamed_class() -> type[nn.Module]:
    return type("FusedPlainAttention", (FusedAttentionForward, PlainAttention), {"__module__": __name__})


@pytest.mark.parametrize(
    ("original", "fused", "error", "message"),
    [
        (
            "Attention",
            FusedPlainAttention,
            TypeError,
            r"^original: got 'Attention'; accepted is a subclass of torch",
        ),
        (int, FusedPlainAttention, TypeError, r"^original: got <class 'int'>; accepted is a subclass of torch"),
        (FusedPlainAttention, FusedPlainAttention, TypeError, r"^original: got .*this one is fused"),
        (PlainAttention, PlainAttention, TypeError, r"^fused: got .*a subclass of FusedForward and of PlainAttention"),
        (PlainAttention, None, TypeError, r"^fused: got None; accepted is a subclass"),
        (PlainAttention, lambda module: module, TypeError, r"^fused: got <function.*; accepted is a subclass"),
        (vit.PatchEmbed, reference_vit.FusedAttention, TypeError, r"^fused: got .*and of PatchEmbed"),
        (
            PlainAttention,
            Silent,
            TypeError,
            r"^fused: got .*it must define fastvit_obstacles, fastvit_fallb",
        ),
        (PlainAttention, Behind, ValueError, r"^fused: got .*the FusedForward must stand in front of PlainAttention"),
        (
            PlainAttention,
            FusedHalving,
            ValueError,
            r"^fused: got .*whose plain class is HalvingAttention; accepted",
        ),
        (MaskedAttention, FusedMasked, ValueError, r"^fused: got .*whose forward lacks rope of MaskedAttention's"),
        (PlainAttention, local_class(), ValueError, r"^fused: got .*accepted is a class at the top level of a module"),
        (PlainAttention, renamed_class(), ValueError, r"^fused: got .*another FusedPlainAttention stands in"),
    ],
)
def test_wrong_uses(original: Any, fused: Any, error: type[Exception], message: str) -> None:
    before = registered()
    with pytest.raises(error, match=message):
        fastvit.register_swap(original, fused)
    assert registered() == before


def test_a_custom_forward_may_take_other_arguments() -> None:
    register_swap(MaskedAttention, FusedRotated)
    module = livened(MaskedAttention(96, 3))
    x, rope = normal(8, 17, 96), normal(17, 96, seed=1)
    truth, own = copy.deepcopy(module).double()(x.double(), rope=rope.double()), module(x, rope=rope)
    swap(module)
    assert ops_run(lambda: module(x, rope=rope)) == {PACKED}
    assert compare(module(x, rope=rope), truth, own).passed


class FusedRotated(FusedAttentionForward, MaskedAttention):
    """A fused class that writes its own forward, from the steps of FusedAttentionForward."""

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if rope is None else x + rope)


def test_a_library_that_its_adapter_cannot_import_is_left_alone() -> None:
    program = """
import sys, types, warnings
import torch, fastvit
from fastvit.models import vit
sys.modules["transformers.modeling_utils"] = types.ModuleType("transformers.modeling_utils")  # as in 4.x
sys.modules["transformers.masking_utils"] = sys.modules["transformers.integrations.sdpa_attention"] = None
model = vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(fastvit.swap(model).counts, fastvit.unswap(model).counts)
print(*[warning.message for warning in caught], sep="\\n")
"""
    counts, *said = run_python(program).splitlines()
    assert counts == "{'fused': 2} {'restored': 2}"
    assert len(said) == 1, said
    assert said[0].startswith("fastvit: the layers of this transformers are left alone")
