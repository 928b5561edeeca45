"""Compile every row of the configuration table ahead of time, without a GPU, and report what each one takes.

    python -m fastvit.kernels.triton.aot --arch sm_90 --processes 2

Registers, stack (spills) and instructions come from the cubin or the AMD assembly, not from a driver. The exit status
is 1 if a row spills, does not fit its family's shared memory, lacks the matrix instruction that was meant, chains a
full float32 product to its accumulator, or moves aligned rows of 16-bit elements one by one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvit.kernels.triton import attention_bwd, attention_fwd, configs, patch_embed

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "attention_forward": attention_fwd.attention_forward_kernel,
    "delta": attention_bwd.delta_kernel,
    "grad_key_value": attention_bwd.grad_key_value_kernel,
    "grad_query": attention_bwd.grad_query_kernel,
    "patch_embed_forward": patch_embed.forward_kernel,
    "patch_embed_backward_weight": patch_embed.backward_weight_kernel,
    "patch_embed_backward_images": patch_embed.backward_images_kernel,
}
# A load or store of one 16-bit element, in PTX and in AMD's assembly.
SINGLE = re.compile(r"\b(?:ld|st)\.global\.[bu]16\b|\b(?:global|buffer)_(?:load|store)_u?short")
INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
FLOAT32_POINTERS = ("lse_ptr", "delta_ptr", "normaliser_ptr", "grad_lse_ptr", "partial_ptr")
ELEMENT_SIZE = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel, a row of the table, and the case it is specialised for.

    The operands of attention are views of a packed projection, whose heads are their head dim apart.
    """

    kernel: str
    family: str
    dtype: str
    config: configs.Config
    case: str
    constants: dict[str, Any]
    unit_strides: tuple[tuple[str, int], ...] = ()  # (argument, position) of strides that are 1
    aligned: bool = True


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; bytes, and registers of 32 bits per thread."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instruction: str
    chained_products: int
    single_accesses: int
    seconds: float


@dataclass
class Outcome:
    """A job, its resources, and every rule that it breaks."""

    job: Job
    resources: Resources | None
    faults: list[str] = field(default_factory=list)


def _attention_job(
    kernel: str, family: str, dtype: str, head_dim: int, *, bias: str = "none", is_causal: bool = False,
    head_dim_v: int | None = None, precision: str = "ieee", aligned: bool = True,
) -> Job:  # fmt: skip
    head_dim_v = head_dim_v or head_dim
    block_d, block_dv = configs.padded(head_dim), configs.padded(head_dim_v)
    width = max(block_d, block_dv)
    config = configs.attention_config(kernel, ELEMENT_SIZE[dtype], width, bias != "none", family)
    inner = config.block_m if kernel == "grad_key_value" else config.block_n
    constants = {
        "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_TAIL": inner if is_causal else 16,
        "SLICE": configs.FLOAT32_SLICE if dtype == "fp32" and precision == "ieee" else 0,
        "DELTA": "probabilities" if dtype == "fp32" else "output",
        "BIAS": bias, "IS_CAUSAL": is_causal, "FOLD": bias == "none" and dtype != "fp32", "PRECISION": precision,
        "ALIGNED": aligned,
    }  # fmt: skip
    case = f"D{head_dim}" + (f"/{head_dim_v}" if head_dim_v != head_dim else "")
    case += ("" if bias == "none" else f" {bias} bias") + (" causal" if is_causal else "")
    case += ("" if precision == "ieee" else f" {precision}") + ("" if aligned else " unaligned")
    unit = (("bias_strides", 3),) if bias != "none" else ()
    return Job(kernel, family, dtype, config, case, constants, unit, aligned)


