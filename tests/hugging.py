"""Small configurations of transformers' real vision models, for the tests of its adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.testing import livened
from tests.swapping import by_tensor, default_and_math, forward_backward, normal

DEPTH = 2
WIDTH = {"hidden_size": 96, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 192}
IMAGES = {**WIDTH, "image_size": 48, "patch_size": 8}
Inputs = dict[str, Tensor]


class Hidden(nn.Module):
    """A model whose answer to its keyword inputs is one tensor, as the shared helpers want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs, **options: Any) -> Tensor:
        """Return the last hidden state."""
        answer = self.model(**inputs, **options)
        return answer.last_hidden_state


def _lively(model: nn.Module) -> Hidden:
    """Give random weights, sharp attention and layer scales that count."""
    livened(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj.weight", "k_proj.weight")):
                parameter.mul_(3.0)
            elif "qkv.weight" in name:
                parameter[: 2 * parameter.shape[1]].mul_(3.0)
            elif "lambda" in name:
                parameter.add_(1.0)
    return Hidden(model).eval()


def pixels(batch: int = 4, size: int = 48) -> Inputs:
    return {"pixel_values": normal(batch, 3, size, size, seed=7)}


def vit(**options: Any) -> Hidden:
    from transformers import ViTConfig, ViTModel

    return _lively(ViTModel(ViTConfig(**{**IMAGES, **options})))


def dinov2(**options: Any) -> Hidden:
    from transformers import Dinov2Config, Dinov2Model

    return _lively(Dinov2Model(Dinov2Config(**{**IMAGES, **options})))


def dinov2_with_registers(**options: Any) -> Hidden:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return _lively(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**IMAGES, **options})))


def dinov3(**options: Any) -> Hidden:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return _lively(DINOv3ViTModel(DINOv3ViTConfig(**{**IMAGES, "num_register_tokens": 4, **options})))


def siglip(**options: Any) -> Hidden:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return _lively(SiglipVisionModel(SiglipVisionConfig(**{**IMAGES, **options})))


def clip_vision(**options: Any) -> Hidden:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return _lively(CLIPVisionModel(CLIPVisionConfig(**{**IMAGES, **options})))


def clip_text(**options: Any) -> Hidden:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = {"vocab_size": 99, "max_position_embeddings": 24, "bos_token_id": 97, "eos_token_id": 98}
    return _lively(CLIPTextModel(CLIPTextConfig(**{**WIDTH, **tokens, **options})))


def qwen_vision(**options: Any) -> Hidden:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    sizes = {"hidden_size": 96, "depth": DEPTH, "num_heads": 3, "intermediate_size": 192, "out_hidden_size": 48}
    # Windows of 2×2 merged patches in the first block, whole images in the second.
    windows = {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    return _lively(Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**{**sizes, **windows, **options})))


def patches(grids: tuple[tuple[int, int, int], ...] = ((1, 6, 10), (1, 4, 4), (2, 8, 6))) -> Inputs:
    """Return flattened patches of two images and a video of two steps, and their grids."""
    count = sum(steps * rows * columns for steps, rows, columns in grids)
    return {"hidden_states": normal(count, 3 * 2 * 4 * 4, seed=7), "grid_thw": torch.tensor(grids)}


def words(batch: int = 8, length: int = 24) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": torch.randint(2, 97, (batch, length), generator=generator)}


def padded(left: bool, batch: int = 8, length: int = 24) -> Inputs:
    """Return sentences of many lengths, the first of them empty, padded on one side."""
    kept = torch.arange(batch)[:, None] * 3 > torch.arange(length)[None]
    mask = (kept.flip(1) if left else kept).long()
    return {**words(batch, length), "attention_mask": mask}


def to_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


# Each with its inputs, the class of its attention, and the types of the other rows of its report.
MODELS: dict[str, tuple[Callable[..., Hidden], Callable[..., Inputs], str, list[str]]] = {
    "vit": (vit, pixels, "ViTAttention", ["Conv2d"]),
    "dinov2": (dinov2, pixels, "Dinov2Attention", ["Conv2d"]),
    "dinov2_with_registers": (dinov2_with_registers, pixels, "Dinov2WithRegistersAttention", ["Conv2d"]),
    "dinov3": (dinov3, pixels, "DINOv3ViTAttention", ["Conv2d"]),
    "siglip": (
        siglip,
        pixels,
        "SiglipAttention",
        ["Conv2d", "MultiheadAttention", "SiglipMultiheadAttentionPoolingHead"],
    ),
    "clip_vision": (clip_vision, pixels, "CLIPAttention", ["Conv2d"]),
    "clip_text": (clip_text, words, "CLIPAttention", []),
    "qwen_vision": (qwen_vision, patches, "Qwen2_5_VLVisionAttention", ["Qwen2_5_VisionPatchEmbed"]),
}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Let eager attention and RoPE, which round to float32 by themselves, keep the float64 that they are given."""
    softmax = F.softmax
    with (
        mock.patch.object(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)),
        mock.patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32)),
    ):
        yield


def exact(model: Hidden, inputs: Inputs) -> dict[str, Tensor]:
    """Return hidden states and gradients of the model in float64."""
    with in_float64():
        return forward_backward(copy.deepcopy(model).double(), to_dtype(inputs, torch.float64))


def _as_eager_masks(inputs: Inputs) -> Inputs:
    """Write the mask of causal words and padding as eager attention's models do, for a model that runs SDPA."""
    if "attention_mask" not in inputs:
        return inputs
    length = inputs["input_ids"].shape[1]
    allowed = inputs["attention_mask"].bool()[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.float32).min
    return {**inputs, "attention_mask": torch.zeros(allowed.shape).masked_fill(~allowed, lowest)}


