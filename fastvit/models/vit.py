"""The Vision Transformer of the paper in plain torch: the model that the kernels are measured against.

No kernel, no fused call: a convolution cuts the patches and the attention is written out as the paper writes it.
Module and parameter names are timm's, so that its weights load with ``strict=True``.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929 (ViT below). Sizes
Ti and S: Touvron et al. 2021 and Steiner et al. 2022; 2-D sin-cos positions: Beyer et al. 2022, "Better plain ViT
baselines".
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


class Variant(NamedTuple):
    """Width, depth, number of heads and patch size of a named model; the MLP is four times as wide."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int


VARIANTS: dict[str, Variant] = {
    "Ti/16": Variant(192, 12, 3, 16),
    "S/16": Variant(384, 12, 6, 16),
    "S/32": Variant(384, 12, 6, 32),
    "B/8": Variant(768, 12, 12, 8),
    "B/16": Variant(768, 12, 12, 16),
    "B/32": Variant(768, 12, 12, 32),
    "L/16": Variant(1024, 24, 16, 16),
    "L/32": Variant(1024, 24, 16, 32),
    "H/14": Variant(1280, 32, 16, 14),
}


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token, [B, C, H, W] to [B, N, D] (ViT, equation 1).

    Raises ValueError when the images are not of ``img_size``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.img_size = _pair("img_size", img_size)
        self.patch_size = _pair("patch_size", patch_size)
        if any(image % patch for image, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size: got {self.img_size}; accepted are multiples of patch_size {self.patch_size}")
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless ``images`` are [B, in_chans, *img_size]."""
        expected = (self.proj.in_channels, *self.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images: got shape {tuple(images.shape)}; accepted is (batch, {str(expected)[1:]}")

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens [B, N, D], row by row over the grid."""
        self.check_images(images)
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(QKᵀ/√d)V per head (ViT, equations 5 to 8), [B, N, D] to [B, N, D].

    ``softmax`` is a module of its own so that a forward hook on it can read the attention matrix [B, H, N, N].
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; it must divide embed_dim {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens, shape of ``x``."""
        batch, seqlen, dim = x.shape
        qkv = self.qkv(x).reshape(batch, seqlen, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 times [B, H, N, d]
        scores = (query * self.scale) @ key.transpose(-2, -1)  # [B, H, N, N]
        heads = self.softmax(scores) @ value  # [B, H, N, d]
        return self.proj_drop(self.proj(heads.transpose(1, 2).reshape(batch, seqlen, dim)))


class Mlp(nn.Module):
    """Two dense layers with an exact GELU between them (ViT, section 3.1)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens, shape of ``x``."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Block(nn.Module):
    """A pre-norm encoder layer: x + attention(norm(x)), then x + mlp(norm(x)) (ViT, equations 2 and 3)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoded tokens, shape of ``x``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patch embedding, class token, positions, encoder and head; images [B, C, H, W] to logits [B, num_classes].

    Args:
        img_size, patch_size: pixels, one number or (height, width); the patch must divide the image.
        in_chans: channels of the images.
        num_classes: width of the head; 0 leaves the pooled features [B, embed_dim].
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the encoder.
        pos_embed: "learn" (1-D, a parameter) or "sincos2d" (fixed, a buffer with zeros for the class token).
        global_pool: "token" reads the class token, "avg" the mean of the patch tokens, both after the final norm.
        class_token: whether the class token exists; by default when global_pool reads it.
        dropout: rate after every dense layer but qkv and after the positions, in training (ViT, appendix B.1).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pos_embed: Literal["learn", "sincos2d"] = "learn",
        global_pool: Literal["token", "avg"] = "token",
        class_token: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        class_token = global_pool == "token" if class_token is None else class_token
        if pos_embed not in ("learn", "sincos2d"):
            raise ValueError(f"pos_embed: got {pos_embed!r}; accepted are 'learn' and 'sincos2d'")
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool: got {global_pool!r}; accepted are 'token' and 'avg'")
        if global_pool == "token" and not class_token:
            raise ValueError("class_token: got False; global_pool='token' needs the class token")
        self.global_pool = global_pool
        self.num_prefix_tokens = int(class_token)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        if pos_embed == "learn":
            seqlen = self.num_prefix_tokens + self.patch_embed.num_patches
            self.pos_embed = nn.Parameter(torch.empty(1, seqlen, embed_dim))
        else:
            fixed = sincos2d_positions(self.patch_embed.grid_size, embed_dim, self.num_prefix_tokens)
            self.register_buffer("pos_embed", fixed.to(torch.get_default_dtype()))
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: positions N(0, 0.02), dense layers truncated at 0.02, patches LeCun, class token and head 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.patch_embed.proj
        nn.init.trunc_normal_(patches.weight, std=math.prod(patches.weight.shape[1:]) ** -0.5)
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the encoder's normalised tokens [B, prefix + N, D]."""
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        return self.norm(self.blocks(x))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, num_classes], in the dtype of the weights."""
        x = self.forward_features(images)
        pooled = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        return self.head(pooled)


def sincos2d_positions(
    grid_size: tuple[int, int], embed_dim: int, num_prefix_tokens: int = 0, temperature: float = 10000.0
) -> Tensor:
    """Return fixed positions [1, prefix + N, D] in float64: per token [sin xω, cos xω, sin yω, cos yω], prefix rows 0.

    ω_i = temperature^(−i / (D/4 − 1)), i < D/4. Raises ValueError unless D is a multiple of 4 and at least 8.
    Source: Beyer et al. 2022, ``posemb_sincos_2d``.
    """
    if embed_dim % 4 or embed_dim < 8:
        raise ValueError(f"embed_dim: got {embed_dim}; sincos2d positions need a multiple of 4, at least 8")
    height, width = grid_size
    quarter = embed_dim // 4
    omega = temperature ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega  # [N, D/4]
    positions = torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)
    return torch.cat((positions.new_zeros(num_prefix_tokens, embed_dim), positions)).unsqueeze(0)


def create(variant: str, **options: Any) -> VisionTransformer:
    """Return the model of ``VARIANTS[variant]``; ``options`` are VisionTransformer's and override the table."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}; accepted are {', '.join(map(repr, VARIANTS))}")
    return VisionTransformer(**{**VARIANTS[variant]._asdict(), **options})


def vit_ti16(**options: Any) -> VisionTransformer:
    """ViT-Ti/16, 5.7 M parameters at 224 pixels."""
    return create("Ti/16", **options)


def vit_s16(**options: Any) -> VisionTransformer:
    """ViT-S/16, 22 M parameters at 224 pixels."""
    return create("S/16", **options)


def vit_s32(**options: Any) -> VisionTransformer:
    """ViT-S/32, 23 M parameters at 224 pixels."""
    return create("S/32", **options)


def vit_b8(**options: Any) -> VisionTransformer:
    """ViT-B/8, 86 M parameters (ViT, table 1)."""
    return create("B/8", **options)


def vit_b16(**options: Any) -> VisionTransformer:
    """ViT-B/16, 86 M parameters (ViT, table 1)."""
    return create("B/16", **options)


def vit_b32(**options: Any) -> VisionTransformer:
    """ViT-B/32, 88 M parameters at 224 pixels."""
    return create("B/32", **options)


def vit_l16(**options: Any) -> VisionTransformer:
    """ViT-L/16, 307 M parameters in the paper's table 1, 304 M by count at 224 pixels with 1000 classes."""
    return create("L/16", **options)


def vit_l32(**options: Any) -> VisionTransformer:
    """ViT-L/32, 307 M parameters at 224 pixels."""
    return create("L/32", **options)


def vit_h14(**options: Any) -> VisionTransformer:
    """ViT-H/14, 632 M parameters (ViT, table 1)."""
    return create("H/14", **options)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"{name}: got {value!r}; accepted are a positive int and a pair of them")
    return pair
