"""Tile sizes as data: one row per (kernel, element size, head_dim bucket, bias), by architecture family, with reasons.

Nothing here needs Triton. No row is chosen by timing at a user's first call, and every row is compiled ahead of time by
``aot.py`` at its bucket's width: a row that spills a register, or that does not fit a family's shared memory, fails the
tests. (Padded head dims take masks besides: at 72, 88 and 192 float32 was seen to spill 8 to 168 bytes, 16 bits 8 at
the most.) The rows hold for the oldest Triton that is supported (3.6) and the newest (3.8), whose register allocation
differs.
Families: sm_80 is every NVIDIA chip with mma.sync (8.x and 12.x; the rows fit the 99 KiB of sm_86), sm_90 has wgmma,
sm_100 tcgen05 and tensor memory, gfx942 is AMD CDNA3 with MFMA and 64 KiB of local memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
BUCKETS = (64, 128, 256)  # of the larger padded head dim; smaller head dims share the row of 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_GRID = 2**31 - 1
SMALLEST_BLOCK = 16  # the least that the matrix instructions take in every dimension
SMALLEST_SCALE = 1e-30  # below it, the product with log2 e could round to 0, and 0 · inf is NaN
ROW_SUM_ELEMENTS = 4096  # 32 elements a thread: enough loads in flight for a kernel that only reads
FLOAT32_SLICE = 32  # of a head dim: a line of 128 bytes, and sums short enough for the tolerance rule
SPLIT_PROGRAMS = 264  # two waves of 132 multiprocessors; a constant, so that the order of sums is that of the shape
SHORT_SPLIT_BLOCKS = 4  # fewer token blocks than this in a span, and the partial sums cost more than they save


@dataclass(frozen=True)
class Config:
    """One launch configuration: blocks of queries or tokens (m), keys or outputs (n), elements of a patch (k).

    Attention has no ``block_k``; its slices of the head dim are ``head_dim_slice``.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 0

    def fitted(self, *, n: int, k: int) -> Config:
        """Return the same with blocks no larger than what ``n`` outputs and ``k`` elements of a patch need."""
        return replace(self, block_n=min(self.block_n, padded(n)), block_k=min(self.block_k, padded(k)))


Row = dict[str, Config]


def _row(default: Config, **families: Config) -> Row:
    return {family: families.get(family, default) for family in FAMILIES}


