"""transformers' attention layers and patch embeddings with the fused ops inside.

transformers' attention modules project, then look up a function by the name in ``config._attn_implementation``. A
swapped module answers that question with our name, and its own forward runs on: nothing of it is written anew. Masks
are made by the model, not by its attention, so they stay those of the implementation that the model has.
"""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.adapters import TRANSFORMERS_NAME, register_swap
from fastvit.adapters.reasons import LOOKS_LIKE_ATTENTION
from fastvit.adapters.transformers_attention import EAGER, SDPA, register, weight_readers
from fastvit.adapters.transformers_pool import FusedMaskedPoolingHeadForward, FusedPoolingHeadForward
from fastvit.kernels.spec import MAX_HEAD_DIM, AttentionSpec, PatchEmbedSpec
from fastvit.modules.fused import FusedForward, has_own_forward, hook_on, own_obstacles
from fastvit.ops import patch_embed

# The implementations whose masks mean what ours do: None, a bool or an additive [B, 1 or H, Nq, Nk]. A layer that was
# built without a model has no name in its config, and runs its eager function.
READABLE = (None, EAGER, SDPA)

MODELS = "transformers.models"
# Their forward asks the interface for its attention. One line for each file of models, with its classes.
ATTENTIONS = {
    "vit.modeling_vit": ("ViTAttention",),
    "dinov2.modeling_dinov2": ("Dinov2Attention",),
    "dinov2_with_registers.modeling_dinov2_with_registers": ("Dinov2WithRegistersAttention",),
    "dinov3_vit.modeling_dinov3_vit": ("DINOv3ViTAttention",),
    "siglip.modeling_siglip": ("SiglipAttention",),
    "clip.modeling_clip": ("CLIPAttention",),
    "qwen2_5_vl.modeling_qwen2_5_vl": ("Qwen2_5_VLVisionAttention",),
    "aimv2.modeling_aimv2": ("Aimv2Attention",),
    "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer": ("ASTAttention",),
    "deit.modeling_deit": ("DeiTAttention",),
    "ijepa.modeling_ijepa": ("IJepaAttention",),
    "metaclip_2.modeling_metaclip_2": ("MetaClip2Attention",),
    "qwen2_vl.modeling_qwen2_vl": ("VisionAttention",),
    "qwen3_vl.modeling_qwen3_vl": ("Qwen3VLVisionAttention",),
    "siglip2.modeling_siglip2": ("Siglip2Attention",),
    "vit_msn.modeling_vit_msn": ("ViTMSNAttention",),
    "vivit.modeling_vivit": ("VivitAttention",),
}
# A convolution over patches that the processor has cut and flattened, each an image of its own.
FLAT_PATCH_EMBEDS = {
    "qwen2_5_vl.modeling_qwen2_5_vl": ("Qwen2_5_VisionPatchEmbed",),
    "qwen2_vl.modeling_qwen2_vl": ("PatchEmbed",),
    "qwen3_vl.modeling_qwen3_vl": ("Qwen3VLVisionPatchEmbed",),
}
# They ask nn.MultiheadAttention for its weights, by torch's default, and drop them.
POOLING_HEADS = {
    "idefics2.modeling_idefics2": ("Idefics2MultiheadAttentionPoolingHead",),
    "siglip.modeling_siglip": ("SiglipMultiheadAttentionPoolingHead",),
}
MASKED_POOLING_HEADS = {
    "phi4_multimodal.modeling_phi4_multimodal": ("Phi4MultimodalVisionMultiheadAttentionPoolingHead",),
    "siglip2.modeling_siglip2": ("Siglip2MultiheadAttentionPoolingHead",),
}


