"""The program of tests/test_distributed.py: one rank of two; ``torchrun … distributed_program.py CASE`` runs a case."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

import fastvit
from fastvit.models import vit
from fastvit.ops.sharding import PackedColwiseParallel
from fastvit.testing import livened
from tests import test_swap_survives as libraries
from tests.swapping import PACKED, PATCHES, SEPARATE, images, normal, ops_run

HEADS, DEPTH, RANKS = 4, 2, 2
OTHERS = ("torchvision", "transformers", "torch.nn", "open_clip")


def small(kind: str, **options: Any) -> nn.Module:
    if kind in OTHERS:
        return libraries.build(kind).double().train()
    sizes = {"img_size": 32, "patch_size": 8, "depth": DEPTH, "num_heads": HEADS, "embed_dim": 64, "num_classes": 10}
    builder = timm.models.VisionTransformer if kind == "timm" else vit.VisionTransformer
    return livened(builder(**sizes, **options)).double().train()


def ops_of(kind: str) -> set[str]:
    return libraries.MODELS[kind][1] if kind in OTHERS else {PACKED, PATCHES}


def blocks_of(model: nn.Module, kind: str) -> list[nn.Module]:
    path = libraries.MODELS[kind][2] if kind in OTHERS else "blocks.{}"
    before = path.partition("{}")[0]
    return [model.get_submodule(f"{before}{i}") for i in range(DEPTH)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(actual: Any, expected: Any, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def three_steps(model: nn.Module, x: Tensor, after: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Return the logits and gradients of the first step, and the logits after three steps of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seen: dict[str, Tensor] = {}
    for step in range(3):
        optimizer.zero_grad()
        logits = model(x)
        (whole(logits) * normal(*logits.shape, seed=3).double()).square().mean().backward()
        after()
        if step == 0:
            seen["logits"] = whole(logits).detach().clone()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    seen[name.removeprefix("module.")] = whole(parameter.grad).clone()
        optimizer.step()
    with torch.no_grad():
        seen["logits after three steps"] = whole(model(x)).clone()
    return seen


def data_parallel(mesh: DeviceMesh, wrap: Callable[[nn.Module], nn.Module], kind: str) -> None:
    x = images(4, 32).double()
    mine = slice(2 * mesh.get_rank(), 2 * mesh.get_rank() + 2)
    plain, model = small(kind), small(kind)
    counted = fastvit.swap(model, strict=True).counts
    assert counted.keys() == {"fused"}, counted
    assert counted["fused"] >= DEPTH + 1, counted
    model = wrap(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (plain, model)]
    assert ops_run(lambda: model(x[mine])) == ops_of(kind)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        # The mean over all images is the mean of the ranks' means.
        plain(x).square().mean().backward()
        model(x[mine]).square().mean().backward()
        theirs = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            name = name.removeprefix("module.")
            same(whole(parameter.grad), theirs[name].grad, f"{kind}, step {step}, gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        same(model(x[mine]), plain(x)[mine], f"{kind}: logits after three steps")


def ddp(mesh: DeviceMesh) -> None:
    for kind in ("timm", "reference", *OTHERS):
        data_parallel(mesh, DistributedDataParallel, kind)


def fsdp(mesh: DeviceMesh) -> None:
    def wrap(model: nn.Module, kind: str) -> nn.Module:
        for block in blocks_of(model, kind):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for kind in ("timm", "reference", *OTHERS):
        data_parallel(mesh, functools.partial(wrap, kind=kind), kind)
    # The order does not matter: what is sharded already can be swapped, and what is swapped can be taken back. The
    # blocks of torch.nn are layers that are swapped themselves, in a class that fully_shard made.
    for kind in ("timm", "torch.nn"):
        plain, model = small(kind).eval(), wrap(small(kind), kind).eval()
        kinds = [type(module) for module in model.modules()]
        fastvit.swap(model, strict=True)
        x = images(2, 32).double()
        with torch.no_grad():
            assert ops_run(lambda model=model, x=x: model(x)) == {PACKED, PATCHES}
            same(model(x), plain(x), f"{kind}: sharded, then swapped")
            fastvit.unswap(model)
            assert [type(module) for module in model.modules()] == kinds
            assert ops_run(lambda model=model, x=x: model(x)) == set()
            same(model(x), plain(x), f"{kind}: unswapped again")


PLAN = {
    "attn.qkv": PackedColwiseParallel(HEADS),
    "attn.proj": RowwiseParallel(),
    "mlp.fc1": ColwiseParallel(),
    "mlp.fc2": RowwiseParallel(),
}


def refused(mesh: DeviceMesh) -> bool:
    """Return whether this torch's DTensor cannot hold a packed projection; then the style must say so, by name."""
    packed = distribute_tensor(normal(3, HEADS, 2), mesh, [Shard(1)])
    try:
        packed.flatten(0, 1)
    except RuntimeError:
        layer, before = nn.Linear(8, 6 * HEADS), normal(6 * HEADS, 8)
        with torch.no_grad():
            layer.weight.copy_(before)
        with pytest.raises(NotImplementedError, match=r"PackedColwiseParallel: .* needs torch 2\.12"):
            parallelize_module(layer, mesh, PackedColwiseParallel(HEADS))
        same(layer.weight, before, "the refused layer")
        print(f"torch {torch.__version__} refuses PackedColwiseParallel", flush=True)
        return True
    return False


