"""swap and unswap on transformers' real models: the same numbers, masks and behaviour, and an honest report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from fastvit.swap import SwapReport, swap, unswap
from fastvit.testing import Comparison, compare
from tests.swapping import SEPARATE, forward_backward, ops_run, state

transformers = pytest.importorskip("transformers")


from tests import hugging  # noqa: E402
from tests.hugging import DEPTH, MODELS  # noqa: E402

Hold = Callable[[str, Iterable[Comparison], object], None]


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attention layers whose class asks transformers' interface."""
    return [module for module in model.modules() if type(module).__name__.removeprefix("Fused") in CLASSES]


CLASSES = {kind for _, _, kind, _ in MODELS.values()}


def checked_report(report: SwapReport, kind: str, others: list[str]) -> None:
    assert all(row.action == "fused" for row in report.rows), str(report)
    assert sorted(row.original_type for row in report.rows) == sorted([kind] * DEPTH + others)


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_numbers(name: str, hold: Hold) -> None:
    build, make, kind, others = MODELS[name]
    model, inputs = build(), make()
    truth = hugging.exact(model, inputs)
    own, unswapped = hugging.torchs_own(model, inputs), forward_backward(model, inputs)
    before = state(model)
    classes = [type(module) for module in model.modules()]

    report = swap(model)
    checked_report(report, kind, others)
    assert state(model) == before
    mine: dict[str, Tensor] = {}
    ran = ops_run(lambda: mine.update(forward_backward(model, inputs)))
    assert SEPARATE in ran
    assert mine.keys() == own.keys() == truth.keys()
    hold(f"transformers {name}", [compare(mine[key], truth[key], own[key], key) for key in truth], name)

    unswap(model)
    assert [type(module) for module in model.modules()] == classes
    assert state(model) == before
    restored = forward_backward(model, inputs)
    assert all(torch.equal(restored[key], unswapped[key]) for key in unswapped)


@pytest.mark.parametrize("name", hugging.MORE)
def test_classes_of_the_same_make(name: str, hold: Hold) -> None:
    model, inputs = hugging.another(name)
    truth = hugging.exact(model, inputs)
    own, unswapped = hugging.torchs_own(model, inputs), forward_backward(model, inputs)
    report = swap(model)
    rows = [row for row in report.swapped if row.original_type == hugging.MORE[name][1]]
    assert len(rows) == DEPTH, str(report)
    reasons = {
        "Aimv2AttentionPoolingHead": "one class token looks at",
        "ASTPatchEmbeddings": "an overlapping convolution",
    }
    assert all(row.reason.startswith(reasons[row.original_type]) for row in report.left_alone), str(report)
    mine: dict[str, Tensor] = {}
    assert SEPARATE in ops_run(lambda: mine.update(forward_backward(model, inputs)))
    hold(f"transformers {name}", [compare(mine[key], truth[key], own[key], key) for key in truth], name)
    unswap(model)
    restored = forward_backward(model, inputs)
    assert all(torch.equal(restored[key], unswapped[key]) for key in unswapped)


def test_the_fused_classes_have_names_of_their_own() -> None:
    from fastvit.adapters.transformers_models import FORWARDS

    names = [name for _, table in FORWARDS for classes in table.values() for name in classes]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [True, False])
def test_clip_text_with_padding(implementation: str, left: bool, hold: Hold) -> None:
    model, inputs = hugging.clip_text(), hugging.padded(left)
    assert not inputs["attention_mask"][0].any()
    model.model.set_attn_implementation(implementation)
    truth = hugging.exact(model, inputs)
    own = hugging.torchs_own(model, inputs, eager=implementation == "eager")
    swap(model)
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(forward_backward(model, inputs))) == {SEPARATE}
    comparisons = [compare(mine[key], truth[key], own[key], key) for key in truth]
    hold(f"transformers clip_text, padded, {implementation}", comparisons, left)
    # The mask counts, and so does the order: a word sees neither padding nor what comes after it.
    assert (mine["logits"] - model(hugging.words())).abs().max() > 0.1
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 12] = 3
    earlier = inputs["attention_mask"].bool()
    earlier[:, 12:] = False
    torch.testing.assert_close(model(changed)[earlier], mine["logits"][earlier], rtol=1e-4, atol=1e-4)


def test_clip_text_is_causal_without_a_mask() -> None:
    model = hugging.clip_text()
    swap(model)
    inputs, changed = hugging.words(), hugging.words()
    changed["input_ids"][:, 12] = 3
    first, second = model(inputs), model(changed)
    torch.testing.assert_close(first[:, :12], second[:, :12], rtol=1e-5, atol=1e-5)
    assert (first[:, 12:] - second[:, 12:]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["vit", "clip_text"])
