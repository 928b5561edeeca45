"""Swapped timm models in what is done to them: copied, pickled, compiled, exported, traced, checkpointed."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch

from fastvit.swap import swap, unswap
from tests.swapping import PACKED, PATCHES, forward_backward, images, normal, ops_run, run_python
from tests.test_swap import tiny

layers = pytest.importorskip("timm.layers")


def test_deepcopy() -> None:
    model = tiny()
    swap(model, backend="reference")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    assert ops_run(lambda: twin(images())) == {PACKED, PATCHES}
    unswap(twin)
    assert type(twin.patch_embed) is layers.PatchEmbed
    assert type(model.patch_embed) is not layers.PatchEmbed


def test_pickle_into_a_fresh_interpreter(tmp_path: Path) -> None:
    model = tiny()
    swap(model, backend="reference")
    path = tmp_path / "model.pt"
    torch.save({"model": model, "x": images(), "logits": model(images()).detach()}, path)
    program = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
model = saved["model"]
assert (model(saved["x"]) - saved["logits"]).abs().max() < 1e-5
from fastvit.swap import swap, unswap
print(swap(model, backend="reference").counts, len(unswap(model).rows), type(model.patch_embed).__module__)
"""
    assert run_python(program, path).strip() == "{'already fused': 3} 3 timm.layers.patch_embed"


def test_compile_fullgraph() -> None:
    model = tiny()
    swap(model)
    x = images()
    expected = forward_backward(model, x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(x)
        grads = torch.autograd.grad((logits * normal(*logits.shape, seed=3)).sum(), list(model.parameters()))
        assert ops_run(lambda: compiled(x)) == {PACKED, PATCHES}
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_inductor_runs_the_ops() -> None:
    model = tiny(depth=1)
    swap(model)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = model(images())
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: compiled(images())) == {PACKED, PATCHES}


def test_compiled_before_the_swap() -> None:
    model = tiny()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(images())
    assert swap(compiled).counts == {"fused": 3}
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: compiled(images())) == {PACKED, PATCHES}
    unswap(model)
    assert ops_run(lambda: compiled(images())) == set()


def test_compile_with_attention_dropout() -> None:
    model = tiny(attn_drop_rate=0.3).train()
    swap(model)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images()).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_export_with_a_dynamic_batch() -> None:
    model = tiny()
    swap(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes={"x": {0: batch}})
    code = str(program.graph)
    assert "fastvit.attention_qkvpacked" in code
    assert "fastvit.patch_embed" in code
    for size in (1, 5):
        torch.testing.assert_close(program.module()(images(size)), model(images(size)), rtol=1e-4, atol=1e-4)


def test_symbolic_tracing() -> None:
    model = tiny()
    swap(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images()), model(images()))
    assert ops_run(lambda: traced(images())) == {PACKED, PATCHES}


def test_inference_mode_and_checkpointing() -> None:
    model = tiny().train()
    swap(model)
    with torch.inference_mode():
        inferred = model(images())
    expected = forward_backward(model, images())
    torch.testing.assert_close(inferred, expected["logits"])
    model.set_grad_checkpointing()
    checkpointed = forward_backward(model, images())
    for name, value in expected.items():
        torch.testing.assert_close(checkpointed[name], value, msg=lambda m, name=name: f"{name}: {m}")
