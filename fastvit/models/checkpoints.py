"""Load a checkpoint file into a model: all of it, or one clear error and nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model")
PARALLEL_PREFIX = "module."
SUFFIXES = (".safetensors", ".pth", ".pt")
NAMES_IN_A_MESSAGE = 4


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Load the weights in ``path`` into ``model`` in place and return it; keys and shapes must fit exactly.

    Args:
        model: any module; its dtype and device stay, values are converted.
        path: .safetensors, or .pth / .pt read with ``weights_only=True`` (no code in the file is run). A dictionary
            under "state_dict" or "model" is unwrapped, and a "module." before every key is dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or keys or shapes differ; the message names the file and the first keys.
        ImportError: a .safetensors file without the safetensors package.
    """
    path = Path(path)
    weights = _without_prefix(_unwrap(_read(path), path))
    _check_fit(model, weights, path)
    model.load_state_dict(weights, strict=True)
    return model


def _read(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"path: got '{path}', which does not exist; accepted is a file {', '.join(SUFFIXES)}")
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path: got '{path}'; accepted is a file {', '.join(SUFFIXES)}")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler meets arbitrary bytes with arbitrary errors.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"path: '{path}' is not a checkpoint of tensors that torch can read: {reason[0]}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"path: reading '{path}' needs the safetensors package: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"path: '{path}' is not a safetensors file: {error}") from error


def _unwrap(content: Any, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping):
        for wrapper in WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    if not isinstance(content, Mapping):
        raise ValueError(f"path: '{path}' holds a {type(content).__name__}; accepted is a dictionary of tensors")
    if not content:
        raise ValueError(f"path: '{path}' holds no tensors")
    strangers = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers:
        raise ValueError(
            f"path: '{path}' holds entries that are no tensors: {_first(strangers)}; accepted is a dictionary of "
            f"tensors, also under {' or '.join(map(repr, WRAPPERS))}"
        )
    return content


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith(PARALLEL_PREFIX) for key in weights):
        return {key.removeprefix(PARALLEL_PREFIX): value for key, value in weights.items()}
    return dict(weights)


def _check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    # load_state_dict copies what fits before it raises, so everything is checked before the first copy.
    expected = model.state_dict()
    problems = []
    if missing := [key for key in expected if key not in weights]:
        problems.append(f"{len(missing)} keys are missing ({_first(missing)})")
    if unexpected := [key for key in weights if key not in expected]:
        problems.append(f"{len(unexpected)} keys are unexpected ({_first(unexpected)})")
    mismatched = [
        f"{key}: file {tuple(weights[key].shape)}, model {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and isinstance(value, Tensor) and weights[key].shape != value.shape
    ]
    if mismatched:
        problems.append(f"{len(mismatched)} shapes differ ({_first(mismatched)})")
    if problems:
        raise ValueError(f"path: '{path}' does not fit {type(model).__name__}: {'; '.join(problems)}")


def _first(names: Iterable[object]) -> str:
    texts = [str(name) for name in names]
    shown = ", ".join(texts[:NAMES_IN_A_MESSAGE])
    return shown + (", …" if len(texts) > NAMES_IN_A_MESSAGE else "")
