"""A user's microbenchmarks against a profile: what runs by hand, what is refused and what is marked."""

import json
import subprocess
import sys

import pytest

from spsim.costs.kernels import ComputeCost
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile
from spsim.plots.kernels import plot_kernels
from spsim.studies.microbenchmarks import Attention, Product, measured_kernels, summary
from spsim.work import FlashAttention, Gemm
from tests.cases import A100, H100


def file(tmp_path, text):
    path = tmp_path / "measured.csv"
    path.write_text(text)
    return path


def rows(tmp_path, text, hardware=H100, **options):
    return measured_kernels(file(tmp_path, text), load_profile(hardware), "bf16", **options)


@pytest.mark.parametrize(
    ("direction", "sides"), [("forward", (512, 1024, 256)), ("dgrad", (512, 256, 1024)), ("wgrad", (1024, 256, 512))]
)
def test_products_of_a_layer_with_512_rows_256_inputs_and_1024_outputs(direction, sides):
    """Y = X W of 512 x 1024; dX = dY W' of 512 x 256; dW = dY' X of 1024 x 256."""
    row = Product(m=512, n=1024, k=256, direction=direction, time_us=1)
    work = row.work(direction, "bf16")
    assert work == Gemm(*sides, 1, 2 * (512 * 256 + 256 * 1024 + 512 * 1024))
    fp8 = row.work(direction, "fp8")
    assert fp8.bytes_moved == sides[0] * sides[2] + sides[2] * sides[1] + 2 * sides[0] * sides[1]


def test_attention_rows_by_hand():
    """Two times a row; a causal square is charged half; one query on a cache of 4,096 keys sees all of them."""
    square = Attention(heads=8, head_dim=64, tokens=512, causal=True, forward_us=10, backward_us=20)
    assert list(square.times) == [("forward", 10), ("backward", 20)]
    work = square.work("cudnn", "backward", "bf16")
    assert (work.twice_pairs, work.causal, work.bytes_moved) == (512 * 512, True, 2 * 2 * 2 * 64 * 2 * 512 * 8)
    cache = Attention(heads=32, kv_heads=8, head_dim=128, keys=4096, batch=16, time_us=98)
    work = cache.work("flash_attention_2", "forward", "bf16")
    assert (work.queries, work.twice_pairs, work.causal) == (1, 2 * 4096, False)
    assert work.bytes_moved == 2 * 16 * 128 * 2 * (32 + 4096 * 8)


def test_predictions_are_those_of_the_simulator(tmp_path):
    found = rows(tmp_path, "m,n,k,time_us,host\n4096,4096,4096,200,a\n")
    expected = ComputeCost(load_profile(H100), "bf16", burst=True).duration(
        Gemm(4096, 4096, 4096, 1, 3 * 2 * 4096 * 4096)
    )
    (row,) = found
    assert row.predicted_us == pytest.approx(1e6 * expected)
    assert row.to_json()["host"] == "a"
    assert row.error_percent == pytest.approx(100 * (row.predicted_us / 200 - 1))
    errors = summary(found)["gemm"]
    assert (errors.rows, errors.mean_percent) == (1, pytest.approx(abs(row.error_percent)))


def test_the_kernel_of_a_row_is_its_own_else_that_of_torch(tmp_path):
    named, picked, cache = rows(
        tmp_path,
        "kernel,heads,kv_heads,head_dim,tokens,keys,time_us\n"
        "flash_attention_2,32,32,128,4096,,900\n,32,32,128,4096,,400\n,32,8,128,,65536,100\n",
    )
    profile = load_profile(H100)
    assert (named.kernel, picked.kernel) == ("flash_attention_2", "cudnn")
    assert cache.kernel == "flash_attention_2", "cuDNN does not divide the keys of one query"
    assert "fewer KV heads" in cache.note
    cost = ComputeCost(profile, "bf16", burst=True)
    work = FlashAttention(
        "cudnn", "forward", 1, 32, 32, 128, 128, 4096, 4096, 2 * 4096**2, False, 2 * 128 * 2 * 2 * 4096 * 32
    )
    assert picked.predicted_us == pytest.approx(1e6 * cost.duration(work))


def test_sizes_between_measured_ones_are_marked_and_what_cannot_be_is_skipped(tmp_path):
    between, missing = rows(
        tmp_path, "kernel,heads,head_dim,tokens,time_us\n,32,80,4096,400\nflash_attention_3,32,128,4096,400\n", A100
    )
    assert between.note == "head_dim 80 from those of 64, 128"
    assert between.predicted_us is not None
    assert missing.predicted_us is None
    assert "dgx-a100-80gb has no such kernel" in missing.skipped
    assert "error_percent" in missing.to_json()
    assert summary([missing]) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "columns a, b; products have m, n, k, time_us"),
        ("m,n,k,time_us\n", "has no rows"),
        ("m,n,k,time_us\n8,0,8,1\n", "line 2: n: "),
        ("m,n,k,time_us\n8,8,8,1\n8,8,8,-1\n", "line 3: time_us: "),
        ("m,n,k,time_us,direction\n8,8,8,1,sideways\n", "line 2: direction: "),
        ("heads,head_dim,time_us\n8,64,1\n", "give either tokens, or keys"),
        ("heads,head_dim,tokens\n8,64,128\n", "has no time"),
        ("heads,kv_heads,head_dim,tokens,time_us\n8,3,64,128,1\n", "kv_heads = 3 does not divide heads = 8"),
        ("kernel,heads,head_dim,tokens,time_us\nfast,8,64,128,1\n", "line 2: kernel: "),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        rows(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_picture_has_plain_numbers_at_its_ticks(tmp_path):
    """Of one row, too, whose axes span less than a decade."""
    for text in ("4096,4096,4096,210\n", "4096,4096,4096,210\n1,4096,4096,16.6\n8192,8192,8192,1700\n"):
        figure = plot_kernels(rows(tmp_path, f"m,n,k,time_us\n{text}"), title="products")
        figure.canvas.draw()
        (axes,) = figure.axes
        low, high = axes.get_xlim()
        shown = [tick.get_text() for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
        assert shown
        assert all(float(label.replace(",", "")) for label in shown)


@pytest.mark.slow
def test_the_command_prints_and_writes(tmp_path):
    path = file(tmp_path, "m,n,k,time_us\n4096,4096,4096,210\n1,4096,4096,16.6\n")
    command = [sys.executable, "-m", "spsim", "kernels", str(path), "--hardware", H100]
    out = tmp_path / "out"
    done = subprocess.run([*command, "--json", "--out", str(out)], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert [row["measured_us"] for row in document["rows"]] == [210, 16.6]
    assert document["summary"]["gemm"]["rows"] == 2
    assert json.loads((out / "kernels.json").read_text()) == document
    assert (out / "kernels.png").stat().st_size > 10_000
    sustained = subprocess.run([*command, "--sustained"], capture_output=True, text=True, check=True)
    assert "gemm forward" in sustained.stdout
