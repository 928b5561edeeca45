"""The architectures of ``python -m benchmarks architectures``: real classes at their real width, two layers deep.

Two layers show every layer of a model, and keep its float64 run and its gradients small enough for any machine.
Weights are random. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


def _images(size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


# Name, image size, and the options that make it two layers deep.
TIMM: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("vit_tiny_patch16_224", 224, {"depth": DEPTH}),
    ("vit_small_patch16_384", 384, {"depth": DEPTH}),
    ("vit_base_patch16_224", 224, {"depth": DEPTH}),
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
    ("beitv2_base_patch16_224", 224, {"depth": DEPTH}),
    ("cait_xxs24_224", 224, {"depth": DEPTH, "depth_token_only": 1}),
    ("convit_tiny", 224, {"depth": DEPTH}),
    ("swin_tiny_patch4_window7_224", 224, {"depths": (1, 1)}),
    ("swinv2_tiny_window8_256", 256, {"depths": (1, 1)}),
    ("mvitv2_tiny", 224, {}),
)


def _timm() -> Iterator[Architecture]:
    def build(name: str, options: dict[str, Any]) -> nn.Module:
        return importlib.import_module("timm").create_model(name, **options)

    for name, size, options in TIMM:
        yield Architecture("timm", name, lambda name=name, options=options: build(name, options), (_images(size),))


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
        yield Architecture("torchvision", name, lambda sizes=sizes: build(*sizes), (_images(sizes[-1]),))
    yield Architecture(
        "torchvision", "swin_t", lambda: importlib.import_module("torchvision").models.swin_t(), (_images(224),)
    )


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
            lambda config=config, model=model, options=options: build(config, model, options),
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


def _open_clip() -> Iterator[Architecture]:
    def build(name: str) -> nn.Module:
        library = importlib.import_module("open_clip")
        config = library.get_model_config(name)
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = DEPTH
        kind = importlib.import_module("open_clip.model").CLIP
        return kind(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=False)

    text = torch.randint(1, 40000, (1, 77), generator=torch.Generator().manual_seed(7))
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-S-16"):
        yield Architecture("open_clip", name, lambda name=name: build(name), (_images(224), text))


# gelu, because one rounding may carry a ReLU's unit past its kink, where the gradient jumps.
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