# fmt: off
_ATTENTION: dict[tuple[str, int, int, bool], Row] = {
    # Forward, 16 bits. 128 queries reuse each key twice as often as 64; 64 keys keep 197 = 3 · 64 + 5 cheap.
    ("attention_forward", 2, 64, False): _row(Config(128, 64, 8, 3)),
    # A third stage would hold 32 KiB more of float32 bias.
    ("attention_forward", 2, 64, True): _row(Config(128, 64, 8, 2), gfx942=Config(64, 64, 4, 1)),
    # Two stages of 128-wide K and V are 64 KiB: what sm_86 can hold beside the queries.
    ("attention_forward", 2, 128, False): _row(Config(128, 64, 8, 2), sm_80=Config(128, 32, 8, 3)),
    # The addresses of the bias tile take the registers of half the queries.
    ("attention_forward", 2, 128, True): _row(Config(64, 64, 8, 2), gfx942=Config(64, 32, 4, 1)),
    # The accumulator of 128 × 256 is 128 registers a thread; sm_80 also keeps the queries there.
    ("attention_forward", 2, 256, False): _row(
        Config(64, 32, 8, 2), sm_90=Config(128, 32, 8, 2), sm_100=Config(128, 32, 8, 2),
    ),
    ("attention_forward", 2, 256, True): _row(Config(64, 32, 8, 2), sm_90=Config(128, 16, 8, 2)),
    # Forward, float32. Without matrix instructions a thread holds its rows of P and columns of V whole, and slices of Q
    # and K: 32 keys a step, and fewer queries for wider heads, keep them in registers.
    ("attention_forward", 4, 64, False): _row(Config(64, 32, 8, 1), gfx942=Config(64, 32, 4, 1)),
    ("attention_forward", 4, 64, True): _row(Config(64, 32, 8, 1), gfx942=Config(64, 32, 4, 1)),
    ("attention_forward", 4, 128, False): _row(Config(32, 32, 8, 1), gfx942=Config(32, 16, 8, 1)),
    ("attention_forward", 4, 128, True): _row(Config(32, 32, 8, 1), gfx942=Config(32, 16, 8, 1)),
    ("attention_forward", 4, 256, False): _row(
        Config(32, 16, 16, 1), sm_90=Config(32, 16, 8, 1), gfx942=Config(16, 16, 4, 1),
    ),
    ("attention_forward", 4, 256, True): _row(Config(32, 16, 16, 1), gfx942=Config(16, 16, 4, 1)),
    # dK and dV, 16 bits: two accumulators of block_n rows. Queries come in small blocks, since each brings two tiles.
    ("grad_key_value", 2, 64, False): _row(
        Config(64, 64, 8, 2), sm_80=Config(32, 128, 8, 2), gfx942=Config(32, 64, 4, 1),
    ),
    ("grad_key_value", 2, 64, True): _row(Config(32, 128, 8, 2), gfx942=Config(32, 64, 4, 1)),
    ("grad_key_value", 2, 128, False): _row(
        Config(32, 128, 8, 2), sm_80=Config(64, 64, 8, 1), gfx942=Config(32, 64, 4, 1),
    ),
    ("grad_key_value", 2, 128, True): _row(
        Config(64, 64, 8, 2), sm_90=Config(32, 64, 8, 2), sm_100=Config(64, 64, 8, 1), gfx942=Config(32, 64, 4, 1),
    ),
    # 64 keys by wgmma would spill at this width: 32 keys go by mma.sync.
    ("grad_key_value", 2, 256, False): _row(
        Config(32, 32, 8, 1), sm_80=Config(16, 64, 8, 1), sm_100=Config(32, 64, 8, 1), gfx942=Config(16, 32, 4, 1),
    ),
    ("grad_key_value", 2, 256, True): _row(
        Config(16, 32, 8, 1), sm_100=Config(32, 64, 8, 1), gfx942=Config(16, 32, 4, 1),
    ),
    ("grad_key_value", 4, 64, False): _row(Config(16, 64, 8, 1), sm_100=Config(16, 32, 8, 1)),
    ("grad_key_value", 4, 64, True): _row(
        Config(16, 32, 16, 1), sm_90=Config(16, 32, 8, 1), gfx942=Config(16, 32, 8, 1),
    ),
    ("grad_key_value", 4, 128, False): _row(Config(16, 32, 8, 1), gfx942=Config(16, 16, 4, 1)),
    ("grad_key_value", 4, 128, True): _row(Config(16, 32, 8, 1), gfx942=Config(16, 16, 4, 1)),
    ("grad_key_value", 4, 256, False): _row(Config(16, 16, 8, 1), gfx942=Config(16, 16, 4, 1)),
    ("grad_key_value", 4, 256, True): _row(Config(16, 16, 8, 1), gfx942=Config(16, 16, 4, 1)),
    # dQ, 16 bits: one accumulator, and the queries and their gradients stay for the whole loop.
    ("grad_query", 2, 64, False): _row(
        Config(128, 64, 8, 2), sm_80=Config(128, 32, 8, 2), sm_100=Config(128, 32, 8, 2),
    ),
    ("grad_query", 2, 64, True): _row(Config(128, 64, 8, 2), sm_100=Config(128, 32, 8, 2), gfx942=Config(64, 32, 4, 1)),
    ("grad_query", 2, 128, False): _row(
        Config(64, 64, 8, 2), sm_100=Config(128, 32, 8, 2), gfx942=Config(64, 32, 4, 1),
    ),
    ("grad_query", 2, 128, True): _row(Config(64, 64, 8, 2), gfx942=Config(64, 32, 4, 1)),
    # As for dK and dV: wgmma's 64 rows would spill at this width.
    ("grad_query", 2, 256, False): _row(Config(64, 32, 8, 1), sm_90=Config(32, 32, 8, 1), gfx942=Config(32, 16, 4, 1)),
    ("grad_query", 2, 256, True): _row(Config(64, 32, 8, 1), sm_90=Config(32, 32, 8, 1), gfx942=Config(32, 16, 4, 1)),
    # dQ, float32: two products by slices and a pass for Δ. Fewer queries than in 16 bits, or their addresses spill.
    ("grad_query", 4, 64, False): _row(Config(32, 32, 8, 1), gfx942=Config(64, 16, 8, 1)),
    ("grad_query", 4, 64, True): _row(Config(32, 32, 8, 1), gfx942=Config(64, 16, 8, 1)),
    ("grad_query", 4, 128, False): _row(
        Config(32, 32, 8, 1), sm_80=Config(32, 16, 8, 1), gfx942=Config(16, 16, 4, 1),
    ),
    ("grad_query", 4, 128, True): _row(Config(32, 32, 8, 1), gfx942=Config(16, 16, 4, 1)),
    ("grad_query", 4, 256, False): _row(Config(32, 16, 8, 1), gfx942=Config(16, 16, 4, 1)),
    ("grad_query", 4, 256, True): _row(Config(32, 16, 8, 1), gfx942=Config(16, 16, 4, 1)),
}