def _attention_jobs(family: str) -> Iterator[Job]:
    kernels = ("attention_forward", "grad_key_value", "grad_query")
    for kernel in kernels:
        for dtype in ("bf16", "fp32"):
            for bucket in configs.BUCKETS:
                # The bias is not always the heavier case: without it a product may be scheduled to spill.
                yield _attention_job(kernel, family, dtype, bucket)
                yield _attention_job(kernel, family, dtype, bucket, bias="float32")
        yield _attention_job(kernel, family, "fp16", 72, is_causal=True)
        yield _attention_job(kernel, family, "bf16", 88)
        yield _attention_job(kernel, family, "bf16", 32, bias="bool", is_causal=True)
        yield _attention_job(kernel, family, "bf16", 64, head_dim_v=40, aligned=False)
        if not family.startswith("gfx"):
            yield _attention_job(kernel, family, "fp32", 64, precision="tf32")
    sizes = {"HEAD_DIM_V": 64, "BLOCK_DV": 64, "BLOCK_M": configs.ROW_SUM_ELEMENTS // 64}
    for dtype, delta in (("bf16", "output"), ("fp32", "probabilities")):
        constants = {**sizes, "HAS_GRAD_LSE": True, "DELTA": delta, "ALIGNED": True}
        yield Job("delta", family, dtype, configs.Config(64, 16, 4, 1), "D64", constants)


def _patch_embed_jobs(family: str) -> Iterator[Job]:
    for kernel in ("patch_embed_forward", "patch_embed_backward_weight", "patch_embed_backward_images"):
        cases = [("bf16", 16, 16, True), ("bf16", 14, 14, False), ("fp32", 16, 16, False), ("fp32", 14, 14, True)]
        if kernel != "patch_embed_backward_images":
            cases += [("bf16", 7, 4, False), ("bf16", 16, 8, True), ("fp32", 7, 4, True)]
        for dtype, patch, stride, channels_last in cases:
            embed_dim, elements = 768, 3 * patch * patch
            pixel = 3 if channels_last else 1  # elements of a run per pixel
            aligned = pixel * patch % 16 == 0 and pixel * stride % 16 == 0
            config = configs.patch_embed_config(kernel, ELEMENT_SIZE[dtype], aligned, family)
            config = config.fitted(n=embed_dim, k=elements)
            constants = {
                "EMBED_DIM": embed_dim, "OUTER": 3 // pixel, "ROWS": patch, "RUN": pixel * patch, "DOWN": stride,
                "ALONG": pixel * stride, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k, "HAS_BIAS": True, "PRECISION": "ieee",
            }  # fmt: skip
            case = f"P{patch}" + (f"/{stride}" if stride != patch else "")
            case += " channels_last" if channels_last else " NCHW"
            yield Job(kernel, family, dtype, config, case, constants, (("image_strides", 3),), aligned)


def jobs(families: Sequence[str] = configs.FAMILIES) -> list[Job]:
    """Return the compilations that cover every row of the table, once per architecture family."""
    return [job for family in families for part in (_attention_jobs, _patch_embed_jobs) for job in part(family)]


def _strides(job: Job, name: str) -> int:
    if name == "bias_strides" or name == "image_strides":
        return 4
    return 2 if job.kernel.startswith("patch_embed") else 3


def _is_divisible(job: Job, name: str, position: int) -> bool:
    """Say whether the launch of a job finds a stride to be a multiple of 16, and tells the compiler."""
    head_dims = [job.constants[key] for key in ("HEAD_DIM", "HEAD_DIM_V") if key in job.constants]
    between_heads = position == 1 and name != "bias_strides"
    return job.aligned and not (between_heads and any(head_dim % 16 for head_dim in head_dims))


def _source(job: Job) -> ASTSource:
    """Describe the kernel's arguments as a launch with this job's tensors would."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    divisible = [["tt.divisibility", 16]]
    kernel = KERNELS[job.kernel]
    for index, name in enumerate(kernel.arg_names):
        if name in job.constants or (name == "bias_ptr" and job.constants.get("BIAS") == "none"):
            signature[name], constants[index,] = "constexpr", job.constants.get(name)
        elif name.endswith("_ptr"):
            bias = {"bool": "u8", "float32": "fp32"}.get(job.constants.get("BIAS", ""), job.dtype)
            signature[name] = "*" + ("fp32" if name in FLOAT32_POINTERS else bias if name == "bias_ptr" else job.dtype)
            attributes[index,] = divisible
        elif name.endswith("_strides"):
            units = [(name, position) in job.unit_strides for position in range(_strides(job, name))]
            signature[name] = tuple("constexpr" if unit else "i32" for unit in units)
            constants |= {(index, position): 1 for position, unit in enumerate(units) if unit}
            attributes |= {
                (index, position): divisible
                for position, unit in enumerate(units)
                if not unit and _is_divisible(job, name, position)
            }
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    return ASTSource(kernel, signature, constants, attributes)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}:\n{text[:500]}")
    return int(found[1])


def _measure(compiled: Any, family: str) -> tuple[int, int, str, int]:
    """Return registers, spilled bytes, the matrix instruction and the accesses to one element of a compiled kernel."""
    text = compiled.asm["amdgcn" if family.startswith("gfx") else "ptx"]
    single = len(SINGLE.findall(text))
    instruction = next((name for name in INSTRUCTIONS if name in text), "none")
    if family.startswith("gfx"):
        count = {key: _number(rf"\.{key}:\s*(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")}
        scratch = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return count["vgpr_count"], 4 * count["vgpr_spill_count"] + scratch, instruction, single
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (_number(rf"{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, instruction, single


def _faults(job: Job, resources: Resources) -> list[str]:
    faults = []
    if resources.spill_bytes:
        faults.append(f"spills {resources.spill_bytes} bytes")
    if resources.shared_bytes > configs.SHARED_MEMORY[job.family]:
        faults.append(f"shared memory {resources.shared_bytes} > {configs.SHARED_MEMORY[job.family]}")
    if resources.chained_products and job.dtype == "fp32" and job.constants.get("PRECISION") == "ieee":
        faults.append(f"{resources.chained_products} products are chained to their accumulators")
    if resources.single_accesses and job.constants.get("ALIGNED") and ELEMENT_SIZE[job.dtype] == 2:
        faults.append(f"{resources.single_accesses} loads and stores of one element")
    if resources.instruction not in meant_instructions(job):
        faults.append(f"instruction {resources.instruction}, meant {' or '.join(meant_instructions(job))}")
    return faults


def meant_instructions(job: Job) -> tuple[str, ...]:
    """Return the matrix instructions that a job may use; wgmma and tcgen05 need a tile of at least 64 rows."""
    tile = job.config.block_n if job.kernel == "grad_key_value" else job.config.block_m
    if job.kernel == "patch_embed_backward_weight":
        tile = job.config.block_n
    if job.kernel == "delta":
        return ("none",)
    if job.family == "gfx942":
        return ("v_mfma",)
    if job.dtype == "fp32" and job.constants["PRECISION"] == "ieee":
        return ("none",)
    if job.dtype == "fp32" or job.family == "sm_80" or tile < 64:
        return INSTRUCTIONS if job.dtype == "fp32" else ("mma.sync",)
    return ("wgmma.mma_async",) if job.family == "sm_90" else ("tcgen05.mma", "mma.sync")


def compile_job(job: Job) -> Outcome:
    """Compile one job for its family's target and judge it."""
    begin = time.perf_counter()
    options = {"num_warps": job.config.num_warps, "num_stages": job.config.num_stages}
    try:
        compiled = triton.compile(_source(job), target=TARGETS[job.family], options=options)
    except Exception as error:  # Every failure to compile is an outcome of the table, whatever its type.
        return Outcome(job, None, [f"{type(error).__name__}: {error}"[:300]])
    registers, spill_bytes, instruction, single = _measure(compiled, job.family)
    # A product summed by itself carries a limit on inexact accumulation; see ``products.add_product``.
    products = [line for line in compiled.asm["ttir"].splitlines() if "tt.dot " in line]
    chained = sum("maxNumImpreciseAcc" not in line for line in products)
    seconds = time.perf_counter() - begin
    shared_bytes = compiled.metadata.shared
    resources = Resources(registers, spill_bytes, shared_bytes, instruction, chained, single, seconds)
    return Outcome(job, resources, _faults(job, resources))


def compile_all(families: Sequence[str] = configs.FAMILIES, processes: int = 2) -> list[Outcome]:
    """Compile every job of these families in a pool of processes."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_job, jobs(families), chunksize=4))


def report(outcomes: Sequence[Outcome]) -> str:
    """Return the resources as a table, one line a job."""
    lines = [f"{'family':7} {'kernel':27} {'dtype':5} {'case':26} {'m':>3} {'n':>3} {'k':>3} {'warps':>5} "
             f"{'stages':>6} {'regs':>4} {'spill':>5} {'shared':>6} {'instruction':15} {'s':>4}"]  # fmt: skip
    for outcome in outcomes:
        job, config, resources = outcome.job, outcome.job.config, outcome.resources
        line = f"{job.family:7} {job.kernel:27} {job.dtype:5} {job.case:26} {config.block_m:3} {config.block_n:3} "
        line += f"{config.block_k:3} {config.num_warps:5} {config.num_stages:6} "
        if resources:
            line += f"{resources.registers:4} {resources.spill_bytes:5} {resources.shared_bytes:6} "
            line += f"{resources.instruction:15} {resources.seconds:4.1f}"
        lines.append(line + "".join(f"  FAULT {fault}" for fault in outcome.faults))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return 1 if any row has a fault."""
    parser = argparse.ArgumentParser(prog="python -m fastvit.kernels.triton.aot", description=__doc__)
    parser.add_argument("--arch", action="append", choices=configs.FAMILIES, help="family; all of them if not given")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    begin = time.perf_counter()
    outcomes = compile_all(options.arch or configs.FAMILIES, options.processes)
    faulty = [outcome for outcome in outcomes if outcome.faults]
    print(report(outcomes))
    print(f"{len(outcomes)} kernels, {len(faulty)} with a fault, {time.perf_counter() - begin:.0f} s")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