def test_a_model_with_eager_attention(name: str, hold: Hold) -> None:
    build, make, kind, others = MODELS[name]
    model, inputs = build(), make()
    model.model.set_attn_implementation("eager")
    truth = hugging.exact(model, inputs)
    own = hugging.torchs_own(model, inputs)
    report = swap(model)
    checked_report(report, kind, others)
    assert "output_attentions runs eager attention, weights are returned only then" in str(report)
    mine: dict[str, Tensor] = {}
    assert SEPARATE in ops_run(lambda: mine.update(forward_backward(model, inputs)))
    hold(f"transformers {name}, eager", [compare(mine[key], truth[key], own[key], key) for key in truth], name)


# What asks for the weights: a keyword; for SigLIP, which does not hand it on, transformers' own recording.
@pytest.mark.filterwarnings("ignore:.*plain forward")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3", "clip_vision", "clip_text", "padded"])
def test_output_attentions(name: str, implementation: str, hold: Hold) -> None:
    build, make, _, _ = MODELS["clip_text" if name == "padded" else name]
    model = build()
    inputs = hugging.padded(left=True) if name == "padded" else make()
    model.model.set_attn_implementation("eager")
    own = model.model(**inputs, output_attentions=True)
    with hugging.in_float64():
        doubled = copy.deepcopy(model).double().model
        truth = doubled(**hugging.to_dtype(inputs, torch.float64), output_attentions=True)
    model.model.set_attn_implementation(implementation)
    swap(model)
    expected = model(inputs)
    with pytest.warns(UserWarning, match=r"output_attentions asks for the attention weights") as caught:
        mine = model.model(**inputs, output_attentions=True)
    assert len(caught) == DEPTH
    assert len(mine.attentions) == DEPTH
    torch.testing.assert_close(mine.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    seeing = slice(None)
    if name == "padded" and implementation == "sdpa":
        # Where there is nothing to see eager attention looks everywhere, and this model nowhere.
        seen = inputs["attention_mask"].cumsum(1) > 0
        assert all((weights.sum(-1) * ~seen[:, None] == 0).all() for weights in mine.attentions)
        seeing = seen.all(1)
    for index in range(DEPTH):
        triple = (result.attentions[index][seeing] for result in (mine, truth, own))
        hold("transformers output_attentions", [compare(*triple, f"weights {index}")], (name, implementation))
    assert SEPARATE in ops_run(lambda: model(inputs))


@pytest.mark.filterwarnings("ignore:.*plain forward")
def test_output_attentions_in_the_config() -> None:
    model = hugging.vit()
    model.model.set_attn_implementation("eager")
    model.model.config.output_attentions = True
    expected = model.model(**hugging.pixels())
    swap(model)
    actual = model.model(**hugging.pixels())
    assert len(actual.attentions) == DEPTH
    torch.testing.assert_close(actual.attentions, expected.attentions)
    assert (actual.attentions[0].sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_dropout_in_training_is_transformers(implementation: str) -> None:
    for build, options in (
        (hugging.vit, {"attention_probs_dropout_prob": 0.3}),
        (hugging.clip_vision, {"attention_dropout": 0.3}),
    ):
        model, plain = build(**options).train(), build(**options).train()
        for m in (model, plain):
            m.model.set_attn_implementation(implementation)
        report = swap(model)
        assert "attention dropout p=0.3 runs the plain forward in training" in str(report)
        assert "attention dropout p=0.3" in repr(attentions(model)[0])
        torch.manual_seed(5)
        expected = plain(hugging.pixels())
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match=r"attention dropout has no kernel yet") as caught:
            actual = model(hugging.pixels())
        assert len(caught) == DEPTH
        # The very same random mask; a patch embedding may round in another way.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert SEPARATE not in ops_run(lambda model=model: model(hugging.pixels()))
        assert SEPARATE in ops_run(lambda model=model: model.eval()(hugging.pixels()))
        unswap(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision(name: str, dtype: torch.dtype, hold: Hold) -> None:
    build, make, _, _ = MODELS[name]
    model, inputs = build().to(dtype), hugging.to_dtype(make(), dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(hugging.to_dtype(inputs, torch.float64))
        own = model(inputs)
        swap(model)
        mine = [torch.empty(0)]
        assert SEPARATE in ops_run(lambda: mine.append(model(inputs)))
    hold("transformers low precision", [compare(mine[-1], truth, own, "hidden")], (name, dtype))


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, hold: Hold) -> None:
    build, make, _, _ = MODELS[name]
    model, inputs = build(), make()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(hugging.to_dtype(inputs, torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            own = model(inputs)
            swap(model)
            mine = model(inputs)
            assert SEPARATE in ops_run(lambda: model(inputs))
    assert mine.dtype == own.dtype
    hold("transformers autocast", [compare(mine, truth, own, "hidden")], name)


def test_dtype_changes_after_the_swap() -> None:
    model = hugging.vit()
    swap(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        inputs = hugging.to_dtype(hugging.pixels(), dtype)
        assert model.to(dtype)(inputs).dtype == dtype
        assert SEPARATE in ops_run(lambda inputs=inputs: model(inputs))


def test_state_dicts_go_both_ways() -> None:
    for build, make, _, _ in MODELS.values():
        model, plain, inputs = build(), build(), make()
        swap(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
            plain.load_state_dict(model.state_dict(), strict=True)
            torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-4, atol=1e-4)
            model.load_state_dict(build().state_dict(), strict=True)
            torch.testing.assert_close(model(inputs), build()(inputs), rtol=1e-4, atol=1e-4)


def test_an_optimizer_made_before_the_swap_keeps_working() -> None:
    model, plain = hugging.dinov3().train(), hugging.dinov3().train()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, plain)]
    swap(model)
    for _ in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            m(hugging.pixels()).square().mean().backward()
            optimizer.step()
    moved = plain.state_dict()
    assert any((moved[key] - value).abs().max() > 1e-3 for key, value in hugging.dinov3().state_dict().items())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, moved[key], rtol=1e-3, atol=1e-4)


def _hooked(layer: nn.Module, fired: list[str]) -> None:
    for name in ("", "q_proj", "k_proj", "v_proj", "out_proj"):
        module = layer.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(f"pre {name}"))
        module.register_forward_hook(lambda *_, name=name: fired.append(f"forward {name}"))
        module.register_full_backward_hook(lambda *_, name=name: fired.append(f"backward {name}"))


def test_hooks_fire_in_the_same_order() -> None:
    orders: list[list[str]] = []
    for swapped in (False, True):
        model, fired = hugging.siglip(), []
        _hooked(attentions(model)[1], fired)
        if swapped:
            swap(model)
        inputs = hugging.pixels()
        model(inputs).sum().backward()
        orders.append(fired)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 15
    assert SEPARATE in ops_run(lambda: model(inputs))


def test_a_hook_on_an_eager_layer_sees_its_weights() -> None:
    model = hugging.vit()
    model.model.set_attn_implementation("eager")
    model.model(**hugging.pixels(), output_hidden_states=True)  # transformers' own hooks, which stay
    swap(model)
    seen: list[Tensor] = []
    attentions(model)[0].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with pytest.warns(UserWarning, match=r"a hook may read the attention weights") as caught:
        model(hugging.pixels())
    assert len(caught) == 1
    assert (seen[0].sum(-1) - 1).abs().max() < 1e-5
    assert SEPARATE in ops_run(lambda: model(hugging.pixels()))
    assert "a hook may read the attention weights that eager attention returns" in str(swap(model))


def test_hidden_states_are_recorded() -> None:
    model = hugging.clip_vision()
    expected = model.model(**hugging.pixels(), output_hidden_states=True).hidden_states
    swap(model)
    actual = model.model(**hugging.pixels(), output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == DEPTH + 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert SEPARATE in ops_run(lambda: model.model(**hugging.pixels(), output_hidden_states=True))


def test_gradient_checkpointing() -> None:
    model = hugging.dinov2().train()
    swap(model)
    expected = forward_backward(model, hugging.pixels())
    model.model.gradient_checkpointing_enable()
    for key, value in forward_backward(model, hugging.pixels()).items():
        torch.testing.assert_close(value, expected[key], msg=lambda m, key=key: f"{key}: {m}")


def test_eager_attention_knows_no_causal_flag() -> None:
    model = hugging.vit()
    tokens, layer = hugging.normal(2, 37, 96), attentions(model)[0]
    for implementation in ("eager", "sdpa"):
        unswap(model)
        model.model.set_attn_implementation(implementation)
        expected = layer(tokens, is_causal=True)[0]
        swap(model)
        torch.testing.assert_close(layer(tokens, is_causal=True)[0], expected, rtol=1e-4, atol=1e-4)
        differs = (expected - layer(tokens, is_causal=False)[0]).abs().max() > 0.01
        assert differs == (implementation == "sdpa")
