"""Swapped transformers models in what is done to them: copied, pickled, compiled, exported, given other attentions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.swap import swap, unswap
from fastvit.testing import Comparison, compare
from tests.swapping import PATCHES, SEPARATE, forward_backward, normal, ops_run, run_python

transformers = pytest.importorskip("transformers")

from transformers.modeling_utils import AttentionInterface  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed  # noqa: E402
from transformers.models.vit.modeling_vit import ViTAttention, ViTConfig  # noqa: E402

from tests import hugging  # noqa: E402
from tests.hugging import DEPTH, MODELS, Hidden, Inputs  # noqa: E402

Hold = Callable[[str, Iterable[Comparison], object], None]


@pytest.fixture
def foreign() -> Iterator[list[str]]:
    """Register an attention that other people wrote, whose masks nobody knows; return the list of its calls."""
    calls: list[str] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **_: object) -> tuple:
        calls.append(type(module).__name__)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    AttentionInterface.register("foreign", attend)
    yield calls
    AttentionInterface._global_mapping.pop("foreign")


def test_an_implementation_with_unknown_masks_is_left_alone(foreign: list[str]) -> None:
    model = hugging.vit()
    model.model.set_attn_implementation("foreign")
    report = swap(model)
    left = [row for row in report.left_alone if row.original_type == "ViTAttention"]
    assert len(left) == DEPTH
    assert left[0].reason == "attn_implementation 'foreign' has masks that fastvit cannot read"
    model(hugging.pixels())
    assert foreign == ["ViTAttention"] * DEPTH
    # These are not installed here; their names alone decide.
    for name in ("flash_attention_2", "flex_attention", "paged|eager", "kernels-community/flash-attn"):
        model.model.config._attn_implementation_internal = name
        assert f"'{name}' has masks that fastvit cannot read" in str(swap(model))
    with pytest.raises(ValueError, match=r"^strict: got True"):
        swap(model, strict=True)


def test_the_implementation_can_change_after_the_swap(foreign: list[str]) -> None:
    model = hugging.vit()
    expected = model(hugging.pixels())
    swap(model)
    model.model.set_attn_implementation("foreign")
    with pytest.warns(UserWarning, match=r"attn_implementation 'foreign' has masks that fastvit cannot") as caught:
        actual = model(hugging.pixels())
    assert len(caught) == DEPTH
    assert foreign == ["FusedViTAttention"] * DEPTH
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert "'foreign' has masks that fastvit cannot read: runs the plain forward" in str(swap(model))
    for name in ("eager", "sdpa", "fastvit"):
        model.model.set_attn_implementation(name)
        assert SEPARATE in ops_run(lambda: model(hugging.pixels()))
        torch.testing.assert_close(model(hugging.pixels()), expected, rtol=1e-4, atol=1e-4)
    assert len(foreign) == DEPTH


def test_the_config_of_a_swapped_layer() -> None:
    model = hugging.vit()
    config, layer = model.model.config, model.model.layers[0].attention
    swap(model)
    assert layer.__dict__["config"] is config
    assert layer.config._attn_implementation == "fastvit"
    assert config._attn_implementation == "sdpa"
    assert layer.config.hidden_size == config.hidden_size
    assert repr(layer.config) == repr(config)
    layer.config.initializer_range = 0.5
    assert config.initializer_range == 0.5
    with pytest.raises(AttributeError):
        _ = layer.config.no_such_thing
    for twin in (copy.copy(layer.config), copy.deepcopy(layer.config), pickle.loads(pickle.dumps(layer.config))):
        assert type(twin) is ViTConfig
        assert twin.to_dict() == config.to_dict()
    layer.config = other = copy.deepcopy(config)
    assert layer.__dict__["config"] is other
    del layer.config
    assert "config" not in layer.__dict__
    with pytest.raises(AttributeError):
        _ = layer.config.hidden_size
    layer.config = config
    unswap(model)
    assert type(layer) is ViTAttention
    assert layer.config is config


def _own_forward(layer: nn.Module) -> None:
    layer.forward = lambda hidden_states, attention_mask=None, **_: (3 * hidden_states, None)


def _wide_heads(layer: nn.Module) -> None:
    layer.head_dim = 300


def _no_config(layer: nn.Module) -> None:
    del layer.config


def _subclass(layer: nn.Module) -> None:
    layer.__class__ = HalvingAttention


class HalvingAttention(ViTAttention):
    """A user's subclass."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_own_forward, "its forward was replaced on the instance"),
        (_wide_heads, "head_dim 300: at most 256"),
        (_no_config, "it lacks config"),
        (_subclass, "a subclass of ViTAttention that may compute something else"),
    ],
)
def test_what_is_left_alone_and_why(change: Callable[[nn.Module], None], reason: str) -> None:
    model = hugging.vit()
    layer = model.model.layers[0].attention
    change(layer)
    kind = type(layer)
    report = swap(model)
    rows = [row for row in report.rows if row.original_type in ("ViTAttention", "HalvingAttention")]
    assert sorted(row.action for row in rows) == ["fused", "left alone"]
    assert any(reason in row.reason for row in report.left_alone)
    assert type(layer) is kind


