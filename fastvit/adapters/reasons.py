"""Why the attentions and patch embeddings that are known and not swapped are left alone, by class name.

Names only: nothing here imports a library. A class that is not in the table is reported as one without a fused version.
"""

from __future__ import annotations

import dis
import inspect
import re

from torch import nn

# What a person would call an attention layer, and that or a patch embedding, by its class name.
LOOKS_LIKE_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
LOOKS_LIKE_ONE = re.compile(f"{LOOKS_LIKE_ATTENTION.pattern}|patch_?embed|hybrid_?embed", re.IGNORECASE)

# What a layer of any name calls to attend.
ATTENTION_FUNCTIONS = frozenset({"scaled_dot_product_attention", "flex_attention", "memory_efficient_attention"})

WINDOWED = "attention in windows with a relative position bias and a mask: left alone until the op carries windows"
WINDOWS_AND_GRIDS = "attention in windows and grids with a relative position bias: left alone until the op carries both"
WINDOWS_ONLY = "attention in windows or blocks of tokens: left alone until the op carries windows"
COSINE = "cosine attention in windows, with a learned temperature: left alone until the op carries both"
POOLED = "pooled query, key and value with a decomposed relative position bias: left alone until the op carries it"
SHORTENED = "key and value are shortened by a convolution or pooled first: left alone until an adapter does the same"
RELATIVE = "a learned relative position bias: left alone until the op carries its gradient"
DECOMPOSED = "a decomposed relative position bias: left alone until the op carries it"
MIXED_HEADS = "talking heads: the attention matrix is mixed across heads before and after softmax"
CHANNELS = "attention across channels, not tokens: another computation than the op's"
LINEAR = "linear attention without a softmax over tokens: another computation than the op's"
GATED = "gates features and attends to nothing: another computation than the op's"
LOCAL = "attention in overlapping neighbourhoods: another computation than the op's"
FEATURE_MAP = "attention over a feature map [B, C, H, W] with projections of its own: it has no adapter yet"
TWO_MAPS = (
    "differential attention, the difference of two attentions with values of twice the width: it has no adapter yet"
)
CROSS = "one class token looks at all tokens, through projections of its own: it has no adapter yet"
OVERLAPPING = "an overlapping {} in a class of its own: it has no adapter yet"
STACKED = "overlapping {}, one on the other: the op is one convolution from pixels to tokens"
IN_ANOTHER = "a patch embedding of non-overlapping patches in a class of its own: it has no adapter yet"
PRE_PATCHED = "a Linear on patches that were cut out beforehand: no convolution to replace"