def tensor_parallel(mesh: DeviceMesh) -> None:
    if refused(mesh):
        return
    x = images(2, 32).double()
    for kind in ("timm", "reference"):
        plain = small(kind)
        model = copy.deepcopy(plain)
        keys = list(model.state_dict())
        expected = three_steps(plain, x)
        # The order does not matter.
        if kind == "timm":
            fastvit.swap(model, strict=True)
        for block in model.blocks:
            parallelize_module(block, mesh, PLAN)
        if kind == "reference":
            fastvit.swap(model, strict=True)
        weight = model.blocks[0].attn.qkv.weight
        assert weight.to_local().shape == (3 * 64 // RANKS, 64)
        assert list(model.state_dict()) == keys
        same(whole(weight), small(kind).blocks[0].attn.qkv.weight, "the sharded weight")
        assert ops_run(lambda model=model: model(x)) == {PACKED, PATCHES}
        # Rank r has heads 2 r and 2 r + 1 of query, key and value: neither pass gathers anything, each block adds up
        # the outputs of proj and of fc2, and in backward the gradients of their two inputs.
        with CommDebugMode() as forward:
            logits = model(x)
        with CommDebugMode() as backward:
            logits.square().sum().backward()
        for passed in (forward, backward):
            assert counts(passed) == {"all_reduce": 2 * DEPTH}, counts(passed)
        model.zero_grad()
        for name, value in three_steps(model, x).items():
            same(value, expected[name], f"{kind}: {name}")


def tensor_parallel_with_norms(mesh: DeviceMesh) -> None:
    if refused(mesh):
        return
    x = images(2, 32).double()
    plain = small("timm", qk_norm=True)
    model = copy.deepcopy(plain)
    expected = three_steps(plain, x)
    fastvit.swap(model, strict=True)
    replicate = torch.distributed.tensor.distribute_module
    for block in model.blocks:
        parallelize_module(block, mesh, PLAN)
        for norm in (block.attn.q_norm, block.attn.k_norm):
            replicate(norm, mesh)
    assert ops_run(lambda: model(x)) == {SEPARATE, PATCHES}
    with CommDebugMode() as forward:
        model(x)
    assert counts(forward) == {"all_reduce": 2 * DEPTH}, counts(forward)
    for name, value in three_steps(model, x).items():
        same(value, expected[name], f"qk_norm: {name}")


def tensor_parallel_with_separate_projections(mesh: DeviceMesh) -> None:
    """Shard transformers' q_proj, k_proj and v_proj over their heads, as its own plans do."""
    sizes = {"hidden_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 96}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    plain = libraries.Pooled(livened(transformers.CLIPVisionModel(config))).double().train()
    x, collectives = images(2, 32).double(), []
    expected = three_steps(copy.deepcopy(plain), x)
    plan = {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan |= {"self_attn.out_proj": RowwiseParallel(), "mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    for is_swapped in (False, True):
        model = copy.deepcopy(plain)
        if is_swapped:
            assert fastvit.swap(model, strict=True).counts == {"fused": DEPTH + 1}
        for block in model.get_submodule("model.encoder.layers"):
            parallelize_module(block, mesh, plan)
        assert ops_run(lambda model=model: model(x)) == ({SEPARATE, PATCHES} if is_swapped else set())
        with CommDebugMode() as forward:
            pooled = model(x)
        with CommDebugMode() as backward:
            pooled.square().sum().backward()
        collectives.append((counts(forward), counts(backward)))
        model.zero_grad()
        for name, value in three_steps(model, x).items():
            same(value, expected[name], f"separate projections, swapped {is_swapped}: {name}")
    # Each block adds up the outputs of out_proj and of fc2. Backward adds up the gradient of the input of q_proj,
    # of k_proj, of v_proj and of fc1. The swap adds nothing.
    assert collectives == [({"all_reduce": 2 * DEPTH}, {"all_reduce": 4 * DEPTH})] * 2, collectives


def counts(mode: CommDebugMode) -> dict[str, int]:
    return {str(op).split(".")[-1]: number for op, number in mode.get_comm_counts().items() if number}


def run_sharded(
    mesh: DeviceMesh,
    function: Callable[..., Tensor],
    tensors: list[Tensor | None],
    placements: list[Placement],
    grad: tuple[Tensor, Placement],
) -> tuple[list[Placement], list[Placement], dict[str, int]]:
    """Run forward and backward on sharded tensors, compare with whole ones, and return placements and collectives."""
    leaves = [None if t is None else t.clone().requires_grad_(index < 3) for index, t in enumerate(tensors)]
    output = function(*leaves)
    wanted = [leaf for leaf in leaves[:3] if leaf is not None]
    expected = torch.autograd.grad(output, wanted, grad[0])
    sharded = [
        None if t is None else distribute_tensor(t, mesh, [place]).requires_grad_(index < 3)
        for index, (t, place) in enumerate(zip(tensors, placements, strict=True))
    ]
    grad_output = distribute_tensor(grad[0], mesh, [grad[1]])
    with CommDebugMode() as mode:
        result = function(*sharded)
        grads = torch.autograd.grad(result, [t for t in sharded[:3] if t is not None], grad_output)
    same(whole(result), output, "output")
    for index, (actual, wish) in enumerate(zip(grads, expected, strict=True)):
        same(whole(actual), wish, f"gradient {index}")
    return [*result.placements], [g.placements[0] for g in grads], counts(mode)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return fastvit.attention(query, key, value, bias=bias)


def sharding_of_attention(mesh: DeviceMesh) -> None:
    query, key, value, grad = (normal(2, 4, 5, 8, seed=seed).double() for seed in range(4))
    rows = {None: None, "full": (2, 4), "heads": (1, 4), "batch": (2, 1), "neither": (1, 1)}
    for kind, leading in rows.items():
        bias = None if leading is None else normal(*leading, 5, 5, seed=5).double()
        for dim in (0, 1):
            follows = Replicate() if bias is None or bias.shape[dim] == 1 else Shard(dim)
            places = [Shard(dim)] * 3 + [follows]
            got = run_sharded(mesh, attend, [query, key, value, bias], places, (grad, Shard(dim)))
            assert got == ([Shard(dim)], [Shard(dim)] * 3, {}), (kind, dim, got)
    got = run_sharded(mesh, attend, [query, key, value, None], [Replicate()] * 4, (grad, Replicate()))
    assert got == ([Replicate()], [Replicate()] * 3, {}), got
    # One tensor that lies otherwise is brought to the others, once in each pass, and the others stay where they are.
    got = run_sharded(
        mesh, attend, [query, key, value, None], [Shard(1), Shard(1), Replicate(), Replicate()], (grad, Shard(1))
    )
    assert got[0] == [Shard(1)], got
    assert "all_gather_into_tensor" not in got[2], got
    # A sharded sequence cannot stay sharded: every query sees every key.
    got = run_sharded(mesh, attend, [query, key, value, None], [Shard(2)] * 4, (grad, Shard(2)))
    assert got[2], got


def sharding_of_packed(mesh: DeviceMesh) -> None:
    qkv, grad = normal(2, 5, 3, 4, 8).double(), normal(2, 5, 4, 8, seed=1).double()

    def attend_packed(qkv: Tensor, _: Any, __: Any, bias: Tensor | None) -> Tensor:
        return fastvit.attention_qkvpacked(qkv, bias=bias)

    for bias in (None, normal(1, 4, 5, 5).double(), normal(2, 1, 1, 5).double() > -1):
        for dim, out_dim, bias_dim in ((0, 0, 0), (3, 2, 1)):
            follows = Replicate() if bias is None or bias.shape[bias_dim] == 1 else Shard(bias_dim)
            places = [Shard(dim), Replicate(), Replicate(), follows]
            got = run_sharded(mesh, attend_packed, [qkv, None, None, bias], places, (grad, Shard(out_dim)))
            assert got == ([Shard(out_dim)], [Shard(dim)], {}), got
    # Five heads over two ranks: three and two.
    qkv, grad = normal(2, 5, 3, 5, 8).double(), normal(2, 5, 5, 8, seed=1).double()
    places = [Shard(3), Replicate(), Replicate(), Replicate()]
    got = run_sharded(mesh, attend_packed, [qkv, None, None, None], places, (grad, Shard(2)))
    assert got == ([Shard(2)], [Shard(3)], {}), got


def sharding_of_patch_embed(mesh: DeviceMesh) -> None:
    x, weight, bias = normal(4, 3, 8, 12).double(), normal(6, 3, 4, 4).double(), normal(6).double()
    grad = normal(4, 6, 6).double()
    by_batch = [Shard(0), Replicate(), Replicate()]
    by_features = [Replicate(), Shard(0), Shard(0)]
    rows: list[tuple[list[Placement], Placement, list[Placement]]] = [
        (by_batch, Shard(0), [Shard(0), Partial(), Partial()]),
        (by_features, Shard(2), [Partial(), Shard(0), Shard(0)]),
        ([Replicate()] * 3, Replicate(), [Replicate()] * 3),
    ]
    for places, out, grads in rows:
        got = run_sharded(mesh, fastvit.patch_embed, [x, weight, bias], places, (grad, out))
        # A sum over ranks stays Partial: whoever needs it adds it up, and nothing is gathered.
        assert got == ([out], grads, {}), got
    got = run_sharded(mesh, fastvit.patch_embed, [x, weight, None], by_batch, (grad, Shard(0)))
    assert got[0] == [Shard(0)], got
    overlapping = functools.partial(fastvit.patch_embed, stride=(2, 4))
    grad = normal(4, 9, 6).double()
    for places, out, grads in rows:
        got = run_sharded(mesh, overlapping, [x, weight, bias], places, (grad, out))
        assert got == ([out], grads, {}), got


def refusals(mesh: DeviceMesh) -> None:
    cases: list[tuple[nn.Module, int, type[Exception], str]] = [
        (nn.Linear(8, 24), 3, ValueError, "num_heads: got 3"),
        (nn.Linear(8, 20), 4, ValueError, "qkv: got 20"),
        (nn.LayerNorm(8), 4, TypeError, "qkv: got LayerNorm"),
    ]
    for module, heads, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            parallelize_module(module, mesh, PackedColwiseParallel(heads))


CASES: dict[str, list[Callable[[DeviceMesh], None]]] = {
    "data_parallel": [ddp, fsdp],
    "tensor_parallel": [
        tensor_parallel,
        tensor_parallel_with_norms,
        tensor_parallel_with_separate_projections,
        refusals,
    ],
    "sharding": [sharding_of_attention, sharding_of_packed, sharding_of_patch_embed],
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in (case for name in sys.argv[1:] for case in CASES[name]):
        case(init_device_mesh("cpu", (RANKS,)))
        print(f"{case.__name__}: fine", flush=True)
    dist.barrier()
    dist.destroy_process_group()
