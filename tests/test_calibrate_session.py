"""What a calibration does with its time and its raw file, with measurements that are made up."""

import errno
import time
from contextlib import nullcontext

import pytest

from spsim.errors import InputError
from spsim.inputs.profiles import load_profile
from spsim.measuring.calibrate import session as module
from spsim.measuring.calibrate.records import Measurement, read_measurements
from spsim.measuring.calibrate.session import (
    Note,
    Progress,
    RawFile,
    Section,
    Session,
    Settings,
    environment_rows,
    expected_seconds,
    sections,
    time_limit,
    title,
)
from spsim.measuring.calibrate.shapes import flash_attention, linear
from tests.test_calibrate_catalogue import CPU, machine

PROFILE = load_profile("cpu-2")
ENVIRONMENT = environment_rows({"device": "one CPU", "torch": "2.13.0"})
ROWS = [row for size in (64, 128, 256) for row in linear("fp32", size, size, size)]


def run(settings, rows=ROWS, *, measure=None, environment=ENVIRONMENT):
    """One session over made-up measurements: what it measured, and what it reported."""
    measured, reports = [], []

    def default(row):
        measured.append(row)
        return row.model_copy(update={"time_us": 1.0})

    raw = RawFile(settings.file, environment)
    session = Session(settings, PROFILE, raw, reports.append, lambda row: nullcontext())
    session.run([Section(rows, 1.0)], measure or default)
    return measured, reports


@pytest.fixture
def settings(tmp_path):
    return Settings(raw=tmp_path, quick=True)


def test_rows_are_written_as_they_are_made_and_a_rerun_has_nothing_to_do(settings):
    def measure(row):
        assert len(read_measurements(settings.file)) == len(ENVIRONMENT) + len(seen)
        seen.append(row)
        return row.model_copy(update={"time_us": 2.5})

    seen = []
    run(settings, measure=measure)
    saved = read_measurements(settings.file)
    assert [row.key for row in saved[len(ENVIRONMENT) :]] == [row.key for row in seen]
    assert {row.key for row in seen} == {row.key for row in ROWS}
    assert run(settings)[0] == []
    assert read_measurements(settings.file) == saved


def test_a_rerun_measures_what_is_missing_also_of_a_line_that_was_cut(settings):
    run(settings)
    text = settings.file.read_bytes()
    settings.file.write_bytes(text[:-5])
    last = read_measurements(settings.file)[-1]
    measured, _ = run(settings)
    assert len(measured) == 1
    assert measured[0].key != last.key
    assert settings.file.read_bytes() == text


@pytest.mark.parametrize("kept", [0, 7])
def test_a_file_that_was_cut_in_its_header_begins_anew(settings, kept):
    run(settings)
    settings.file.write_bytes(settings.file.read_bytes()[:kept])
    assert len(run(settings)[0]) == len(ROWS)
    assert len(read_measurements(settings.file)) == len(ENVIRONMENT) + len(ROWS)


def test_what_failed_is_named_and_tried_again_after_all_else(settings):
    def measure(row):
        return row.model_copy(update={"skipped": "out of memory"} if row == ROWS[0] else {"time_us": 1.0})

    _, reports = run(settings, ROWS[:3], measure=measure)
    assert [note.text for note in reports if isinstance(note, Note)] == [f"skipped: {title(ROWS[0])}: out of memory"]
    measured, _ = run(settings)
    assert measured[-1] == ROWS[0]
    assert {row.key for row in measured} == {row.key for row in [ROWS[0], *ROWS[3:]]}
    assert run(settings)[0] == []


def test_a_device_that_is_lost_ends_the_run_and_a_rerun_begins_with_the_others(settings):
    def measure(row):
        failed = {"skipped": "CUDA error: an illegal memory access was encountered"}
        return row.model_copy(update=failed if row == ROWS[1] else {"time_us": 1.0})

    with pytest.raises(InputError, match="gemm dgrad fp32 64x64x64: CUDA error: an illegal memory access"):
        run(settings, measure=measure)
    measured, _ = run(settings)
    assert len(measured) > 1
    assert measured[-1] == ROWS[1]


def test_a_product_that_a_library_does_not_support_ends_nothing(settings):
    def measure(row):
        failed = {"skipped": "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic"}
        return row.model_copy(update=failed if row == ROWS[0] else {"time_us": 1.0})

    run(settings, measure=measure)
    assert len(read_measurements(settings.file)) == len(ENVIRONMENT) + len(ROWS)


def test_small_measurements_come_before_large_ones(settings):
    measured, _ = run(settings, list(reversed(ROWS)))
    expected = [expected_seconds(row, PROFILE) for row in measured]
    assert expected == sorted(expected)


