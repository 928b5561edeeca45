"""The public functions, each one torch op with many backends behind it."""

from __future__ import annotations

import importlib

from fastvit.ops.attention import attention, attention_qkvpacked, scaled_dot_product_attention
from fastvit.ops.backends import backend
from fastvit.ops.flops import register_flops
from fastvit.ops.patch_embed import patch_embed
from fastvit.ops.when_imported import when_imported

__all__ = ["attention", "attention_qkvpacked", "backend", "patch_embed", "scaled_dot_product_attention"]


def _register_sharding() -> None:
    importlib.import_module("fastvit.ops.sharding")


when_imported("torch.utils.flop_counter", register_flops)
when_imported("torch.distributed.tensor", _register_sharding)