def test_containers_of_patch_embeddings_are_no_layers() -> None:
    for name, inner in (("vit", "projection"), ("dinov2", "projection"), ("dinov3", "patch_embeddings")):
        build, _, kind, _ = MODELS[name]
        rows = [row for row in swap(build()).rows if row.original_type != kind]
        assert [row.name.rsplit(".", 1)[-1] for row in rows] == [inner]
    rows = {row.name.removeprefix("model."): row for row in swap(hugging.siglip()).rows}
    # This one is a layer around a layer, and both have a row.
    assert rows["head"].original_type == "SiglipMultiheadAttentionPoolingHead"
    assert rows["head.attention"].original_type == "MultiheadAttention"


def test_the_report_reads_well() -> None:
    lines = str(swap(hugging.vit(num_hidden_layers=12).model)).splitlines()
    assert any(line.startswith("layers.0-11.attention ×12") and "ViTAttention -> fused" in line for line in lines)
    assert any("output_attentions runs eager attention" in line for line in lines)
    assert "cpu: the automatic order picks cpu" in lines


def test_a_backend_by_name() -> None:
    model = hugging.vit()
    swap(model, backend="reference")
    assert "backend=reference" in repr(model)
    expected = model(hugging.pixels())
    swap(model)
    torch.testing.assert_close(model(hugging.pixels()), expected, rtol=1e-4, atol=1e-4)
    swap(model, backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run this call"):
        model(hugging.pixels())


def test_deepcopy() -> None:
    for build, make, _, _ in MODELS.values():
        model, inputs = build(), make()
        swap(model, backend="reference")
        twin = copy.deepcopy(model)
        assert torch.equal(twin(inputs), model(inputs))
        assert SEPARATE in ops_run(lambda twin=twin, inputs=inputs: twin(inputs))
        unswap(twin)
        assert not any(type(module).__name__.startswith("Fused") for module in twin.modules())
        assert any(type(module).__name__.startswith("Fused") for module in model.modules())


def test_pickle_into_a_fresh_interpreter(tmp_path: Path) -> None:
    pairs = []
    for name in ("clip_text", "qwen_vision", "dinov3"):
        build, make, _, _ = MODELS[name]
        model, inputs = build(), make()
        swap(model, backend="reference")
        pairs.append((model.model, inputs, model(inputs).detach()))
    path = tmp_path / "models.pt"
    torch.save(pairs, path)
    program = """
import sys, torch
for model, inputs, expected in torch.load(sys.argv[1], weights_only=False):
    assert (model(**inputs).last_hidden_state - expected).abs().max() < 1e-4
    fused = [module for module in model.modules() if type(module).__name__.startswith("Fused")]
    homes = [type(module).__module__ for module in fused]
    assert homes.count("fastvit.adapters.transformers_models") >= 2, homes
    from fastvit.swap import unswap
    assert len(unswap(model).rows) == len(fused)
print("done")
"""
    assert run_python(program, path).strip() == "done"


def _compiled(model: Hidden, **options: bool) -> Callable[[Inputs], Tensor]:
    torch._dynamo.reset()
    return torch.compile(lambda inputs: model(inputs, **options), fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "siglip"])
@pytest.mark.filterwarnings("ignore")
def test_compile_with_any_batch_and_two_image_sizes(name: str) -> None:
    model = MODELS[name][0](num_hidden_layers=1)
    swap(model)
    # The others take images of any size as they are.
    options = {"interpolate_pos_encoding": True} if name in ("vit", "siglip") else {}
    compiled = _compiled(model, **options)
    with torch.no_grad():
        for batch, size in ((2, 48), (3, 64)):
            inputs = hugging.pixels(batch, size)
            torch.testing.assert_close(compiled(inputs), model(inputs, **options), rtol=1e-4, atol=1e-4)
        assert SEPARATE in ops_run(lambda: compiled(hugging.pixels(3)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore")
def test_compile_with_padding(implementation: str) -> None:
    model = hugging.clip_text(num_hidden_layers=1)
    model.model.set_attn_implementation(implementation)
    swap(model)
    compiled = _compiled(model)
    for inputs in (hugging.padded(left=True), hugging.padded(left=False, batch=5)):
        torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert SEPARATE in ops_run(lambda: compiled(hugging.padded(left=True)))
    assert (compiled(hugging.padded(left=True)) - compiled(hugging.words())).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_compile_for_training() -> None:
    model = hugging.vit(attention_probs_dropout_prob=0.3, num_hidden_layers=1)
    swap(model)
    expected = forward_backward(model, hugging.pixels())
    compiled = _compiled(model)
    logits = compiled(hugging.pixels())
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    named = {name: p for name, p in model.named_parameters() if name in expected}
    grads = torch.autograd.grad((logits * normal(*logits.shape, seed=3)).sum(), list(named.values()))
    for name, grad in zip(named, grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    compiled = _compiled(model.train())
    compiled(hugging.pixels()).sum().backward()
    assert model.model.layers[0].attention.q_proj.weight.grad.abs().max() > 0
    assert SEPARATE not in ops_run(lambda: compiled(hugging.pixels()))


@pytest.mark.filterwarnings("ignore")
def test_compile_of_one_layer_and_of_weights() -> None:
    model = hugging.vit()
    swap(model)
    layer = model.model.layers[0].attention
    torch._dynamo.reset()
    tokens = normal(2, 37, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens)[0], layer(tokens)[0])
    expected = model.model(**hugging.pixels(), output_attentions=True).attentions
    torch._dynamo.reset()
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**hugging.pixels(), output_attentions=True).attentions, expected)
    assert SEPARATE in ops_run(lambda: compiled(**hugging.pixels()))