def test_the_largest_are_left_out_when_time_is_short_and_a_rerun_measures_them(settings, monkeypatch):
    monkeypatch.setattr(Settings, "budget", 0.5)

    def slow(row):
        time.sleep(0.1)
        measured.append(row)
        return row.model_copy(update={"time_us": 1.0})

    measured = []
    start = time.monotonic()
    _, reports = run(settings, measure=slow)
    assert time.monotonic() - start < 0.8
    assert 1 <= len(measured) < len(ROWS)
    left = [row for row in ROWS if row not in measured]
    (note,) = [note.text for note in reports if isinstance(note, Note)]
    assert note.startswith(f"left out for lack of time ({len(left)})")
    assert note.splitlines()[1:] == [f"  gemm fp32  {len(left):4}"], "a line a class"
    assert max(row.m for row in measured) <= min(row.m for row in left)
    monkeypatch.undo()
    assert {row.key for row in run(settings)[0]} == {row.key for row in left}


def test_time_that_a_section_does_not_need_goes_to_what_another_left_out(settings, monkeypatch):
    monkeypatch.setattr(Settings, "budget", 2.0)
    measured = []

    def measure(row):
        time.sleep(0.05)
        measured.append(row)
        return row.model_copy(update={"time_us": 1.0})

    raw = RawFile(settings.file, ENVIRONMENT)
    session = Session(settings, PROFILE, raw, lambda _: None, lambda row: nullcontext())
    session.run([Section(ROWS[:4], 0.04), Section(ROWS[4:6], 1.0)], measure)
    assert {row.key for row in measured} == {row.key for row in ROWS[:6]}
    assert measured[-1] in ROWS[:4]


def test_progress_counts_and_says_how_long(settings):
    _, reports = run(settings)
    steps = [report for report in reports if isinstance(report, Progress)]
    assert [step.done for step in steps] == list(range(len(ROWS)))
    assert {step.total for step in steps} == {len(ROWS)}
    assert all(0 < step.remaining <= settings.budget for step in steps)
    assert steps[-1].remaining < steps[0].remaining


@pytest.mark.parametrize(("name", "other"), [("device", "another CPU"), ("torch", "2.4.0")])
def test_another_machine_does_not_go_on_with_a_raw_file(settings, name, other):
    run(settings)
    facts = {"device": "one CPU", "torch": "2.13.0", name: other}
    with pytest.raises(InputError, match=f"measured with {name} .*{other}.*give another --raw"):
        run(settings, environment=environment_rows(facts))


def test_a_later_date_does_not_matter(settings):
    run(settings)
    later = [row.model_copy(update={"text": "2099-01-01"}) if row.name == "date" else row for row in ENVIRONMENT]
    assert run(settings, environment=later)[0] == []


def test_a_full_disk_is_one_line_and_what_was_written_stays(settings, monkeypatch):
    written = []

    def append(path, rows):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(rows)
        original(path, rows)

    original = module.append_measurements
    monkeypatch.setattr(module, "append_measurements", append)
    with pytest.raises(InputError, match=r"measurements.csv: cannot be written \(No space left on device\)"):
        run(settings)
    monkeypatch.undo()
    assert len(read_measurements(settings.file)) == len(ENVIRONMENT) + 2
    assert len(run(settings)[0]) == len(ROWS) - 2


def test_a_time_limit_ends_a_block_that_hangs_and_no_other():
    expired = []
    with time_limit(0.05, lambda: expired.append("slow")):
        time.sleep(0.15)
    with time_limit(0.05, lambda: expired.append("fast")):
        pass
    time.sleep(0.1)
    assert expired == ["slow"]


def test_expected_times_are_flops_and_bytes_at_their_peaks():
    forward = next(linear("fp32", 1000, 1000, 1000))
    assert expected_seconds(forward, PROFILE) == pytest.approx(2e9 / 0.2752e12 + 12e6 / 48e9)
    attention = flash_attention(
        "torch_cpu", "bf16", "backward", batch=1, heads=2, kv_heads=2, head_dim=64, tokens=1000, causal=True
    )
    assert expected_seconds(attention, PROFILE) == pytest.approx(
        2.5 * 2 * 1000 * 1000 * 2 * 64 / 0.5504e12 + attention.bytes_moved / 48e9
    )
    message = Measurement(kind="collective", name="all_reduce", level="shared-memory", message_bytes=24_000_000)
    assert expected_seconds(message, PROFILE) == pytest.approx(0.002)


def test_sections_come_in_an_order_that_leaves_each_what_it_needs():
    kinds = [{row.kind for row in section.rows} for section in sections(machine(), quick=True)]
    assert kinds == [
        {"launch", "gemm", "attention", "memory_bound"}, {"memory"}, {"interference"}, {"memory", "collective"}
    ]  # fmt: skip
    shares = [section.share for section in sections(CPU, quick=True)]
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("where", [CPU, machine(ranks=16, nodes=2)], ids=["cpu", "two nodes"])
def test_titles_tell_rows_apart(where):
    rows = [row for section in sections(where, quick=False) for row in section.rows]
    assert len({title(row) for row in rows}) == len(rows)
    assert title(ROWS[0]) == "gemm forward fp32 64x64x64"
