"""The architectures of ``python -m benchmarks architectures``: real classes at their real width, two layers deep.

Two layers show every layer of a model, and keep its float64 run and its gradients small enough for any machine.
Weights are random. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 2


@dataclass(frozen=True)
class Architecture:
    """One model: ``build`` makes it, ``inputs`` and ``keywords`` are what its forward takes for one image or text."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)


def architectures() -> Iterator[Architecture]:
    """Yield every architecture; a library is imported when the first of its models is built."""
    yield from _timm()
    yield from _torchvision()
    yield from _transformers()
    yield from _open_clip()
    yield from _torch_nn()


def _images(size: int, batch: int = 1, seed: int = 7) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


# MViTv2 pools by maxima: where two of nine values are a rounding apart its gradients jump, PyTorch's own too when the
# image moves by a rounding. This image has no such pair; those of seeds 7 to 9 have.
SEEDS = {"mvitv2_tiny": 11}


# Name (what follows in brackets says what differs from timm's), image size, options that make it two layers deep.
TIMM: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("vit_tiny_patch16_224", 224, {"depth": DEPTH}),
    ("vit_small_patch16_384", 384, {"depth": DEPTH}),
    ("vit_base_patch16_224", 224, {"depth": DEPTH}),
    ("vit_base_patch16_224 (qk_norm)", 224, {"depth": DEPTH, "qk_norm": True}),
    ("vit_base_patch16_224 (no qkv bias)", 224, {"depth": DEPTH, "qkv_bias": False}),
    ("vit_base_patch32_224", 224, {"depth": DEPTH}),
    ("vit_large_patch14_clip_224", 224, {"depth": DEPTH}),
    ("vit_base_patch16_siglip_224", 224, {"depth": DEPTH}),
    ("vit_base_patch16_siglip_gap_224", 224, {"depth": DEPTH}),
    ("vit_so400m_patch14_siglip_224", 224, {"depth": DEPTH}),
    ("vit_medium_patch16_gap_240", 240, {"depth": DEPTH}),
    ("vit_little_patch16_reg4_gap_256", 256, {"depth": DEPTH}),
    ("vit_small_patch14_reg4_dinov2", 224, {"depth": DEPTH, "img_size": 224}),
    ("vit_small_patch16_dinov3", 256, {"depth": DEPTH}),
    ("vit_pe_core_small_patch16_384", 384, {"depth": DEPTH}),
    ("vit_betwixt_patch16_rope_reg4_gap_256", 256, {"depth": DEPTH}),
    ("vit_small_patch16_rope_mixed_224", 224, {"depth": DEPTH}),
    ("deit_tiny_distilled_patch16_224", 224, {"depth": DEPTH}),
    ("deit3_small_patch16_224", 224, {"depth": DEPTH}),
    ("flexivit_small", 240, {"depth": DEPTH}),
    ("naflexvit_base_patch16_gap", 256, {"depth": DEPTH}),
    ("eva02_tiny_patch14_224", 224, {"depth": DEPTH}),
    ("eva02_base_patch16_clip_224", 224, {"depth": DEPTH}),
    ("beit_base_patch16_224", 224, {"depth": DEPTH}),
    ("beit_base_patch16_224 (bias tables frozen)", 224, {"depth": DEPTH}),
    ("beitv2_base_patch16_224", 224, {"depth": DEPTH}),
    ("cait_xxs24_224", 224, {"depth": DEPTH, "depth_token_only": 1}),
    ("convit_tiny", 224, {"depth": DEPTH}),
    ("swin_tiny_patch4_window7_224", 224, {"depths": (1, 1)}),
    ("swinv2_tiny_window8_256", 256, {"depths": (1, 1)}),
    ("mvitv2_tiny", 224, {}),
)


def _timm() -> Iterator[Architecture]:
    def build(name: str, options: dict[str, Any]) -> nn.Module:
        model = importlib.import_module("timm").create_model(name.split(" (")[0], **options)
        # While BEiT's bias wants a gradient its own attention runs.
        for key, parameter in model.named_parameters():
            if "frozen" in name and key.endswith("relative_position_bias_table"):
                parameter.requires_grad_(False)
        return model

    for name, size, options in TIMM:
        yield Architecture("timm", name, partial(build, name, options),
                           (_images(size, seed=SEEDS.get(name, 7)),))  # fmt: skip


# Width, heads, MLP width, patch size and image size.
TORCHVISION = {
    "vit_b_16": (768, 12, 3072, 16, 224),
    "vit_b_32": (768, 12, 3072, 32, 224),
    "vit_l_16": (1024, 16, 4096, 16, 224),
    "vit_h_14": (1280, 16, 5120, 14, 224),
}


def _torchvision() -> Iterator[Architecture]:
    def build(width: int, heads: int, mlp: int, patch: int, size: int) -> nn.Module:
        kind = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer
        return kind(size, patch, DEPTH, heads, width, mlp)

    for name, sizes in TORCHVISION.items():
        yield Architecture("torchvision", name, partial(build, *sizes), (_images(sizes[-1]),))
    yield Architecture("torchvision", "vit_b_16 (conv stem)", _conv_stem, (_images(224),))
    for name, build_other in (("swin_t", _swin_t), ("swin_v2_t", _swin_v2_t), ("maxvit_t", _maxvit_t)):
        yield Architecture("torchvision", name, build_other, (_images(224),))


# A smooth activation, because one rounding may carry a ReLU's unit past its kink, where the gradient jumps.
def _conv_stem() -> nn.Module:
    file = importlib.import_module("torchvision.models.vision_transformer")
    # Xiao et al. 2021: 3×3 convolutions of stride 2 in place of patches.
    stem = [file.ConvStemConfig(width, 3, 2, activation_layer=nn.SiLU) for width in (64, 128, 256, 512)]
    return file.VisionTransformer(224, 16, DEPTH, 12, 768, 3072, conv_stem_configs=stem)