@pytest.mark.filterwarnings("ignore")
def test_export_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    for name in ("vit", "dinov3", "siglip", "clip_vision"):
        model = MODELS[name][0]()
        swap(model)
        shapes = ({"pixel_values": {0: batch}},)
        program = torch.export.export(model, (hugging.pixels(3),), dynamic_shapes=shapes)
        assert "fastvit.attention" in str(program.graph)
        for size in (1, 5):
            inputs = hugging.pixels(size)
            torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    model = hugging.clip_text()
    swap(model)
    shapes = ({"input_ids": {0: batch}, "attention_mask": {0: batch}},)
    program = torch.export.export(model, (hugging.padded(left=True),), dynamic_shapes=shapes)
    assert "fastvit.attention" in str(program.graph)
    for inputs in (hugging.padded(left=True, batch=5), hugging.padded(left=False)):
        torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def _count_calls(function: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key == SEPARATE)


def test_qwen_attends_in_windows_and_images() -> None:
    model = hugging.qwen_vision()
    swap(model, strict=True)
    inputs = hugging.patches()
    # Windows of 4×4 patches, cut off at the edges: 6×10, 4×4 and two steps of 8×6 have 2·3 + 1 + 2·(2·2). Then the
    # images and the steps themselves.
    assert _count_calls(lambda: model(inputs)) == (2 * 3 + 1 + 2 * 2 * 2) + 4
    # No image sees another.
    hidden = inputs["hidden_states"].clone()
    hidden[60:] += 1.0
    first, second = (
        model.model(**{**inputs, "hidden_states": h}).pooler_output for h in (inputs["hidden_states"], hidden)
    )
    torch.testing.assert_close(first[:15], second[:15])
    assert (first[15:] - second[15:]).abs().max() > 1e-2


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_patch_embedding(backend: str | None, dtype: torch.dtype, hold: Hold) -> None:
    module = Qwen2_5_VisionPatchEmbed(patch_size=14, embed_dim=64).to(dtype)
    # As the processor gives them: float32, whatever the weights are.
    flat = normal(80, 3 * 2 * 14 * 14).to(dtype).float()

    def run(module: nn.Module, flat: Tensor, wanted: bool = True) -> list[Tensor]:
        flat = flat.detach().requires_grad_(wanted)
        tokens = module(flat)
        weighting = normal(*tokens.shape, seed=3).to(dtype).to(tokens.dtype)
        leaves = [module.proj.weight, flat] if wanted else [module.proj.weight]
        return [tokens.detach(), *torch.autograd.grad((tokens * weighting).sum(), leaves)]

    truth, own = run(copy.deepcopy(module).double(), flat.double()), run(module, flat)
    assert swap(module, backend=backend, strict=True).counts == {"fused": 1}
    for wanted in (True, False):
        mine: list[Tensor] = []
        ran = ops_run(lambda wanted=wanted, mine=mine: mine.extend(run(module, flat, wanted)))
        # torch's own product, unless it would miss the rule: the patches' gradient in float32.
        assert ran == ({PATCHES} if backend or (wanted and dtype == torch.float32) else set())
        assert [tensor.shape for tensor in mine] == [(80, 64), module.proj.weight.shape, flat.shape][: len(mine)]
        names = ("tokens", "weight's gradient", "patches' gradient")
        comparisons = [compare(*four) for four in zip(mine, truth, own, names, strict=False)]
        hold("transformers flat patch embedding", comparisons, (backend, dtype))
    unswap(module)
    assert all(map(torch.equal, run(module, flat), own))


def test_a_hook_on_the_convolution_makes_that_module_step_back() -> None:
    module, flat = Qwen2_5_VisionPatchEmbed(embed_dim=48), normal(5, 3 * 2 * 14 * 14)
    expected = module(flat)
    swap(module)
    torch.testing.assert_close(module(flat), expected, rtol=1e-4, atol=1e-4)
    seen: list[Tensor] = []
    module.proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.warns(UserWarning, match=r"FusedQwen2_5_VisionPatchEmbed: proj has a hook"):
        assert torch.equal(module(flat), expected)
    assert seen[0].shape == (5, 48, 1, 1, 1)
    assert "proj has a hook" in str(swap(module))
    with fastvit.backend("cuda"):
        assert torch.equal(module(flat), expected)
