"""Run something as soon as another module has been imported, or now if it has been.

``torch.distributed.tensor`` takes half a second to import and ``torch.utils.flop_counter`` imports Triton, so importing
fastvit imports neither. What fastvit has to tell them must be there before their first use, which may not pass through
any function of ours (a loaded graph calls the ops directly), so it hangs on their import.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` once the module ``name`` is imported; if it raises, warn, and let the import go on."""
    if name in sys.modules:
        _call(name, callback)
    else:
        sys.meta_path.insert(0, _Watcher(name, callback))


class _Watcher(MetaPathFinder):
    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name = name
        self._callback = callback

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        # Whoever asks may only want to know whether the module is there, so this finder stays until it has run.
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = self._then_call_back(spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[assignment]  # on this one loader, not on its class
        return spec

    def _then_call_back(self, exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute(module: ModuleType) -> None:
            exec_module(module)
            if self not in sys.meta_path:
                return
            sys.meta_path.remove(self)
            _call(self._name, self._callback)

        return execute


def _call(name: str, callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception as error:
        warnings.warn(f"fastvit: nothing was registered with {name}: {error}", stacklevel=3)
