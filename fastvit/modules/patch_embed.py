"""Image to tokens with timm's PatchEmbed constructor, parameters and keys, around the fused op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.kernels.spec import PatchEmbedSpec, patch_grid
from fastvit.modules.fused import FusedForward, has_own_forward, hook_on, own_obstacles
from fastvit.ops import patch_embed
from fastvit.ops.backends import check_backend_name

CHILDREN = frozenset({"proj", "norm"})
FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


@torch.fx.wrap
def embed_grid(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str | None,
    stride: tuple[int, int] | None = None,
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Return the grid of tokens [B, rows, columns, D]; like conv2d, drop pixels beyond the last whole patch."""
    height, width = images.shape[2] + 2 * padding[0], images.shape[3] + 2 * padding[1]
    patch = (weight.shape[2], weight.shape[3])
    grid = patch_grid((height, width), patch, stride)
    # torch.jit.trace gives sizes as tensors, which a stride cannot be: where the patches tile, none is given.
    if stride is not None or height % patch[0] or width % patch[1]:
        tokens = patch_embed(images, weight, bias, stride=stride or patch, padding=padding, backend=backend)
    else:
        tokens = patch_embed(images, weight, bias, padding=padding, backend=backend)
    return tokens.unflatten(1, grid)


@torch.fx.wrap
def _pad_to_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    below, right = (-images.shape[2]) % patch_size[0], (-images.shape[3]) % patch_size[1]
    return F.pad(images, (0, right, 0, below)) if below or right else images


@torch.fx.wrap
def arrange(grid: Tensor, output_format: str, like: Tensor) -> Tensor:
    """Return the grid [B, rows, columns, D] in another layout, contiguous where conv2d's output would be."""
    if output_format == "NHWC":
        return grid
    if output_format == "NLC":
        return grid.flatten(1, 2)
    grid = grid.permute(0, 3, 1, 2)
    if not like.is_contiguous(memory_format=torch.channels_last):
        grid = grid.contiguous()
    return grid.flatten(2) if output_format == "NCL" else grid