_PATCH_EMBED: dict[tuple[str, int, bool], Row] = {
    # 128 × 128 outputs a program are the classic tile of a product of this size; 64 of K are one 128-byte line.
    ("patch_embed_forward", 2, True): _row(
        Config(128, 128, 8, 3, 64), sm_80=Config(128, 128, 8, 2, 64), gfx942=Config(128, 128, 8, 2, 32),
    ),
    ("patch_embed_forward", 4, True): _row(Config(64, 64, 8, 2, 16)),
    # Pixels that come one by one take an address each: tiles a quarter of the size keep them in registers.
    ("patch_embed_forward", 2, False): _row(Config(64, 64, 4, 2, 32)),
    ("patch_embed_forward", 4, False): _row(Config(64, 64, 8, 2, 16)),
    # Tokens are the reduction here: block_m of them a step.
    ("patch_embed_backward_weight", 2, True): _row(Config(64, 128, 8, 2, 128), gfx942=Config(32, 128, 8, 2, 128)),
    ("patch_embed_backward_weight", 4, True): _row(Config(16, 64, 8, 2, 64)),
    ("patch_embed_backward_weight", 2, False): _row(Config(32, 64, 8, 2, 64)),
    ("patch_embed_backward_weight", 4, False): _row(Config(16, 64, 8, 2, 64)),
    ("patch_embed_backward_images", 2, True): _row(Config(128, 64, 8, 2, 128), gfx942=Config(128, 32, 8, 2, 128)),
    ("patch_embed_backward_images", 4, True): _row(Config(64, 16, 8, 2, 64)),
    ("patch_embed_backward_images", 2, False): _row(Config(64, 32, 8, 2, 32)),
    ("patch_embed_backward_images", 4, False): _row(Config(64, 16, 8, 2, 64)),
}
# fmt: on


def attention_config(kernel: str, element_size: int, width: int, has_bias: bool, family: str) -> Config:
    """Return the row for the larger padded head dim ``width`` (16 to 256)."""
    bucket = next(bucket for bucket in BUCKETS if width <= bucket)
    return _ATTENTION[kernel, element_size, bucket, has_bias][family]


def patch_embed_config(kernel: str, element_size: int, is_aligned: bool, family: str) -> Config:
    """Return the row for a patch-embedding kernel, before it is fitted to D and K."""
    return _PATCH_EMBED[kernel, element_size, is_aligned][family]


def all_rows() -> list[Row]:
    """Return every row of both tables."""
    return [*_ATTENTION.values(), *_PATCH_EMBED.values()]


def is_valid(config: Config) -> bool:
    """Say whether a row can be launched at all: powers of two, blocks of at least 16, 1 to 16 warps, 1 to 4 stages."""
    blocks = [config.block_m, config.block_n] + ([config.block_k] if config.block_k else [])
    return (
        all(block >= SMALLEST_BLOCK and block & (block - 1) == 0 for block in blocks)
        and config.num_warps in (1, 2, 4, 8, 16)
        and 1 <= config.num_stages <= 4
    )