def _swin_t() -> nn.Module:
    return importlib.import_module("torchvision").models.swin_t()


def _swin_v2_t() -> nn.Module:
    file = importlib.import_module("torchvision.models.swin_transformer")
    blocks = {"block": file.SwinTransformerBlockV2, "downsample_layer": file.PatchMergingV2}
    return file.SwinTransformer([4, 4], 96, [1, 1], [3, 6], [8, 8], **blocks)


def _maxvit_t() -> nn.Module:
    kind = importlib.import_module("torchvision.models.maxvit").MaxVit
    return kind((224, 224), 64, 7, [64, 128], [1, 1], 32, 0.0)


# Config class and model class; all of them take images of 224 unless said otherwise.
TRANSFORMERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ViTConfig", "ViTModel", {}),
    ("DeiTConfig", "DeiTModel", {}),
    ("Dinov2Config", "Dinov2Model", {"image_size": 224}),
    ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"image_size": 224}),
    ("DINOv3ViTConfig", "DINOv3ViTModel", {}),
    ("SiglipVisionConfig", "SiglipVisionModel", {}),
    ("CLIPVisionConfig", "CLIPVisionModel", {}),
    ("MetaClip2VisionConfig", "MetaClip2VisionModel", {}),
    ("IJepaConfig", "IJepaModel", {}),
    ("ViTMSNConfig", "ViTMSNModel", {}),
    ("Aimv2VisionConfig", "Aimv2VisionModel", {}),
)


def _transformers() -> Iterator[Architecture]:
    def build(config: str, model: str, options: dict[str, Any]) -> nn.Module:
        library = importlib.import_module("transformers")
        made = getattr(library, config)(num_hidden_layers=DEPTH, **options)
        return getattr(library, model)._from_config(made, attn_implementation="sdpa")

    for config, model, options in TRANSFORMERS:
        yield Architecture(
            "transformers",
            model,
            partial(build, config, model, options),
            keywords={"pixel_values": _images(224)},
        )
    length = 77
    padded = torch.ones(2, length, dtype=torch.long)
    padded[1, 50:] = 0
    ids = torch.randint(1, 40000, (2, length), generator=torch.Generator().manual_seed(7))
    yield Architecture(
        "transformers",
        "CLIPTextModel (causal, padded)",
        lambda: build("CLIPTextConfig", "CLIPTextModel", {}),
        keywords={"input_ids": ids, "attention_mask": padded},
    )
    for name, words in (("CLIP", ids), ("Siglip", ids[:, :64] % 30000)):
        yield Architecture(
            "transformers",
            f"{name}Model (both towers)",
            partial(_both_towers, name),
            keywords={"pixel_values": _images(224, 2), "input_ids": words},
        )
    flattened = torch.randn(256, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(7))
    yield Architecture("transformers", "Qwen2.5-VL's vision tower", _QwenTower, (flattened,))


def _both_towers(name: str) -> nn.Module:
    library = importlib.import_module("transformers")
    towers = {"text_config": {"num_hidden_layers": DEPTH}, "vision_config": {"num_hidden_layers": DEPTH}}
    config = getattr(library, f"{name}Config")(**towers)
    return getattr(library, f"{name}Model")._from_config(config, attn_implementation="sdpa")


class _QwenTower(nn.Module):
    """Qwen2.5-VL's tower for one image of 16×16 patches: what is computed from grids, which are data, is given."""

    def __init__(self) -> None:
        super().__init__()
        folder = "transformers.models.qwen2_5_vl"
        config = importlib.import_module(f"{folder}.configuration_qwen2_5_vl").Qwen2_5_VLVisionConfig(
            depth=DEPTH, fullatt_block_indexes=[1]
        )
        kind = importlib.import_module(f"{folder}.modeling_qwen2_5_vl").Qwen2_5_VisionTransformerPretrainedModel
        self.tower = kind._from_config(config, attn_implementation="sdpa")
        utils, grids, merge = importlib.import_module("transformers.vision_utils"), torch.tensor([[1, 16, 16]]), 2
        windows = utils.get_vision_window_index(
            grids, spatial_merge_size=merge, window_size=config.window_size, patch_size=config.patch_size
        )
        self.given = {
            "grid_thw": grids,
            "position_ids": utils.get_vision_position_ids(grids, merge),
            "cu_seqlens": utils.get_vision_cu_seqlens(grids),
            **dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True)),
        }

    def forward(self, patches: Tensor) -> Tensor:
        """Return the last hidden state of flattened patches [S, 3·2·14·14]."""
        return self.tower(patches, **self.given).last_hidden_state


def _open_clip() -> Iterator[Architecture]:
    def build(name: str) -> nn.Module:
        library = importlib.import_module("open_clip")
        config = library.get_model_config(name)
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = DEPTH
        kind = importlib.import_module("open_clip.model").CLIP
        return kind(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=False)

    text = torch.randint(1, 40000, (1, 77), generator=torch.Generator().manual_seed(7))
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-S-16"):
        yield Architecture("open_clip", name, partial(build, name), (_images(224), text))


def _torch_nn() -> Iterator[Architecture]:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(512, 8, activation="gelu", batch_first=True, norm_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    def both() -> nn.Module:
        return nn.Transformer(512, 8, DEPTH, DEPTH, activation="gelu", batch_first=True, dropout=0.0)

    source, target = (
        torch.randn(2, length, 512, generator=torch.Generator().manual_seed(length)) for length in (197, 50)
    )
    yield Architecture("torch.nn", "TransformerEncoder", encoder, (source,))
    yield Architecture("torch.nn", "Transformer", both, (source, target))