class _ConfigView:
    """A layer's config, as its forward sees it: all is the config's own, but the name of the implementation."""

    def __init__(self, module: FusedAttentionForward) -> None:
        self.__dict__["_fastvit_module"] = module

    @property
    def _attn_implementation(self) -> str:
        module = self._fastvit_module
        name = module._fastvit_attributes["config"]._attn_implementation
        if name in (*READABLE, TRANSFORMERS_NAME):
            return TRANSFORMERS_NAME
        module._warn_fallback(_unreadable(name))
        return cast(str, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_fastvit_module"]._fastvit_attributes["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_fastvit_module"].__dict__["config"], name, value)

    def __repr__(self) -> str:
        return repr(self.__dict__["_fastvit_module"].__dict__["config"])

    # A copy of it, pickled or not, is a copy of the config.
    def __copy__(self) -> Any:
        return copy.copy(self.__dict__["_fastvit_module"].__dict__["config"])

    def __reduce__(self) -> Any:
        return _itself, (self.__dict__["_fastvit_module"].__dict__["config"],)


def _itself(config: Any) -> Any:
    return config


def _unreadable(name: object) -> str:
    return f"attn_implementation '{name}' has masks that fastvit cannot read"


class FusedAttentionForward(FusedForward):
    """The fused forward of a layer that asks transformers' AttentionInterface for its attention function."""

    fastvit_kind = "attention"
    # The instance's __dict__ by a second name. In torch 2.11 dynamo takes ``module.__dict__["config"]`` for
    # ``module.config``, the property below, and would trace the property inside itself for ever.
    _fastvit_attributes = vars(nn.Module)["__dict__"]

    @property
    def config(self) -> Any:
        """The layer's config, in which the implementation is called "fastvit" while its masks can be read.

        A property stands before the instance's attribute, which stays where it is: nothing is stored, and the swap
        follows ``set_attn_implementation``.
        """
        if "config" not in self.__dict__:
            raise AttributeError("config")
        return _ConfigView(self)

    @config.setter
    def config(self, config: Any) -> None:
        self.__dict__["config"] = config

    @config.deleter
    def config(self) -> None:
        del self.__dict__["config"]

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        if obstacles := own_obstacles(module):
            return obstacles
        if "config" not in module.__dict__:
            return ["it lacks config"]
        obstacles = []
        if (name := module.__dict__["config"]._attn_implementation) not in READABLE:
            obstacles.append(_unreadable(name))
        if (head_dim := cast(int, module.head_dim)) > MAX_HEAD_DIM:
            obstacles.append(f"head_dim {head_dim}: at most {MAX_HEAD_DIM}")
        return obstacles

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, transformers' own attention would run."""
        name = module.__dict__["config"]._attn_implementation
        if name not in (*READABLE, TRANSFORMERS_NAME):
            return [f"{_unreadable(name)}: runs the plain forward"]
        fallbacks = []
        # A probability in one of two attributes; the layers have no child for it.
        dropout = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
        if isinstance(dropout, float) and dropout > 0:
            fallbacks.append(f"attention dropout p={dropout:g} runs the plain forward in training")
        if reader := weight_readers(module):
            fallbacks.append(f"{reader}: runs the plain forward")
        # Of the implementations that can be swapped only the eager one returns weights unasked.
        unasked = ", weights are returned only then" if name in (None, EAGER) else ""
        return [*fallbacks, f"output_attentions runs eager attention{unasked}"]

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        """Return a self-attention of 14×14 patches and a class token."""
        heads = cast(int, getattr(module, "num_attention_heads", None) or module.num_heads)
        head_dim = cast(int, module.head_dim)
        return AttentionSpec(1, heads, 197, 197, head_dim, head_dim, dtype, None, False, device)


class FusedFlatPatchEmbedForward(FusedForward):
    """The fused forward of a convolution ``proj`` whose input is one flattened patch per row.

    Nothing is left to gather: it is a matrix product, and torch's is the fastest (S 2048, D 1280, patch 14 on one core
    of an Intel Xeon with AMX: 31 ms in float32, 4.9 ms in bfloat16; our op 42 and 62 ms, Conv3d 220 and 431 ms). Our op
    runs, on one image per patch, where a backend is asked for, and for the gradient of the patches in full precision,
    in which torch's product errs up to 1.7 × what the tolerance rule allows against Conv3d.
    """

    fastvit_kind = "patch embedding"
    proj: Any

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        return own_obstacles(module)

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the plain forward would run."""
        reason = _why_call(cast(nn.Module, module.proj))
        return [f"{reason}: runs the plain forward"] if reason else []

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> PatchEmbedSpec | None:
        """Return None: the typical call is torch's own matrix product."""
        return None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the tokens of the patches.

        Args:
            hidden_states: [S, C·T·P·P], any floating dtype; it is cast to the weight's.

        Returns:
            [S, D].
        """
        if reason := _why_call(self.proj):
            self._warn_fallback(reason)
            return cast(Tensor, super().forward(hidden_states))
        weight, bias = self.proj.weight, self.proj.bias  # [D, C, T, P, P]
        patches = hidden_states.to(dtype=weight.dtype).reshape(-1, weight[0].numel())
        wide = patches.dtype in (torch.float32, torch.float64)
        if self._fastvit_backend is None and not (wide and patches.requires_grad):
            return F.linear(patches, weight.flatten(1), bias)
        rows, columns = weight.shape[-2:]
        images = patches.reshape(patches.shape[0], -1, rows, columns)  # [S, C·T, P, P]
        return patch_embed(images, weight.flatten(1, 2), bias, backend=self._fastvit_backend).flatten(0, 1)


def _why_call(proj: nn.Module) -> str | None:
    if type(proj) is not nn.Conv3d or has_own_forward(proj):
        return f"proj is a {type(proj).__name__} with a forward of its own"
    if hook := hook_on(proj):
        return f"proj has {hook}, which fires only if proj is called"
    if proj.stride != proj.kernel_size or proj.padding not in ((0, 0, 0), "valid"):
        return f"proj has stride {proj.stride} and padding {proj.padding} with kernel {proj.kernel_size}"
    if proj.dilation != (1, 1, 1) or proj.groups != 1:
        return f"proj has dilation {proj.dilation} and groups {proj.groups}"
    return None


FORWARDS = (
    (FusedAttentionForward, ATTENTIONS),
    (FusedFlatPatchEmbedForward, FLAT_PATCH_EMBEDS),
    (FusedPoolingHeadForward, POOLING_HEADS),
    (FusedMaskedPoolingHeadForward, MASKED_POOLING_HEADS),
)


def called_by_name(module: nn.Module) -> str | None:
    """Return the name by which transformers calls our attention for this layer, of any class; None if it does not."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    # A file of models that asks the interface has an eager function as its default.
    asks = hasattr(sys.modules.get(type(module).__module__), "eager_attention_forward")
    if implementation != TRANSFORMERS_NAME or not asks or not LOOKS_LIKE_ATTENTION.search(type(module).__name__):
        return None
    return f"attn_implementation='{TRANSFORMERS_NAME}'"


def register_loaded() -> None:
    """Register the fused classes of all files of models that are imported by now."""
    register()
    for forward, table in FORWARDS:
        for file, classes in table.items():
            models = sys.modules.get(f"{MODELS}.{file}")
            for name in classes if models is not None else ():
                if f"Fused{name}" not in globals() and hasattr(models, name):
                    _define(forward, getattr(models, name))


def _define(forward: type[FusedForward], original: type[nn.Module]) -> None:
    name = f"Fused{original.__name__}"
    doc = f"{original.__module__}.{original.__name__} after a swap."
    fused = type(name, (forward, original), {"__module__": __name__, "__doc__": doc})
    globals()[name] = fused
    register_swap(original, fused)


def __getattr__(name: str) -> Any:
    # pickle asks for a class by its name, perhaps before the file of its models was imported.
    for _, table in FORWARDS:
        for file, classes in table.items():
            if name.removeprefix("Fused") in classes and name.startswith("Fused"):
                importlib.import_module(f"{MODELS}.{file}")
                register_loaded()
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
