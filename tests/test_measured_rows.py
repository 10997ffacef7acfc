"""Rows measured on an H100 (experiments/data): what the shipped profile makes of them, and that any can be fitted."""

import numpy as np
import pytest

from spsim.inputs.hardware import leaves
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import data_directory
from spsim.measuring.calibrate.coefficients import leaf_at
from spsim.measuring.calibrate.fit import fit_profile
from spsim.measuring.calibrate.product_fit import fit_gemm
from spsim.measuring.calibrate.records import read_measurements
from spsim.measuring.calibrate.samples import Batch, gemm_samples

pytestmark = pytest.mark.slow

H100 = load_profile("dgx-h100")
DATA = data_directory()
ROWS = read_measurements(DATA / "dgx-h100.csv")


def errors(rows):
    batch = Batch(gemm_samples(rows))
    return np.abs(batch.times(H100) / batch.seconds - 1)


def test_products_that_nothing_was_fitted_on():
    """51 products from 1 x 4096 x 4096 to 16384 x 12288 x 1536, forward and weight gradients."""
    rows = read_measurements(DATA / "dgx-h100_products_held_out.csv")
    assert not {row.key for row in rows} & {row.key for row in ROWS}
    found = errors(rows)
    assert len(found) == 51
    assert found.mean() < 0.04
    assert np.percentile(found, 90) < 0.10


@pytest.mark.parametrize(
    ("accumulated", "dtypes", "most"), [(False, ("bf16", "fp16", "fp8"), 0.04), (True, ("bf16", "fp16"), 0.05)]
)
def test_products_that_the_profile_was_fitted_on(accumulated, dtypes, most):
    """Of 8 bits and of 16, alone and accumulated into fp32 main gradients; torch adds in fp8 by a kernel of its own,
    the profile as Transformer Engine does.
    """
    rows = [r for r in ROWS if r.kind == "gemm" and r.dtype in dtypes and bool(r.accumulated) == accumulated]
    assert errors(rows).mean() < most


def test_the_shipped_numbers_are_those_of_the_rows():
    """A fit that begins with them ends with them."""
    fit = fit_gemm(ROWS, H100)
    paths = {path for one in fit.classes for path in one.paths}
    assert {"gemm.fraction.bf16", "gemm.k_pad_bytes", "gemm.start_us", "gemm.burst_limit.fp8"} <= paths
    for path in paths - {"gemm.accumulation_exposed.fp8", "gemm.accumulation_half_k.fp8"}:
        if path.endswith(("16", "fp8", "_bytes", "_side", "_us")):
            assert leaf_at(fit.profile, path).value == pytest.approx(leaf_at(H100, path).value, rel=0.02), path


@pytest.mark.parametrize(("seed", "number"), [(1, 20), (2, 60)])
def test_any_measured_rows_can_be_fitted(seed, number):
    """Every number has the source that it came from."""
    chosen = sorted(np.random.default_rng(seed).choice(len(ROWS), number, replace=False))
    found = fit_profile([ROWS[index] for index in chosen], H100, "some").profile
    for path, leaf in leaves(found.coefficients):
        for number_ in (leaf,) if not isinstance(leaf, tuple) else leaf:
            assert number_.source in found.sources, path
