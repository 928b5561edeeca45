"""What people do to a swapped timm model besides running it: load, move, compile, package, adapt, quantise, prune."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastvit.swap import swap, unswap
from fastvit.testing import compare, livened
from tests.swapping import PACKED, PATCHES, by_tensor, forward_backward, images, ops_run, torchs_paths

timm = pytest.importorskip("timm")
ROOT = Path(__file__).parents[1]
BOTH = {PACKED, PATCHES}


def tiny(seed: int = 0, **options: Any) -> nn.Module:
    options = {"depth": 1, "img_size": 32, "patch_size": 8, "num_classes": 10, **options}
    return livened(timm.create_model("vit_tiny_patch16_224", **options), seed)


def swapped(seed: int = 0, **options: Any) -> nn.Module:
    model = tiny(seed, **options)
    swap(model, strict=True)
    return model


def x(batch: int = 2, size: int = 32) -> Tensor:
    return images(batch, size)


def hold_the_rule(model: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Compare logits and gradients with ``build()``'s in float64; PyTorch's own error is that of its worst path."""
    mine = forward_backward(model, x())
    truth = forward_backward(build().double(), x().double())
    plain = build()
    own = by_tensor(torchs_paths(plain, lambda: forward_backward(plain, x())))
    assert mine.keys() == truth.keys() == own.keys()
    for key, expected in truth.items():
        comparison = compare(mine[key], expected, own[key], key)
        assert comparison.passed, comparison


# Loading, saving and moving


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_go_both_ways(assign: bool) -> None:
    for source, target in ((tiny(1), swapped()), (swapped(1), tiny()), (swapped(1), swapped())):
        assert (source(x()) - target(x())).abs().max() > 0.1
        missing = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
        assert not missing.missing_keys
        assert not missing.unexpected_keys
        torch.testing.assert_close(target(x()), source(x()), rtol=1e-4, atol=1e-4)
        shared = target.blocks[0].attn.qkv.weight.data_ptr() == source.blocks[0].attn.qkv.weight.data_ptr()
        assert shared is assign


def test_weights_only_files() -> None:
    model, buffer = swapped(1), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain = tiny()
    plain.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    torch.testing.assert_close(plain(x()), model(x()), rtol=1e-4, atol=1e-4)


def test_meta_and_back() -> None:
    model = swapped()
    expected, weights = model(x()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.to("meta")(x().to("meta")).shape == expected.shape
    model.to_empty(device="cpu").load_state_dict(weights, strict=True)
    assert torch.equal(model(x()), expected)


def test_default_device() -> None:
    torch.set_default_device("meta")
    try:
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
        assert swap(model, strict=True).counts == {"fused": 2}
        assert model(torch.empty(2, 3, 224, 224)).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_channels_last() -> None:
    model = swapped().to(memory_format=torch.channels_last)
    weight = model.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    for format_ in (torch.contiguous_format, torch.channels_last):
        given = x().contiguous(memory_format=format_)
        assert ops_run(lambda given=given: model(given)) == BOTH
        torch.testing.assert_close(model(given), tiny()(x()), rtol=1e-4, atol=1e-4)
    hold_the_rule(model, tiny)


def test_conversion_that_swaps_the_parameters_contents() -> None:
    model = swapped()
    identities = [id(parameter) for parameter in model.parameters()]
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert identities == [id(parameter) for parameter in model.parameters()]
    torch.testing.assert_close(model(x().double()), tiny().double()(x().double()), rtol=1e-11, atol=1e-11)


def test_fake_tensors() -> None:
    model = swapped()
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = model(torch.empty(5, 3, 32, 32))
        assert isinstance(logits, FakeTensor)
        assert logits.shape == (5, 10)
        (grad,) = torch.autograd.grad(logits.sum(), [model.blocks[0].attn.qkv.weight])
        assert isinstance(grad, FakeTensor)
        assert grad.shape == (576, 192)


# Running


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = swapped().train()
        tokens = model.patch_embed(x())
        attention = model.blocks[0].attn
        out = checkpoint(attention, tokens, use_reentrant=use_reentrant) if checkpointed else attention(tokens)
        out.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 6
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_two_threads_train_at_once() -> None:
    models = [swapped(seed) for seed in range(2)]
    expected = [forward_backward(model, x()) for model in models]
    results: list[list[dict[str, Tensor]]] = [[], []]

    def work(index: int) -> None:
        for _ in range(5):
            results[index].append(forward_backward(models[index], x()))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 5
        for result in results[index]:
            assert all(torch.equal(result[key], value) for key, value in expected[index].items())


def test_the_profiler_names_forward_and_backward() -> None:
    model = swapped()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x().requires_grad_()).sum().backward()
    counted = {event.key: event.count for event in profile.key_averages()}
    backwards = (f"{PACKED}_backward", f"{PATCHES}_backward_weight", f"{PATCHES}_backward_images")
    assert {name: counted.get(name) for name in (PACKED, PATCHES, *backwards)} == dict.fromkeys(
        (PACKED, PATCHES, *backwards), 1
    )


