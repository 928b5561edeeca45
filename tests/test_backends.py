"""The choice of a backend: the order, the reasons, the context manager, and what happens without a compiler."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastvit
from fastvit.kernels import native
from fastvit.kernels.reference.precision import wider
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec
from fastvit.ops import backends
from fastvit.ops.when_imported import when_imported

ROOT = Path(__file__).parent.parent
SPEC = AttentionSpec(2, 3, 197, 197, 64, 64, torch.float32, None, False, torch.device("cpu"))
PATCH_SPEC = PatchEmbedSpec(2, 3, 224, 224, 16, 16, 768, torch.float32, torch.device("cpu"))


def run() -> torch.Tensor:
    return fastvit.attention_qkvpacked(torch.randn(1, 5, 3, 2, 8))


@pytest.mark.parametrize("spec", [SPEC, PATCH_SPEC])
def test_the_cpu_kernels_are_chosen_on_the_cpu(spec: backends.Spec) -> None:
    assert backends.select(spec) is native
    chosen = [row for row in backends.explain(spec) if row.automatic]
    assert [row.backend for row in chosen] == ["cpu"]


def test_every_place_in_the_order_has_its_committed_evidence() -> None:
    for places in backends.AUTOMATIC_ORDER.values():
        for place in places:
            if place != backends.SPECIFICATION:
                assert (ROOT / place.evidence).is_file(), place


@pytest.mark.parametrize("spec", [SPEC, PATCH_SPEC])
def test_every_backend_explains_itself(spec: backends.Spec) -> None:
    rows = {row.backend: row for row in backends.explain(spec)}
    assert set(rows) == {"cpu", "triton", "cuda", "reference"}
    assert rows["cuda"].reasons[0] == "device cpu: only CUDA tensors"
    assert "can; chosen automatically" in str(rows["cpu"])
    assert "by name" in str(rows["reference"])


def test_an_explicit_backend_that_cannot_run_raises_with_every_reason() -> None:
    with pytest.raises(RuntimeError) as error, fastvit.backend("cuda"):
        run()
    assert "backend 'cuda' cannot run this call" in str(error.value)
    for name in ("cpu: can", "reference: can", "cuda: cannot: device cpu: only CUDA tensors"):
        assert name in str(error.value)
    with pytest.raises(RuntimeError, match="float64"):
        fastvit.attention(*torch.randn(3, 1, 1, 4, 8, dtype=torch.float64), backend="triton")


@pytest.mark.usefixtures("python_calls")
def test_the_context_manager_nests_and_belongs_to_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(native, "attention_forward", lambda *_, **__: seen.append("cpu"))
    with fastvit.backend("reference"):
        run()
        assert seen == []
        with fastvit.backend(None):
            run()
        assert seen == ["cpu"]
        worker = threading.Thread(target=run)
        worker.start()
        worker.join()
        assert seen == ["cpu"] * 2
        fastvit.attention_qkvpacked(torch.randn(1, 5, 3, 2, 8), backend="cpu")
        assert seen == ["cpu"] * 3
    with pytest.raises(ValueError, match="backend: got 'nosuch'"), fastvit.backend("nosuch"):
        pass


def test_backward_runs_where_forward_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.randn(1, 5, 3, 2, 8, requires_grad=True)
    with fastvit.backend("reference"):
        output = fastvit.attention_qkvpacked(packed)
    monkeypatch.setattr(native, "attention_backward", lambda *_, **__: pytest.fail("the cpu backend ran"))
    output.sum().backward()
    assert packed.grad is not None


def test_an_automatic_forward_has_an_automatic_backward() -> None:
    packed = torch.randn(1, 5, 3, 2, 8, requires_grad=True)
    images, weight = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(6, 3, 4, 4, requires_grad=True)
    total = fastvit.attention_qkvpacked(packed).sum() + fastvit.patch_embed(images, weight).sum()
    # On a GPU the engine's own thread would not see this block either.
    with fastvit.backend("cuda"):
        total.backward()
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
            run()
    assert all(leaf.grad is not None for leaf in (packed, images, weight))


def test_a_compiled_graph_is_the_same_for_every_backend() -> None:
    graphs = []

    def keep(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    for name in ("cpu", "reference"):
        torch.compiler.reset()
        compiled = torch.compile(lambda t: fastvit.attention_qkvpacked(t), backend=keep, fullgraph=True)
        with fastvit.backend(name):
            compiled(torch.randn(1, 5, 3, 2, 8))
    assert graphs[0] == graphs[1]


def test_without_a_measured_backend_the_reference_says_so() -> None:
    backends._warn_reference.cache_clear()
    meta = SPEC._replace(device=torch.device("meta"))
    with pytest.warns(UserWarning, match="runs its plain-torch reference on 'meta'"):
        assert backends.select(meta).__name__ == "fastvit.kernels.reference"
    backends.reset_selection()


def test_without_the_extension_the_package_imports_and_names_the_cause() -> None:
    code = (
        "import sys; sys.modules['fastvit._C'] = None\n"
        "import torch, warnings, fastvit\n"
        "warnings.simplefilter('ignore')\n"
        "x = torch.randn(1, 5, 3, 2, 8)\n"
        "print(fastvit.attention_qkvpacked(x).shape)\n"
        "try: fastvit.attention_qkvpacked(x, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "torch.Size([1, 5, 2, 8])" in result.stdout
    assert "fastvit._C cannot be imported" in result.stdout
    assert "with a C++ compiler" in result.stdout


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    code = "import fastvit, torch\nfastvit.attention_qkvpacked(torch.randn(1, 5, 3, 2, 8), backend='cpu')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"FASTVIT_CPU_CAPABILITY": "avx1024", "PATH": "/usr/bin"},
        check=False,
    )
    assert "FASTVIT_CPU_CAPABILITY: got 'avx1024'; this build on this processor accepts" in result.stderr


def test_importing_fastvit_imports_neither_triton_nor_timm() -> None:
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fastvit\n"
        "print(sorted({'triton', 'timm', 'transformers', 'matplotlib', 'rich'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"


def test_the_choice_is_quiet_where_it_was_measured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_the_reference_needs_no_float64_where_there_is_none() -> None:
    with FakeTensorMode():
        on_mac, on_cpu = (torch.empty(2, 3, device=device) for device in ("mps", "cpu"))
        assert (wider(on_mac).dtype, wider(on_mac.half()).dtype) == (torch.float32, torch.float32)
        assert (wider(on_cpu).dtype, wider(on_cpu.half()).dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("is_imported", [True, False])
def test_what_cannot_be_registered_with_torch_is_a_warning(is_imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "colorsys"  # of the standard library, imported by nobody
    monkeypatch.delitem(sys.modules, name, raising=False)
    if is_imported:
        importlib.import_module(name)

    def fail() -> None:
        raise ImportError("it has moved")

    def register_and_import() -> None:
        when_imported(name, fail)
        importlib.import_module(name)

    with pytest.warns(UserWarning, match="fastvit: nothing was registered with colorsys: it has moved"):
        register_and_import()
