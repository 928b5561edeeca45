"""What must survive a swap in every library, where no other file has that library's case: one small real model each.

The rest of the matrix: state_dict both ways, identity, dropout, 16 bits, autocast, deepcopy, pickle, compile and export
are in test_swap*.py of the library; timm's column is test_swap.py, test_swap_tools.py, test_swap_behaviour.py,
test_swap_rewritten.py and test_transforms.py.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, jvp, vmap

from fastvit.swap import swap
from tests.swapping import PACKED, PATCHES, SEPARATE, images, ops_run
from tests.torch_paths import lively

SIZE = 32


def timms() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=SIZE, patch_size=8, num_classes=10)


def torchvisions() -> nn.Module:
    file = pytest.importorskip("torchvision.models.vision_transformer")
    return file.VisionTransformer(SIZE, 8, 2, 2, 96, 128, num_classes=10)


class Pooled(nn.Module):
    """A transformers model with its pooling head, called with images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled output."""
        return self.model(pixel_values=x).pooler_output


def transformers_() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 128}
    config = transformers.SiglipVisionConfig(**sizes, image_size=SIZE, patch_size=8)
    return Pooled(transformers.SiglipVisionModel(config))


class Encoder(nn.Module):
    """A vision transformer of torch.nn's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 96, 8, 8)
        layer = nn.TransformerEncoderLayer(96, 3, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean token."""
        return self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


def open_clips() -> nn.Module:
    file = pytest.importorskip("open_clip.transformer")
    return file.VisionTransformer(SIZE, 8, 96, 2, 3, 2.0, output_dim=10)


def open_clips_own() -> nn.Module:
    file = pytest.importorskip("open_clip.transformer")
    return file.VisionTransformer(SIZE, 8, 96, 2, 3, 2.0, output_dim=10, qk_norm=True, scale_attn_inner=True)


# A model, the ops that it runs, its two attentions, and of each the weight that the two can share.
Row = tuple[Callable[[], nn.Module], set[str], str, str]
MODELS: dict[str, Row] = {
    "timm": (timms, {PACKED, PATCHES}, "blocks.{}.attn.qkv", "weight"),
    "torchvision": (
        torchvisions,
        {PACKED, PATCHES},
        "encoder.layers.encoder_layer_{}.self_attention",
        "in_proj_weight",
    ),
    "transformers": (transformers_, {SEPARATE, PATCHES}, "model.encoder.layers.{}.self_attn.q_proj", "weight"),
    "torch.nn": (Encoder, {PACKED, PATCHES}, "encoder.layers.{}.self_attn", "in_proj_weight"),
    "open_clip": (open_clips, {PACKED, PATCHES}, "transformer.resblocks.{}.attn", "in_proj_weight"),
    "open_clip's own attention": (
        open_clips_own,
        {SEPARATE, PATCHES},
        "transformer.resblocks.{}.attn",
        "in_proj_weight",
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(MODELS[name][0]()).eval()


def x(batch: int = 3) -> Tensor:
    return images(batch, SIZE)


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


CLIPS = ("open_clip", "open_clip's own attention")


@of("transformers", *CLIPS)
def test_an_optimizer_tied_and_frozen_weights(name: str) -> None:
    _, ops, path, weight = MODELS[name]
    models = [build(name).train(), build(name).train()]
    first, second = path.format(0), path.format(1)
    for model in models:
        setattr(model.get_submodule(second), weight, getattr(model.get_submodule(first), weight))
        next(p for n, p in model.named_parameters() if p.dim() == 4).requires_grad_(False)
    optimizers = [torch.optim.AdamW((p for p in model.parameters()), lr=1e-3) for model in models]
    before = copy.deepcopy(models[0].state_dict())
    swap(models[0], strict=True)
    assert ops_run(lambda: models[0](x())) == ops
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x()).square().mean().backward()
            optimizer.step()
    fused, plain = models
    assert getattr(fused.get_submodule(second), weight) is getattr(fused.get_submodule(first), weight)
    for key, value in fused.named_parameters():
        assert torch.equal(value, before[key]) != value.requires_grad, key
    with torch.no_grad():
        torch.testing.assert_close(fused(x()), plain(x()), rtol=1e-3, atol=1e-3)


# SigLIP's pooling head has a test of its own for the hook that gets its weights.
@of("transformers", *CLIPS)
def test_hooks_on_every_module_fire_in_the_same_order(name: str) -> None:
    orders = []
    for is_swapped in (False, True):
        model, fired = build(name), []
        for path, module in model.named_modules():
            # open_clip's own attention never calls attn_drop, and steps back for a hook on it.
            if path.endswith("attn_drop"):
                continue
            if not path.endswith("head.attention"):
                module.register_forward_hook(lambda *_, n=path, f=fired: f.append(f"forward {n}"))
            module.register_forward_pre_hook(lambda *_, n=path, f=fired: f.append(f"pre {n}"))
            module.register_full_backward_hook(lambda *_, n=path, f=fired: f.append(f"backward {n}"))
        if is_swapped:
            swap(model, strict=True)
        ran = ops_run(lambda model=model: model(x().requires_grad_()).sum().backward())
        # A backward hook gives its module query, key and value as three tensors, even where they were one.
        assert ran - {PACKED, SEPARATE} == ({PATCHES} if is_swapped else set())
        assert bool(ran & {PACKED, SEPARATE}) == is_swapped
        orders.append(fired)
    assert orders[0] == orders[1]
    assert len(orders[0]) > 40


@of(*CLIPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_changes_after_the_swap(name: str, dtype: torch.dtype) -> None:
    model, plain = build(name), build(name)
    swap(model, strict=True)
    with torch.no_grad():
        for kind in (dtype, torch.float64):
            given = x().to(kind)
            expected = plain.to(kind)(given)
            actual = model.to(kind)(given)
            assert actual.dtype == kind
            tolerance = 0.1 if kind == dtype else 1e-2
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
            assert ops_run(lambda given=given: model(given)) == MODELS[name][1]


@of("torchvision", "transformers", "torch.nn", *CLIPS)
def test_per_sample_gradients(name: str) -> None:
    model = build(name)
    weighting = F.normalize(model(x()).detach()[:1], dim=-1)

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return (functional_call(model, parameters, (one[None],)) * weighting).sum()

    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
    expected = [grad(loss)(parameters, one) for one in x()]
    swap(model, strict=True)
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(vmap(grad(loss), (None, 0))(parameters, x()))) == MODELS[name][1]
    assert mine.keys() == parameters.keys()
    for key, value in mine.items():
        theirs = torch.stack([each[key] for each in expected])
        scale = theirs.abs().max().item()
        torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-4 * scale + 1e-5, msg=lambda m, k=key: f"{k}: {m}")


@of(*MODELS)
def test_forward_mode_is_refused_never_zero(name: str) -> None:
    model = build(name)
    swap(model, strict=True)
    with pytest.raises(NotImplementedError, match=r"^fastvit \w+: forward-mode .* not supported; use reverse mode"):
        jvp(model, (x(),), (x(),))


@of("torchvision", "transformers", *CLIPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_the_feed_forward_and_what_is_called_of_attention(name: str, when: str) -> None:
    peft = pytest.importorskip("peft")
    # nn.MultiheadAttention calls none of its children; LoRA wraps the whole of it, which test_swap_torch_nn_layers has.
    targets = {"transformers": r".*(self_attn\.(q_proj|out_proj)|encoder.*fc1)", "torchvision": r".*mlp\.(0|3)"}
    config = peft.LoraConfig(r=2, target_modules=targets.get(name, r".*c_fc"), init_lora_weights=False)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(4)
        return peft.get_peft_model(model, config).eval()

    plain, model = adapted(build(name)), build(name)
    if when == "after":
        swap(model, strict=True)
    model = adapted(model)
    if when == "before":
        swap(model, strict=True)
    assert ops_run(lambda: model(x())) == MODELS[name][1]
    torch.testing.assert_close(model(x()), plain(x()), rtol=1e-3, atol=1e-3)
    assert (plain(x()) - build(name)(x())).abs().max() > 1e-2
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    model(x()).sum().backward()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert trained


@of("torchvision", "transformers", *CLIPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_int8_weights(name: str, when: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantised(model: nn.Module) -> nn.Module:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    plain, model = quantised(build(name)), build(name)
    if when == "before":
        model = quantised(model)
    swap(model, strict=True)
    if when == "after":
        model = quantised(model)
    with torch.no_grad():
        assert ops_run(lambda: model(x())) == MODELS[name][1]
        torch.testing.assert_close(model(x()), plain(x()), rtol=1e-3, atol=1e-3)
        assert (plain(x()) - build(name)(x())).abs().max() > 1e-4


class Resized(nn.Module):
    """transformers' CLIP tower on images of any size."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 128}
        config = transformers.CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=8)
        self.model = transformers.CLIPVisionModel(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled output."""
        return self.model(pixel_values=x, interpolate_pos_encoding=True).pooler_output


def timms_of_any_size(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, depth=2, img_size=SIZE, patch_size=8, num_classes=10, dynamic_img_size=True)


# A model, whether it takes images of any size, and the ops that it runs.
COMPILED: dict[str, tuple[Callable[[], nn.Module], bool, set[str]]] = {
    "open_clip": (open_clips, False, {PACKED, PATCHES}),
    "open_clip's own attention": (open_clips_own, False, {SEPARATE, PATCHES}),
    "transformers' SigLIP": (transformers_, False, {SEPARATE, PATCHES}),
    "transformers' CLIP": (Resized, True, {SEPARATE, PATCHES}),
    "timm's EVA": (lambda: timms_of_any_size("eva02_tiny_patch14_224"), True, {SEPARATE, PATCHES}),
    "timm's DINOv3": (lambda: timms_of_any_size("vit_small_patch16_dinov3"), True, {SEPARATE, PATCHES}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_with_a_dynamic_batch_and_two_image_sizes(name: str) -> None:
    make, is_any_size, ops = COMPILED[name]
    torch.manual_seed(0)
    model = lively(make()).eval()
    swap(model, strict=True)
    torch._dynamo.reset()
    counters.clear()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    calls = [(2, SIZE), (5, SIZE), (3, SIZE)] + ([(4, SIZE + 16), (5, SIZE + 32)] if is_any_size else [])
    graphs = []
    with torch.no_grad():
        for batch, size in calls:
            torch.testing.assert_close(compiled(images(batch, size)), model(images(batch, size)), rtol=1e-4, atol=1e-4)
            graphs.append(counters["stats"]["unique_graphs"])
        assert ops_run(lambda: compiled(images(*calls[-1]))) == ops
    # The second batch makes its size dynamic, the second image its own.
    assert graphs == [1, 2, 2, 3, 3][: len(calls)]


@of("torchvision", "transformers", "torch.nn", *CLIPS)
def test_export_with_a_dynamic_batch(name: str, tmp_path: Path) -> None:
    model = build(name)
    swap(model, strict=True)
    batches = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x(3),), dynamic_shapes=batches)
        loaded: Any = program.module()
        if name == "transformers":
            # An AOTInductor package holds the same ops, whichever library they come from (timm's packed one:
            # tests/test_swap_behaviour.py).
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
            loaded = torch._inductor.aoti_load_package(package)
        for batch in (1, 5):
            torch.testing.assert_close(loaded(x(batch)), model(x(batch)), rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: loaded(x(5))) == MODELS[name][1]