def padded(size: int) -> int:
    """Return the power of two, at least 16, that a matrix instruction needs to hold ``size``."""
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())


def tail_block(seqlen: int, block: int) -> int:
    """Return the size of the checked last block: the smallest that holds what full blocks leave over."""
    return min(block, padded(seqlen % block)) if seqlen % block else SMALLEST_BLOCK


def tokens_per_split(num_tokens: int, tiles: int, block: int) -> int:
    """Return how many tokens (whole blocks of them) one program sums, so that ``tiles`` times spans fill a GPU."""
    blocks = -(-num_tokens // block)
    splits = max(1, min(SPLIT_PROGRAMS // tiles, blocks // SHORT_SPLIT_BLOCKS))
    return -(-blocks // splits) * block


def grid(batch_heads: int, seqlen: int, block: int) -> tuple[int]:
    """Return the one-dimensional launch grid: x alone may pass 65,535.

    Raises:
        ValueError: more than 2³¹ − 1 programs.
    """
    programs = batch_heads * -(-seqlen // block)
    if programs > MAX_GRID:
        raise ValueError(f"batch · heads · blocks: got {programs} programs; a launch takes at most {MAX_GRID}")
    return (programs,)


@functools.cache
def device_family(device: torch.device) -> str:
    """Return the architecture family whose rows run on ``device``; the interpreter takes those of sm_80."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def dot_precision(tensor: Tensor) -> str:
    """Return how float32 products are formed: in full, unless the user has set torch's matmul precision to tf32."""
    may = tensor.dtype == torch.float32 and tensor.is_cuda and torch.version.hip is None
    # Not allow_tf32, which raises where the user has set fp32_precision; this one follows whatever the user sets.
    return "tf32" if may and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def folds(query: Tensor, bias: Tensor | None, scale: float) -> bool:
    """Return whether scale and log2 e may be folded into one product, behind the maximum and behind −inf.

    Nothing is added between, 16 bits suffice, and scaling keeps the order of the scores and −inf what it is.
    """
    return bias is None and query.element_size() == 2 and scale > SMALLEST_SCALE


def head_dim_slice(query: Tensor) -> int:
    """Return how much of a head dim one sum of Q Kᵀ or dO Vᵀ takes, 0 for all of it; one value for all kernels.

    Backward must sum the scores as forward did: the errors of the two cancel in P = exp(S − LSE), and would not if the
    orders differed.
    """
    return FLOAT32_SLICE if query.element_size() == 4 and dot_precision(query) == "ieee" else 0


def rows_aligned(*tensors: Tensor) -> bool:
    """Return whether all rows of [B, H, N, D] begin at multiples of 8 elements, so that 16 bytes move at once."""
    return not any(stride % 8 for tensor in tensors for stride in tensor.stride()[:3])


def delta_kind(query: Tensor, key: Tensor, is_causal: bool) -> str:
    """Return where Δ, the mean of dP under P, comes from: "output", "probabilities" or "one key".

    It is Σ_d dO_id O_id, one read of the output. In float32 that differs from Σ_j P_ij dP_ij by more than one rounding,
    and the latter is summed. Where a row has one key at most, Δ is that key's dP, to the last bit.
    """
    if key.shape[2] == 1 or (is_causal and query.shape[2] == 1):
        return "one key"
    return "probabilities" if query.element_size() == 4 else "output"


def device_why_not(device: torch.device, dtype: torch.dtype, *, interpreted: bool) -> list[str]:
    """Return the reasons why no kernel of this backend can run on ``device`` in ``dtype``."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype}: float16, bfloat16 or float32")
    if device.type == "cpu":
        if not interpreted:
            reasons.append("device cpu: only under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported)")
    elif device.type != "cuda":
        reasons.append(f"device {device}: an NVIDIA or AMD GPU")
    elif not torch.cuda.is_available():
        reasons.append(f"device {device}: torch finds no GPU")
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        reasons.append(f"device {device}: compute capability {major}.{minor}; at least 8.0")
    return reasons