class FusedPatchEmbedForward(FusedForward):
    """The fused forward of a patch embedding, for any class with ``proj``, a Conv2d whose stride is its kernel.

    ``proj``'s own Parameters are read at each call and ``proj`` itself is not called. Where that would lose something
    (a hook on ``proj``, another module or another stride in its place) the plain class's own forward runs.
    """

    fastvit_kind = "patch embedding"
    img_size: Any
    patch_size: Any
    output_fmt: Any
    proj: Any
    norm: Any

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        obstacles = own_obstacles(module, CHILDREN)
        if "proj" not in module._modules:
            obstacles.append("it lacks proj")
        return obstacles

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the plain forward would run."""
        reason = why_call(cast(nn.Module, module.proj))
        return [f"{reason}: runs the plain forward"] if reason else []

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> PatchEmbedSpec | None:
        """Return an image of 14×14 patches."""
        if not isinstance(proj := module.proj, nn.Conv2d):
            return None
        rows, columns = (int(side) for side in proj.kernel_size)
        size = (14 * rows, 14 * columns, rows, columns)
        return PatchEmbedSpec(1, proj.in_channels, *size, proj.out_channels, dtype, device)

    def _embed_grid(self, images: Tensor) -> Tensor:
        return embed_grid(images, self.proj.weight, self.proj.bias, self._fastvit_backend)

    def _check_size(self, height: int, width: int) -> None:
        if self.img_size is None:
            return
        if getattr(self, "strict_img_size", True):
            expected_height, expected_width = self.img_size
            _require(height == expected_height, "height", height, f"is {expected_height}")
            _require(width == expected_width, "width", width, f"is {expected_width}")
        elif not self.dynamic_img_pad:
            self._check_multiple(height, width)

    def _check_multiple(self, height: int, width: int) -> None:
        rows, columns = self.patch_size
        _require(height % rows == 0, "height", height, f"are multiples of {rows}")
        _require(width % columns == 0, "width", width, f"are multiples of {columns}")

    def _output_format(self) -> str:
        return "NLC" if self.flatten else str(getattr(self.output_fmt, "value", self.output_fmt))

    def _fused_forward(self, images: Tensor) -> Any:
        _, _, height, width = images.shape
        self._check_size(height, width)
        if self.dynamic_img_pad:
            images = _pad_to_patches(images, self.patch_size)
        return self.norm(arrange(self._embed_grid(images), self._output_format(), images))

    def forward(self, x: Tensor) -> Any:
        """Return the tokens of the images.

        Args:
            x: [B, C, H, W], NCHW or channels_last, the weights' dtype or, under autocast, any floating dtype.

        Returns:
            [B, N, D], or the layout of ``output_fmt``; normalised if there is a norm.

        Raises:
            AssertionError: the size is not the one (or not a multiple of the patch) that this module accepts.
        """
        if reason := why_call(self.proj):
            self._warn_fallback(reason)
            return super().forward(x)
        return self._fused_forward(x)


def _require(condition: bool, side: str, size: int, accepted: str) -> None:
    # A text with the size in it would compile one graph per size. torch._assert, as in timm, because it can be traced
    # symbolically; it raises AssertionError.
    got: int | str = "another" if torch.compiler.is_compiling() else size
    torch._assert(condition, f"images: got {side} {got}; accepted {accepted}")


def why_call(proj: nn.Module, overlaps: bool = False) -> str | None:
    """Return why ``proj`` has to be called, None if the op can; ``overlaps`` allows any stride and padding."""
    if not isinstance(proj, nn.Conv2d) or type(proj).forward is not nn.Conv2d.forward or has_own_forward(proj):
        return f"proj is a {type(proj).__name__} with a forward of its own"
    if hook := hook_on(proj):
        return f"proj has {hook}, which fires only if proj is called"
    tiles = proj.stride == proj.kernel_size and proj.padding in ((0, 0), "valid")
    known_padding = isinstance(proj.padding, tuple) and proj.padding_mode == "zeros"
    if not (tiles or (overlaps and known_padding)):
        return f"proj has stride {proj.stride} and padding {proj.padding} with kernel {proj.kernel_size}"
    if proj.dilation != (1, 1) or proj.groups != 1:
        return f"proj has dilation {proj.dilation} and groups {proj.groups}"
    return None


class _PlainPatchEmbed(nn.Module):
    """The methods of timm.layers.PatchEmbed in torch alone, with the forward that the fused one steps back to."""

    img_size: Any
    patch_size: Any
    proj: Any
    norm: Any
    grid_size: Any
    num_patches: Any
    dynamic_img_pad: bool
    _check_size: Callable[[int, int], None]

    def _sizes(
        self, img_size: int | tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int], int] | tuple[None, None, None]:
        if img_size is None:
            return None, None, None
        height, width = _pair("img_size", img_size)
        grid_size = (height // self.patch_size[0], width // self.patch_size[1])
        return (height, width), grid_size, grid_size[0] * grid_size[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size, the patch size, or both; a new patch size resamples the weights into a new ``proj``.

        The weights are resampled by the pseudo-inverse of bicubic resizing, so that a resized image gives nearly the
        same tokens (Beyer et al. 2023, FlexiViT, section 3.4).
        """
        wanted = self.patch_size if patch_size is None else _pair("patch_size", patch_size)
        changed = wanted != self.patch_size
        if changed:
            self.patch_size = wanted
            self.proj = _resampled(self.proj, self.patch_size)
        if img_size is not None or changed:
            self.img_size, self.grid_size, self.num_patches = self._sizes(img_size or self.img_size)

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        """Return the pixels per token: the patch size, or its larger side."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of tokens for an image of this size, padding counted where it is on."""
        (height, width), (rows, columns) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return math.ceil(height / rows), math.ceil(width / columns)
        return height // rows, width // columns

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens by calling ``proj``."""
        self._check_size(*x.shape[2:])
        if self.dynamic_img_pad:
            x = _pad_to_patches(x, self.patch_size)
        x = self.proj(x)
        if self.flatten or self.output_fmt == "NLC":
            x = x.flatten(2).transpose(1, 2)
        elif self.output_fmt == "NHWC":
            x = x.permute(0, 2, 3, 1)
        elif self.output_fmt == "NCL":
            x = x.flatten(2)
        return self.norm(x)


class PatchEmbed(FusedPatchEmbedForward, _PlainPatchEmbed):
    """timm.layers.PatchEmbed with the fused op: same constructor, attributes, state_dict keys and methods.

    Args:
        img_size: pixels, one number, (height, width), or None for any. patch_size: likewise, without None.
        in_chans, embed_dim: channels of the images and width of the tokens.
        norm_layer: class of a norm after the projection.
        flatten: tokens [B, N, D] if true, else [B, D, H, W]; output_fmt overrides it: NCHW, NHWC, NCL or NLC.
        bias: bias of the projection.
        strict_img_size: accept img_size only, else any multiple of the patch.
        dynamic_img_pad: pad below and to the right to a multiple of the patch.
        device, dtype: of the parameters.
        backend: run on this backend or raise; None chooses from the measured order.

    ``timm.create_model(name, embed_layer=fastvit.modules.PatchEmbed)`` builds a model with it and loads stock weights.
    Raises ValueError for sizes and formats that are not accepted.
    Source: Dosovitskiy et al. 2021, equation 1; timm 1.0.31 for names.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if output_fmt is not None and str(getattr(output_fmt, "value", output_fmt)) not in FORMATS:
            raise ValueError(f"output_fmt: got {output_fmt!r}; accepted are None and {', '.join(map(repr, FORMATS))}")
        check_backend_name(backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = _pair("patch_size", patch_size)
        self.img_size, self.grid_size, self.num_patches = self._sizes(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = "NCHW" if output_fmt is None else str(getattr(output_fmt, "value", output_fmt))
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias, **factory
        )
        self.norm = norm_layer(embed_dim, **factory) if norm_layer else nn.Identity()
        if backend is not None:
            self._fastvit_backend = backend


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(side < 1 for side in pair):
        raise ValueError(f"{name}: got {value!r}; accepted are a positive int and a pair of them")
    return pair


@torch.no_grad()
def _resampled(proj: nn.Conv2d, patch_size: tuple[int, int]) -> nn.Conv2d:
    weight = proj.weight
    resampled = nn.Conv2d(
        proj.in_channels,
        proj.out_channels,
        kernel_size=patch_size,
        stride=patch_size,
        bias=proj.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    ).train(proj.training)
    old_size = tuple(weight.shape[2:])
    pixels = math.prod(old_size)
    basis = torch.eye(pixels, dtype=torch.float32, device=weight.device).reshape(pixels, 1, *old_size)
    resize = F.interpolate(basis, size=patch_size, mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resize.reshape(pixels, -1))  # [new pixels, old pixels]
    flat = weight.flatten(2).float() @ inverse.T
    resampled.weight.copy_(flat.unflatten(2, patch_size))
    resampled.weight.requires_grad_(weight.requires_grad)
    if proj.bias is not None and resampled.bias is not None:
        resampled.bias.copy_(proj.bias)
        resampled.bias.requires_grad_(proj.bias.requires_grad)
    return resampled