_TIMM = {
    "layers.attention2d.Attention2d": FEATURE_MAP,
    "layers.attention2d.MultiQueryAttention2d": FEATURE_MAP,
    "layers.attention2d.MultiQueryAttentionV2": FEATURE_MAP,
    "layers.attention_pool.AttentionPoolPrr": "self-attention without projections: it has no adapter yet",
    "layers.attention_pool2d.AttentionPool2d": FEATURE_MAP,
    "layers.attention_pool2d.RotAttentionPool2d": FEATURE_MAP,
    "layers.bottleneck_attn.BottleneckAttn": DECOMPOSED,
    "layers.cbam.ChannelAttn": GATED,
    "layers.cbam.LightChannelAttn": GATED,
    "layers.cbam.LightSpatialAttn": GATED,
    "layers.cbam.SpatialAttn": GATED,
    "layers.coord_attn.CoordAttn": GATED,
    "layers.coord_attn.EfficientLocalAttn": GATED,
    "layers.coord_attn.SimpleCoordAttn": GATED,
    "layers.coord_attn.StripAttn": GATED,
    "layers.diff_attention.DiffAttention": TWO_MAPS,
    "layers.halo_attn.HaloAttn": LOCAL,
    "layers.lambda_layer.LambdaLayer": LINEAR,
    "layers.non_local_attn.BatNonLocalAttn": GATED,
    "layers.non_local_attn.BilinearAttnTransform": GATED,
    "layers.non_local_attn.NonLocalAttn": FEATURE_MAP,
    "layers.other_pool.SimPool1d": "a mean query looks at all tokens: it has no adapter yet",
    "layers.other_pool.SimPool2d": FEATURE_MAP,
    "layers.selective_kernel.SelectiveKernelAttn": GATED,
    "layers.split_attn.SplitAttn": GATED,
    "models.cait.TalkingHeadAttn": MIXED_HEADS,
    "models.coat.FactorAttnConvRelPosEnc": LINEAR,
    "models.convit.GPSA": "two softmaxes mixed by a learned gate: another computation than the op's",
    "models.cpubone.ConvAttention": FEATURE_MAP,
    "models.crossvit.CrossAttention": CROSS,
    "models.csatv2.SpatialAttention": GATED,
    "models.davit.ChannelAttention": CHANNELS,
    "models.davit.ChannelAttentionV2": CHANNELS,
    "models.davit.WindowAttention": WINDOWS_ONLY,
    "models.edgenext.CrossCovarianceAttn": CHANNELS,
    "models.efficientformer.Attention": RELATIVE,
    "models.efficientformer_v2.Attention2d": MIXED_HEADS,
    "models.efficientformer_v2.Attention2dDownsample": RELATIVE,
    "models.efficientvit_msra.CascadedGroupAttention": RELATIVE,
    "models.efficientvit_msra.PatchEmbedding": STACKED.format("3×3/2 convolutions"),
    "models.fastvit.Attention": FEATURE_MAP,
    "models.fastvit.PatchEmbed": STACKED.format("convolutions"),
    "models.fasternet.PatchEmbed": IN_ANOTHER,
    "models.gcvit.WindowAttentionGlobal": WINDOWED,
    "models.gemma4_vit.Gemma4Attention": "rotary attention with normalised values: it has no adapter yet",
    "models.gemma4_vit.Gemma4PatchEmbed": PRE_PATCHED,
    "models.hiera.MaskUnitAttention": WINDOWS_ONLY,
    "models.hiera.PatchEmbed": OVERLAPPING.format("7×7/4 convolution"),
    "models.hieradet_sam2.MultiScaleAttention": "windows of a feature map with a pooled query: it has no adapter yet",
    "models.iformer.SHMA": FEATURE_MAP,
    "models.levit.Attention": RELATIVE,
    "models.levit.AttentionDownsample": RELATIVE,
    "models.lowformer.ConvAttention": FEATURE_MAP,
    "models.maxxvit.Attention2d": FEATURE_MAP,
    "models.maxxvit.AttentionCl": WINDOWED,
    "models.mobilevit.LinearSelfAttention": LINEAR,
    "models.mvitv2.MultiScaleAttention": POOLED,
    "models.mvitv2.MultiScaleAttentionPoolFirst": POOLED,
    "models.naflexvit.NaFlexEmbeds": PRE_PATCHED,
    "models.nest.Attention": WINDOWS_ONLY,
    "models.nextvit.ConvAttention": GATED,
    "models.nextvit.EfficientAttention": SHORTENED,
    "models.nextvit.PatchEmbed": "a stage's pooling and 1×1 convolution, not an embedding of patches of pixels",
    "models.pvt_v2.Attention": SHORTENED,
    "models.pvt_v2.OverlapPatchEmbed": OVERLAPPING.format("convolution with a norm"),
    "models.shvit.SHSA": FEATURE_MAP,
    "models.swiftformer.EfficientAdditiveAttention": LINEAR,
    "models.swin_transformer.WindowAttention": WINDOWED,
    "models.swin_transformer_v2.WindowAttention": COSINE,
    "models.swin_transformer_v2_cr.PatchEmbed": IN_ANOTHER,
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": COSINE,
    "models.tiny_vit.Attention": RELATIVE,
    "models.tiny_vit.PatchEmbed": STACKED.format("3×3/2 convolutions"),
    "models.tnt.Attention": "query and key in one projection, value in another: it has no adapter yet",
    "models.twins.GlobalSubSampleAttn": SHORTENED,
    "models.twins.LocallyGroupedAttn": WINDOWS_ONLY,
    "models.twins.PatchEmbed": IN_ANOTHER,
    "models.crossvit.PatchEmbed": IN_ANOTHER,
    "models.vision_transformer.DiffParallelScalingBlock": TWO_MAPS,
    "models.vision_transformer.ParallelScalingBlock": "attention and MLP share one projection: it has no adapter yet",
    "models.vision_transformer_relpos.RelPosAttention": RELATIVE,
    "models.vision_transformer_sam.Attention": DECOMPOSED,
    "models.visformer.Attention": FEATURE_MAP,
    "models.volo.Attention": FEATURE_MAP,
    "models.volo.ClassAttention": CROSS,
    "models.volo.OutlookAttention": LOCAL,
    "models.volo.PatchEmbed": STACKED.format("convolutions"),
    "models.xcit.ConvPatchEmbed": STACKED.format("3×3/2 convolutions"),
    "models.xcit.XCA": CHANNELS,
}
_TORCHVISION = {
    "models.maxvit.RelativePositionalMultiHeadAttention": WINDOWS_AND_GRIDS,
    "models.swin_transformer.ShiftedWindowAttention": WINDOWED,
    "models.swin_transformer.ShiftedWindowAttentionV2": COSINE,
}
_TRANSFORMERS = {
    "aimv2.modeling_aimv2.Aimv2AttentionPoolingHead": CROSS,
    "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTPatchEmbeddings": (
        OVERLAPPING.format("convolution of a spectrogram")
    ),
    "swin.modeling_swin.SwinAttention": WINDOWED,
    "swinv2.modeling_swinv2.Swinv2SelfAttention": COSINE,
}
REASONS = {
    **{f"timm.{name}": reason for name, reason in _TIMM.items()},
    **{f"torchvision.{name}": reason for name, reason in _TORCHVISION.items()},
    **{f"transformers.models.{name}": reason for name, reason in _TRANSFORMERS.items()},
}


def why_not_fused(module: nn.Module) -> str | None:
    """Return why the class of this module has no fused version, None if the table does not know it."""
    kind = type(module)
    reason = REASONS.get(f"{kind.__module__}.{kind.__qualname__}")
    has_convolution = any(isinstance(child, nn.Conv2d) for child in module.children())
    return None if reason == PRE_PATCHED and has_convolution else reason


def attends_by(kind: type[nn.Module]) -> str | None:
    """Return the function by which this class's own forward attends, whatever the class is called; None if by none."""
    forward = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    if code is None or "fastvit" in code.co_names or not ATTENTION_FUNCTIONS.intersection(code.co_names):
        return None
    for step in dis.get_instructions(code):
        if step.argval in ATTENTION_FUNCTIONS:
            named = forward.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
            # Imported by name it may be fastvit's own.
            if not str(getattr(named, "__module__", "")).startswith("fastvit."):
                return str(step.argval)
    return None
