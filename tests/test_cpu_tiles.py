"""The AMX form of the CPU kernels: edges of its blocks, its tile state, and what happens where it is refused."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.kernels import native
from fastvit.testing import AttentionCase, PatchEmbedCase, check_attention, check_patch_embed


def _why_no_tiles() -> str:
    """Return why the kernels of this process do not use AMX; empty if they do."""
    if error := native.load_error():
        return error
    module = import_module("fastvit._C")
    if reason := module.cpu_capability_why_not("amx"):
        return f"AMX: {reason}"
    forced = module.cpu_capability()
    return "" if forced == "amx" else f"FASTVIT_CPU_CAPABILITY forces {forced}"


WHY_NOT = _why_no_tiles()
needs_tiles = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


# One token, tiles and panels that are not full, both ways to split the work (at 256 tokens), W in several parts, K that
# ends within a step, within a pair, and on either side of a pass of 256 and of what is kept of an operand (18 steps).
@needs_tiles
@pytest.mark.parametrize(
    ("batch", "grid", "patch", "dim"),
    [
        (1, (1, 1), (16, 16), 64),
        (1, (1, 17), (4, 4), 1),
        (2, (3, 11), (14, 14), 33),
        (1, (16, 16), (8, 8), 48),
        (1, (1, 257), (7, 5), 31),
        (3, (10, 11), (32, 32), 260),
        (2, (13, 13), (16, 16), 900),
        (2, (5, 29), (9, 9), 150),
        (2, (5, 29), (8, 11), 97),
        (2, (3, 7), (14, 14), 70),
        (1, (15, 20), (8, 24), 48),
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_patch_embed_at_the_edges_of_tiles(
    hold: Callable,
    batch: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    dim: int,
    layout: str,
    dtype: torch.dtype,
) -> None:
    case = PatchEmbedCase(batch, 3, grid, patch, dim, dtype, layout=layout)
    hold("patch_embed, AMX, edges", check_patch_embed(case, "cpu"), case)


@needs_tiles
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("patch", "stride", "padding"),
    [
        ((7, 7), (4, 4), (3, 3)),
        ((16, 16), (8, 5), (0, 0)),
        ((8, 8), (9, 11), (0, 3)),
        ((4, 4), (1, 2), (1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_patch_embed_with_strides(
    hold: Callable, patch: tuple, stride: tuple, padding: tuple, layout: str, dtype: torch.dtype
) -> None:
    for grid in ((17, 19), (3, 5)):
        case = PatchEmbedCase(2, 3, grid, patch, 97, dtype, layout=layout, stride=stride, padding=padding)
        hold("patch_embed, AMX, strides", check_patch_embed(case, "cpu"), case)


@needs_tiles
@pytest.mark.parametrize("dim", [150, 1100])
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (32, 32)])
def test_float_patch_embed_in_every_form(hold: Callable, patch: tuple, dim: int) -> None:
    # Few tokens and many, weights that are held whole, in parts, and not at all.
    for batch in (1, 5):
        case = PatchEmbedCase(batch, 3, (9, 10), patch, dim, torch.float32)
        hold("patch_embed, AMX, float forms", check_patch_embed(case, "cpu"), case)


@needs_tiles
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 2.0**31, 1e-40])
def test_floats_that_do_not_split_are_multiplied_as_they_are(value: float) -> None:
    images, weight = torch.randn(6, 3, 56, 56), torch.randn(300, 3, 8, 8)
    grad = torch.randn(6, 49, 300)
    for which in range(3):
        tensors = [images.clone(), weight.clone(), grad.clone()]
        tensors[which].view(-1)[tensors[which].numel() // 2] = value
        pixels, kernel = (tensor.requires_grad_() for tensor in tensors[:2])
        tokens = fastvit.patch_embed(pixels, kernel, backend="cpu")
        expected = torch.nn.functional.conv2d(pixels.double(), kernel.double(), stride=8).flatten(2).transpose(1, 2)
        results = tokens, *torch.autograd.grad(tokens, (pixels, kernel), tensors[2])
        truth = expected, *torch.autograd.grad(expected, (pixels, kernel), tensors[2].double())
        for result, exact in zip(results, truth, strict=True):
            rounded = exact.detach().float()
            finite = rounded.isfinite() & result.isfinite()
            assert torch.equal(rounded.isnan() & ~finite, result.isnan() & ~finite) or abs(value) >= 3e38
            error = (result - rounded)[finite].abs().max()
            assert error <= 1e-5 * max(1.0, rounded[finite].abs().max().item())


@needs_tiles
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-9, 1e9, 1e15])
def test_scales_of_floats(scale: float) -> None:
    images, weight = torch.randn(2, 3, 64, 48), torch.randn(70, 3, 16, 16)
    exact = torch.nn.functional.conv2d(images.double(), weight.double(), stride=16).flatten(2).transpose(1, 2)
    for scaled in ((images * scale, weight), (images, weight * scale)):
        error = (fastvit.patch_embed(*scaled).double() / scale - exact).abs().max()
        assert error <= 1e-5 * exact.abs().max()


@needs_tiles
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 33, 512, 513, 1025])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_at_the_edges_of_blocks(hold: Callable, seqlen: int, is_causal: bool) -> None:
    heads = 12 if seqlen < 20 else 2
    for head_dim in (64, 31) if seqlen > 20 else (1, 31, 80, 256):
        case = AttentionCase(
            4, heads, seqlen, seqlen, head_dim, head_dim, torch.bfloat16, is_causal=is_causal, sharpness=3.0
        )
        hold("attention, AMX, edges", check_attention(case, "cpu", backward=False), case)


@needs_tiles
@pytest.mark.parametrize("bias", ["bool", "additive", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 0, 1), (2, 3, 0, 1), (1, 1, 1, 0)], ids=str)
def test_attention_with_a_bias(hold: Callable, bias: str, shape: tuple[int, int, int, int]) -> None:
    # 0 stands for a size that the case has; more keys than one block takes.
    for seqlen_q, seqlen_k in ((50, 61), (33, 700)):
        full = (2, 3, seqlen_q, seqlen_k)
        broadcast = (*shape[:2], seqlen_q if shape[2] == 0 else 1, seqlen_k)
        assert all(size in (1, whole) for size, whole in zip(broadcast, full, strict=True))
        case = AttentionCase(
            2, 3, seqlen_q, seqlen_k, 32, 40, torch.bfloat16, bias=bias, bias_shape=broadcast, scale=0.3, layout="bnhd"
        )
        hold("attention, AMX, bias", check_attention(case, "cpu", backward=False), case)


@needs_tiles
def test_a_fully_masked_row_is_zero_and_nan_reaches_its_row_only() -> None:
    query, key, value = (torch.randn(1, 2, 40, 32, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[7] = False
    output = fastvit.scaled_dot_product_attention(query, key, value, mask)
    assert (output[:, :, 7] == 0).all()
    assert output.isfinite().all()
    query[0, 1, 33, 5] = torch.nan
    rows = fastvit.attention(query, key, value).isnan().any(-1)
    assert rows.sum() == 1
    assert rows[0, 1, 33]


@needs_tiles
def test_repeated_runs_and_thread_counts_give_the_same_bits() -> None:
    packed = torch.randn(3, 197, 3, 5, 64, dtype=torch.bfloat16)
    weight = torch.randn(200, 3, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    stems = [torch.randn(n, 3, 112, 128, dtype=torch.bfloat16, requires_grad=True) for n in (1, 9)]
    # One more, whose third image does not split.
    floats = torch.randn(9, 3, 112, 128)
    floats[2, 1, 50, 60] = 1e12
    stems += [floats.requires_grad_()]

    def run() -> list[Tensor]:
        results = list(fastvit.attention_qkvpacked(packed, return_lse=True))
        for images in stems:
            tokens = fastvit.patch_embed(images, weight.to(images.dtype))
            results += [tokens.detach(), *torch.autograd.grad(tokens.float().square().sum(), (images, weight))]
        return results

    threads = torch.get_num_threads()
    first = run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_tiles
def test_tiles_are_shared_with_torch_on_every_thread() -> None:
    # torch's own products configure the tiles for themselves, on the very same threads.
    left, right = torch.randn(70, 96, dtype=torch.bfloat16), torch.randn(96, 80, dtype=torch.bfloat16)
    packed = torch.randn(2, 50, 3, 4, 32, dtype=torch.bfloat16)
    expected = left @ right, fastvit.attention_qkvpacked(packed)
    failures: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            results = left @ right, fastvit.attention_qkvpacked(packed)
            if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
                failures.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


@needs_tiles
def test_no_tile_state_is_left_behind(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "state.cpp").write_text(
        "#include <immintrin.h>\n"
        # XINUSE of XTILECFG and XTILEDATA: xgetbv of register 1.
        'extern "C" unsigned in_use() { unsigned a, d; asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(1));'
        " return a >> 17 & 3; }\n"
        'extern "C" void configure() { alignas(64) unsigned char c[64] = {1}; c[16] = 64; c[48] = 16;'
        ' asm volatile("" ::"m"(c)); _tile_loadconfig(c); _tile_zero(0); }\n'
        'extern "C" void release() { _tile_release(); }\n'
    )
    library = tmp_path / "state.so"
    command = [compiler, "-shared", "-fPIC", "-mamx-tile", tmp_path / "state.cpp", "-o", library]
    subprocess.run(command, check=True)
    state = ctypes.CDLL(str(library))
    state.configure()
    assert state.in_use() != 0
    state.release()
    assert state.in_use() == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            packed = torch.randn(1, 90, 3, 2, 64, dtype=dtype, requires_grad=True)
            fastvit.attention_qkvpacked(packed).sum().backward()
            assert packed.grad is not None
            assert state.in_use() == 0
        weight = torch.randn(8, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
        fastvit.patch_embed(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16), weight).sum().backward()
        assert weight.grad is not None
        assert state.in_use() == 0
    finally:
        torch.set_num_threads(threads)


@needs_tiles
def test_where_the_kernel_refuses_the_next_best_runs_and_says_why() -> None:
    # Linux refuses the tile registers to a process with a signal stack that could not hold them.
    code = (
        "import ctypes\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('pointer', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "memory = ctypes.create_string_buffer(8192)\n"
        "stack = Stack(ctypes.addressof(memory), 0, 8192)\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "import torch, fastvit, fastvit._C as C\n"
        "fastvit.attention_qkvpacked(torch.ones(1, 5, 3, 2, 8, dtype=torch.bfloat16))\n"
        "from fastvit.commands import env\n"
        "print(C.cpu_capability(), env._built()['instruction sets built'], sep='|')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    chosen, _, sets = result.stdout.partition("|")
    assert chosen == "avx512_bf16", result.stderr
    assert sets.startswith("amx (the kernel refuses the tile registers), avx512_bf16 (runs here)")
    environment = {**os.environ, "FASTVIT_CPU_CAPABILITY": "amx"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "accepts avx512_bf16, avx512, avx2, baseline; amx: the kernel refuses the tile registers" in result.stderr
