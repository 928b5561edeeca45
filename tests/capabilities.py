"""Programs that run in one of the instruction sets of the ``cpu`` backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def run_in(capability: str, code: str) -> None:
    """Run a program in this instruction set, which it cannot change once it has chosen one."""
    from fastvit import _C

    if not dict(_C.cpu_capabilities()).get(capability):
        pytest.skip(f"this build or this processor has no {capability}")
    code = (
        "import torch, fastvit._C as C\n"
        "from fastvit.testing import *\n"
        f"assert C.cpu_capability() == {capability!r}\n"
        f"{code}"
        "print('held')\n"
    )
    environment = {**os.environ, "FASTVIT_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.stdout == "held\n", result.stderr
