"""attn_implementation="fastvit": any transformers model by a name, and the attention function behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.kernels import native
from fastvit.swap import swap, unswap
from fastvit.testing import Comparison, check_model, compare
from tests.swapping import SEPARATE, forward_backward, normal, ops_run, run_python, state

transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

from fastvit.adapters.transformers_attention import attention_forward  # noqa: E402
from tests import hugging  # noqa: E402
from tests.hugging import DEPTH, MODELS  # noqa: E402

Hold = Callable[[str, Iterable[Comparison], object], None]


@pytest.fixture(autouse=True)
def registered() -> None:
    fastvit.register_transformers()


def test_importing_fastvit_imports_no_transformers() -> None:
    program = """
import sys
import fastvit
assert not any(name.split(".")[0] == "transformers" for name in sys.modules)
fastvit.register_transformers()
from transformers import AutoModel, ViTConfig
config = ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48, image_size=32)
model = AutoModel.from_config(config, attn_implementation="fastvit")
print(model.config._attn_implementation, fastvit.swap(model).counts)
"""
    assert run_python(program).strip().startswith("fastvit {")


@pytest.mark.parametrize("name", MODELS)
def test_models_run_by_name(name: str, hold: Hold) -> None:
    build, make, kind, _ = MODELS[name]
    model = build()
    inputs = hugging.padded(left=True) if name == "clip_text" else make()
    truth = hugging.exact(model, inputs)
    own = hugging.torchs_own(model, inputs, eager=name != "clip_text")
    unnamed = model(inputs)
    model.model.set_attn_implementation("fastvit")
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(forward_backward(model, inputs))) == {SEPARATE}
    hold("transformers by name", [compare(mine[key], truth[key], own[key], key) for key in truth], name)
    model.model.set_attn_implementation("sdpa")
    assert torch.equal(model(inputs), unnamed)
    assert not any(type(module).__name__.startswith("Fused") for module in model.modules())
    assert kind in {type(module).__name__ for module in model.modules()}


def test_from_config() -> None:
    config = hugging.vit().model.config
    model = transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation="fastvit").eval()
    assert ops_run(lambda: model(**hugging.pixels())) == {SEPARATE}
    assert "fastvit" not in model.config.to_json_string()


def test_padding_masks_arrive() -> None:
    model, inputs = hugging.clip_text(), hugging.padded(left=True)
    expected = model(inputs)
    model.model.set_attn_implementation("fastvit")
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-4)
    # The trap itself: a name that only the attention interface knows loses the mask, silently.
    masks = AttentionMaskInterface._global_mapping
    mask = masks.pop("fastvit")
    try:
        assert (model(inputs) - expected).abs().max() > 0.1
    finally:
        masks["fastvit"] = mask


def test_swap_reports_what_runs_by_name_and_leaves_it() -> None:
    model = hugging.siglip()
    model.model.set_attn_implementation("fastvit")
    before = state(model)
    for backend in (None, "reference"):
        report = swap(model, backend=backend)
        rows = [row for row in report.rows if row.original_type == "SiglipAttention"]
        assert [row.action for row in rows] == ["already fused"] * DEPTH
        assert {(row.reason, row.backend) for row in rows} == {("attn_implementation='fastvit'", "automatic")}
        assert "SiglipAttention -> already fused" in str(report)
        assert {type(layer.self_attn).__name__ for layer in model.model.encoder.layers} == {"SiglipAttention"}
        unswap(model)
        assert state(model) == before


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2}


def test_a_class_without_an_adapter_runs_by_name() -> None:
    config = transformers.BertConfig(**SMALL, vocab_size=99, max_position_embeddings=24)
    model, inputs = transformers.BertModel(config).eval(), hugging.padded(left=False)
    expected = model(**inputs).last_hidden_state
    assert swap(model).counts == {"left alone": 2}
    model.set_attn_implementation("fastvit")
    report = swap(model)
    assert report.counts == {"already fused": 2}
    assert ops_run(lambda: model(**inputs)) == {SEPARATE}
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_a_decoder_with_grouped_queries_and_a_cache(kind: str) -> None:
    window = {"sliding_window": 6} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **window, vocab_size=99, num_key_value_heads=2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    inputs = hugging.padded(left=True, batch=4)
    expected = model(**inputs).logits
    words = model.generate(**hugging.words(2, 5), max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("fastvit")
    assert ops_run(lambda: model(**inputs)) == {SEPARATE}
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    again = model.generate(**hugging.words(2, 5), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(again, words)


@pytest.mark.parametrize("name", ["vit", "siglip", "clip_text"])
def test_output_attentions_by_name(name: str) -> None:
    build, make, kind, _ = MODELS[name]
    model, inputs = build(), make()
    model.model.set_attn_implementation("eager")
    expected = model.model(**inputs, output_attentions=True)
    model.model.set_attn_implementation("fastvit")
    with (
        _warned_afresh(),
        pytest.warns(UserWarning, match=rf"^{kind}: output_attentions asks .* transformers' own") as caught,
    ):
        actual = model.model(**inputs, output_attentions=True)
    assert len(caught) == 1
    torch.testing.assert_close(actual.attentions, expected.attentions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: model(inputs)) == {SEPARATE}


def test_attention_dropout_by_name() -> None:
    model = hugging.vit(attention_probs_dropout_prob=0.3).train()
    torch.manual_seed(5)
    expected = model(hugging.pixels())
    model.model.set_attn_implementation("fastvit")
    torch.manual_seed(5)
    with _warned_afresh(), pytest.warns(UserWarning, match=r"^ViTAttention: attention dropout has no kernel yet"):
        actual = model(hugging.pixels())
    assert torch.equal(actual, expected)
    assert ops_run(lambda: model(hugging.pixels())) == set()


class _warned_afresh:  # noqa: N801
    """Forget which warnings were given."""

    def __enter__(self) -> None:
        from fastvit.adapters.transformers_attention import _warn_once

        _warn_once.cache_clear()

    def __exit__(self, *_: object) -> None:
        """Keep what was given."""


class Layer(nn.Module):
    """What the attention function may ask of a layer."""

    def __init__(self, is_causal: bool | None = None, groups: int = 1) -> None:
        super().__init__()
        self.config = transformers.ViTConfig(attn_implementation="fastvit")
        self.num_key_value_groups = groups
        if is_causal is not None:
            self.is_causal = is_causal


CALLS: dict[str, tuple[Layer, dict[str, Any]]] = {
    "plain": (Layer(False), {}),
    "scaling": (Layer(False), {"scaling": 0.5}),
    "causal layer": (Layer(True), {}),
    "a layer that does not say is causal": (Layer(), {}),
    "causal call": (Layer(False), {"is_causal": True}),
    "bidirectional call": (Layer(True), {"is_causal": False}),
    "a mask decides": (Layer(True), {"attention_mask": normal(2, 1, 9, 9) > 0}),
    "additive": (Layer(False), {"attention_mask": normal(1, 4, 9, 9)}),
    "grouped": (Layer(False, 2), {}),
    "grouped, masked": (Layer(False, 2), {"attention_mask": normal(2, 1, 1, 9) > 0}),
    "one query": (Layer(True), {"queries": 1}),
    "learned queries": (Layer(False), {"batch": 1, "queries": 5}),
    "what SDPA ignores": (
        Layer(False),
        {"sliding_window": 3, "cu_seq_lens_q": torch.tensor([0, 9]), "use_cache": True},
    ),
}


def _tensors(layer: Layer, batch: int = 2, queries: int = 9, **_: Any) -> list[Tensor]:
    heads = 4 // layer.num_key_value_groups
    key, value = (normal(2, heads, 9, 16, seed=seed) for seed in (1, 2))
    return [4 * normal(batch, 4, queries, 16), key, value]


@pytest.mark.parametrize("case", CALLS)
def test_the_function_means_what_sdpas_does(case: str) -> None:
    layer, options = CALLS[case]
    mask = options.get("attention_mask")
    given = {key: value for key, value in options.items() if key not in ("attention_mask", "batch", "queries")}
    expected, _ = sdpa_attention_forward(layer, *_tensors(layer, **options), mask, **given)
    results: list[Any] = []
    assert ops_run(lambda: results.extend(attention_forward(layer, *_tensors(layer, **options), mask, **given))) == {
        SEPARATE
    }
    actual, weights = results
    assert weights is None
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "sinks", "indices", "block_indices"])
def test_keywords_that_change_the_result_are_refused(keyword: str) -> None:
    layer = Layer(False)
    with pytest.raises(ValueError, match=rf"^{keyword}: attn_implementation='fastvit' does not support it"):
        attention_forward(layer, *_tensors(layer), None, **{keyword: torch.ones(1)})
    attention_forward(layer, *_tensors(layer), None, **{keyword: None})


@pytest.mark.parametrize("case", ["position_bias", "learned mask", "wide heads"])
def test_what_sdpa_can_do_and_we_cannot(case: str) -> None:
    layer, bias = Layer(False), normal(1, 4, 9, 9).requires_grad_()
    tensors, mask, options = _tensors(layer), None, {}
    if case == "position_bias":
        options = {"position_bias": bias}
    elif case == "learned mask":
        mask = bias
    else:
        tensors = [F.pad(tensor, (0, 300 - 16)) for tensor in tensors]
    expected, _ = sdpa_attention_forward(layer, *tensors, mask, **options)
    with _warned_afresh(), pytest.warns(UserWarning, match=r"^Layer: .*, so its calls run transformers' own attention"):
        actual, _ = attention_forward(layer, *tensors, mask, **options)
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("python_calls")
def test_check_model_holds_a_model_by_name_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = MODELS["vit"][0](), MODELS["vit"][1]()
    model.model.set_attn_implementation("fastvit")
    assert all(comparison.passed for comparison in check_model(model, inputs))
    assert model.model.config._attn_implementation == "fastvit"
    right = native.attention_forward

    def wrong(*tensors: Any, **options: Any) -> None:
        right(*tensors, **options)
        tensors[4].zero_()

    monkeypatch.setattr(native, "attention_forward", wrong)
    assert not all(comparison.passed for comparison in check_model(model, inputs, backward=False))
