"""The choice of the instruction set: all give the same results."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

core = pytest.importorskip("bdprune._core", reason="the native core is not built")

# Error bound of sums of 32 float32 products, relative to the norm: five roundings.
FLOAT_RUNS = 3e-7

ISA_SCRIPT = """
import sys
import numpy as np
from bdprune import _core
x = np.random.default_rng(0).standard_normal((21, 20, 9)).astype(np.float32)
m = np.random.default_rng(1).standard_normal((2, 40, 30)).astype(np.float32)
np.savez(sys.argv[1], isa=_core.isa(), norms=_core.spectral_norms(x, "float32", 21, 20, 9),
         wide=_core.spectral_norms(x.astype(np.float64), "float64", 21, 20, 9),
         cross=_core.channel_moments(m, np.zeros(40))[0])
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_results(isa: str, tmp_path: os.PathLike[str]) -> None:
    out = os.path.join(tmp_path, "out.npz")
    subprocess.run([sys.executable, "-c", ISA_SCRIPT, out], check=True, env={**os.environ, "BDPRUNE_ISA": isa})
    result = np.load(out)
    if core.isa() == "avx512":
        assert result["isa"] == isa
    x = np.random.default_rng(0).standard_normal((21, 20, 9)).astype(np.float32)
    m = np.random.default_rng(1).standard_normal((2, 40, 30)).astype(np.float32)
    assert result["norms"] == pytest.approx(core.spectral_norms(x, "float32", 21, 20, 9), rel=FLOAT_RUNS)
    wide = core.spectral_norms(x.astype(np.float64), "float64", 21, 20, 9)
    assert result["wide"] == pytest.approx(wide, rel=1e-14)
    assert np.abs(result["cross"] - core.channel_moments(m, np.zeros(40))[0]).max() <= 1e-4