# Compilers


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("inductor", True)])
def test_one_graph_for_all_batches_and_image_sizes(backend: str, dynamic: bool | None) -> None:
    model = swapped(dynamic_img_size=True)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    graphs = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch, size in ((2, 40), (3, 48), (5, 64), (4, 56)):
            torch.testing.assert_close(compiled(x(batch, size)), model(x(batch, size)), rtol=1e-4, atol=1e-4)
            graphs.append(counters["stats"]["unique_graphs"])
        assert ops_run(lambda: compiled(x(6, 72))) == BOTH
    # The second size makes the graph dynamic, and later ones reuse it; timm's own forward compiles once per size.
    assert graphs == ([1, 1, 1, 1] if dynamic else [1, 2, 2, 2])
    assert not counters["graph_break"]


def test_a_compiled_model_refuses_what_the_eager_one_refuses() -> None:
    model = swapped(dynamic_img_size=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(x(2, 40))
        for network, height in ((model, "41"), (compiled, "(another|41)")):
            with pytest.raises(Exception, match=rf"images: got height {height}; accepted are multiples of 8"):
                network(x(2, 41))


def run_python(program: str, *arguments: object) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_aot_inductor_package_in_a_fresh_interpreter(tmp_path: Path) -> None:
    model = swapped()
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x(3),), dynamic_shapes=dynamic)
        torch.export.save(program, tmp_path / "program.pt2")
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.save({batch: (x(batch), model(x(batch))) for batch in (1, 5)}, tmp_path / "io.pt")
    # The ops live in fastvit, not in the package: importing it is all that a program needs, and timm is not.
    loading = """
import sys, torch
package, program, io = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(package)
except RuntimeError as error:
    assert "Could not find schema for fastvit::" in str(error), error
else:
    raise AssertionError("loaded without the ops")
import fastvit
loaded = [torch._inductor.aoti_load_package(package), torch.export.load(program).module()]
for images, logits in torch.load(io).values():
    for model in loaded:
        assert (model(images) - logits).abs().max() < 1e-4
assert "timm" not in sys.modules
print("same")
"""
    assert run_python(loading, package, tmp_path / "program.pt2", tmp_path / "io.pt").strip().endswith("same")


def test_torchscript_is_refused_and_tracing_works() -> None:
    model = swapped()
    with pytest.raises(
        NotImplementedError, match=r"^fastvit FusedPatchEmbed: torch.jit.script is not supported.*unswap"
    ):
        torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x(3)), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    torch.testing.assert_close(loaded(x(5)), model(x(5)), rtol=1e-5, atol=1e-5)
    assert ops_run(lambda: loaded(x())) == BOTH
    unswap(model)
    torch.jit.script(model)