def torchs_own(model: Hidden, inputs: Inputs, eager: bool = True) -> dict[str, list[Tensor]]:
    """Return for each tensor its results by torch's own attention paths.

    Where there is nothing to see eager attention looks everywhere and SDPA nowhere: with ``eager`` all paths are given
    eager attention's masks, without it that path is left out.
    """
    name = model.model.config._attn_implementation
    model.model.set_attn_implementation("sdpa")
    given = _as_eager_masks(inputs) if eager else inputs
    runs = default_and_math(lambda: forward_backward(model, given))
    if eager:
        model.model.set_attn_implementation("eager")
        runs.append(forward_backward(model, inputs))
    model.model.set_attn_implementation(name)
    return by_tensor(runs)


def _siglip2() -> tuple[nn.Module, Inputs]:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    grids = torch.tensor([[6, 6], [4, 5], [3, 3], [1, 2]])
    mask = torch.arange(36)[None] < grids.prod(1)[:, None]
    flat = normal(4, 36, 3 * 8 * 8, seed=7) * mask[..., None]
    inputs = {"pixel_values": flat, "pixel_attention_mask": mask.long(), "spatial_shapes": grids}
    return Siglip2VisionModel(Siglip2VisionConfig(**WIDTH, patch_size=8, num_patches=36)), inputs


def _ast() -> tuple[nn.Module, Inputs]:
    from transformers import ASTConfig, ASTModel

    config = ASTConfig(**WIDTH, patch_size=8, max_length=48, num_mel_bins=32)
    return ASTModel(config), {"input_values": normal(4, 48, 32, seed=7)}


def _vivit() -> tuple[nn.Module, Inputs]:
    from transformers import VivitConfig, VivitModel

    config = VivitConfig(**WIDTH, image_size=32, num_frames=4, tubelet_size=[2, 8, 8])
    return VivitModel(config), {"pixel_values": normal(4, 4, 3, 32, 32, seed=7)}


def _qwen2_vl() -> tuple[nn.Module, Inputs]:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=DEPTH, embed_dim=96, hidden_size=48, num_heads=3, mlp_ratio=2, patch_size=4)
    return Qwen2VisionTransformerPretrainedModel(config), patches()


def _qwen3_vl() -> tuple[nn.Module, Inputs]:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    sizes = {"hidden_size": 96, "depth": DEPTH, "num_heads": 3, "intermediate_size": 192, "out_hidden_size": 48}
    places = {"patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLVisionModel(Qwen3VLVisionConfig(**sizes, **places)), patches()


def _images(config: str, model: str) -> tuple[nn.Module, Inputs]:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**IMAGES)), pixels()


# Classes of the same make as those above, each with its attention.
MORE: dict[str, tuple[Callable[[], tuple[nn.Module, Inputs]], str]] = {
    "aimv2": (lambda: _images("Aimv2VisionConfig", "Aimv2VisionModel"), "Aimv2Attention"),
    "ast": (_ast, "ASTAttention"),
    "deit": (lambda: _images("DeiTConfig", "DeiTModel"), "DeiTAttention"),
    "ijepa": (lambda: _images("IJepaConfig", "IJepaModel"), "IJepaAttention"),
    "metaclip_2": (lambda: _images("MetaClip2VisionConfig", "MetaClip2VisionModel"), "MetaClip2Attention"),
    "qwen2_vl": (_qwen2_vl, "VisionAttention"),
    "qwen3_vl": (_qwen3_vl, "Qwen3VLVisionAttention"),
    "siglip2": (_siglip2, "Siglip2Attention"),
    "vit_msn": (lambda: _images("ViTMSNConfig", "ViTMSNModel"), "ViTMSNAttention"),
    "vivit": (_vivit, "VivitAttention"),
}


def another(name: str) -> tuple[Hidden, Inputs]:
    model, inputs = MORE[name][0]()
    return _lively(model), inputs
