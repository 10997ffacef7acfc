"""From the raw file of a calibration to a complete profile: a function of its rows and the base alone.

The simulator's own formulas are fitted, class by class in the order in which they need each other:
memory-bound kernels, matrix products and attention (which may take the time of their memory
traffic), then collectives. What was not measured comes from the base and stands where it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile, Leaf, leaves
from spsim.inputs.inheritance import tables_of
from spsim.inputs.kernel_coefficients import PickedKernel
from spsim.inputs.profiles import parse_profile
from spsim.inputs.quantities import Provenance
from spsim.measuring.calibrate.attention_fit import fit_attention
from spsim.measuring.calibrate.coefficients import leaf_at, with_leaves, without_unknown
from spsim.measuring.calibrate.collective_fit import PENDING, check_over_nodes, fit_collectives
from spsim.measuring.calibrate.datasheet import datasheet_for
from spsim.measuring.calibrate.kernel_fit import Fit
from spsim.measuring.calibrate.nccl_tests import Logs
from spsim.measuring.calibrate.outcome import ClassFit, FittedProfile
from spsim.measuring.calibrate.product_fit import fit_gemm
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import timed
from spsim.measuring.calibrate.solver import rounded
from spsim.measuring.calibrate.traffic_fit import fit_memory_bound
from spsim.measuring.processes.matching import describes_cpu, is_same_device
from spsim.units import MIB

CLASSES: Mapping[str, Callable[[Sequence[Measurement], HardwareProfile], Fit]] = {
    "memory-bound": fit_memory_bound,
    "gemm": fit_gemm,
    "attention": fit_attention,
    "collectives": fit_collectives,
}
"""What is fitted, in order; the names are those of the sources in the profile."""
HIGHEST_SLOWDOWN = 0.99
"""A product that stands still beside a collective still has a rate."""


@dataclass
class _Draft:
    """A profile in the making."""

    profile: HardwareProfile
    date: str
    sources: dict[str, str] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    """Dotted paths that no longer come from the base."""
    by: str = "Measured by spsim calibrate"

    def cite(self, topic: str, text: str) -> str:
        """The key of a source."""
        key = f"calibrate-{topic}"
        self.sources[key] = f"{self.by} on {self.date}: {text}"
        return key

    def take(self, fit: Fit, topic: str) -> None:
        """Coefficients of classes fitted together, with the error of the class; of the worst where several share."""
        self.profile = fit.profile
        if not fit.classes:
            return
        source = self.cite(topic, _rows_text(fit.classes))
        for fitted in sorted(fit.classes, key=lambda c: c.errors.p90 if c.errors else 0.0):
            changes = fitted.provenance(source)
            self.profile = with_leaves(
                self.profile, {path: _sourced(leaf_at(self.profile, path), changes) for path in fitted.paths}
            )
            self.measured |= set(fitted.paths)

    def put(self, path: str, value: float, topic: str, text: str) -> None:
        """One number that was measured by itself."""
        update = {"value": value, "source": self.cite(topic, text), "held_out_error_percent": None, "flagged": False}
        self.profile = with_leaves(self.profile, {path: leaf_at(self.profile, path).model_copy(update=update)})
        self.measured.add(path)


def _sourced(leaf: Leaf, changes: Mapping[str, object]) -> Leaf:
    if isinstance(leaf, Provenance):
        return leaf.model_copy(update={**changes, "fitted_on": ()})
    return tuple(curve.model_copy(update=changes) if curve.source == PENDING else curve for curve in leaf)


def _rows_text(classes: Sequence[ClassFit]) -> str:
    parts = [f"{fitted.name}, {len(fitted.measured)} rows" for fitted in classes]
    return "; ".join(parts)


def fit_profile(measurements: Sequence[Measurement], base: HardwareProfile, name: str) -> FittedProfile:
    """The profile that describes the measurements, completed by `base`.

    Of rows that measure the same the last counts. Raises `InputError` where nothing usable was measured, or where
    the base is of another device.
    """
    measurements = list({row.key: row for row in measurements}.values())
    environment = {row.name: row.text for row in measurements if row.kind == "environment" and row.text}
    base = base.eager  # what is measured are kernels of torch
    start, raised = datasheet_for(measurements, base)
    draft = _Draft(start, environment.get("date", base.as_of))
    _start_of_a_kernel(measurements, draft)
    classes: list[ClassFit] = []
    for topic, fit_class in CLASSES.items():
        fit = fit_class(measurements, draft.profile)
        draft.take(fit, topic)
        classes += fit.classes
    draft.profile = without_unknown(draft.profile, start)
    _measured_by_themselves(measurements, draft)
    _picked_kernel(environment, draft)
    if not draft.measured:
        raise InputError("no measurement has a result; run calibrate again, or give another raw file")
    composed = check_over_nodes(measurements, draft.profile)
    classes += [composed] if composed else []
    kept = tuple(path for path, _ in leaves(draft.profile.coefficients) if path not in draft.measured)
    profile = _finished(draft, base, name, environment, kept)
    return FittedProfile(
        profile, base.name, tuple(classes), kept, tuple(_notes(measurements, base.name, raised, classes))
    )


def fit_logs(logs: Logs, base: HardwareProfile, name: str, date: str) -> FittedProfile:
    """The base with the curves of nccl-tests in the place of its own, where they are of its device; `date` is when they
    were read. The time is the library's alone, so what a framework adds stays that of the base.
    """
    if not is_same_device(logs.device, base.datasheet.device):
        raise InputError(
            f"calibrate: the logs are of {logs.device}, but {base.name} is of {base.datasheet.device}; give as "
            "--base a profile of that device, which may have another as its own base"
        )
    rows = logs.on(base)
    start, _ = datasheet_for(rows, base)
    draft = _Draft(start, date, by="Out-of-place times of nccl-tests, read by spsim calibrate")
    fit = fit_collectives(rows, start)
    draft.take(fit, "nccl-tests")
    composed = check_over_nodes(rows, draft.profile)
    kept = tuple(path for path, _ in leaves(draft.profile.coefficients) if path not in draft.measured)
    environment = {**base.provenance, "device": logs.device, "nccl": logs.nccl}
    profile = _finished(draft, base, name, {key: text for key, text in environment.items() if text}, kept)
    curves = tuple(path for path in kept if path.startswith(("collectives.", "sends.")))
    note = f"all but collectives is as in {base.name}"
    return FittedProfile(profile, base.name, (*fit.classes, *([composed] if composed else [])), curves, (note,))


def _start_of_a_kernel(rows: Sequence[Measurement], draft: _Draft) -> None:
    """What every kernel takes at least: the fastest of those too small to take time; more is its own start."""
    times = {row.name: row.time_us for row in timed(rows, "launch") if row.time_us}
    in_stream = [time for name, time in times.items() if name.startswith("stream")]
    if in_stream:
        listed = ", ".join(f"{name.replace('_', ' ')} {time:.3g} us" for name, time in times.items())
        text = f"kernels of 8 x 8 elements, of which the fastest in a busy stream counts: {listed}"
        draft.put("kernel_overhead_us", rounded(min(in_stream)), "kernel-start", text)


def _measured_by_themselves(rows: Sequence[Measurement], draft: _Draft) -> None:
    """What is a number and not a time: interference, memory, and the start of a collective."""
    lost = _values(rows, "interference", "gemm_beside")
    if lost:
        share = min(max(float(np.median(lost)), 0.0), HIGHEST_SLOWDOWN)
        listed = ", ".join(f"{value:.2f}" for value in lost)
        draft.put("overlap_slowdown", rounded(share), "interference", f"a product beside collectives loses {listed}")
    for name in ("context", "communicator"):
        sizes = _values(rows, "memory", name)
        if sizes:
            mib = rounded(float(np.median(sizes)) / MIB)
            draft.put(f"memory.{name}_mib", mib, f"{name}-memory", "device memory before and after")
    if timed(rows, "collective"):
        text = "collectives were timed through torch, both hand-overs between streams included"
        draft.put("collective_overhead_us", 0.0, "collective-start", text)


def _picked_kernel(environment: Mapping[str, str], draft: _Draft) -> None:
    """Which attention kernel torch runs by itself, where the session says so and the profile knows the kernel."""
    kernel = environment.get("attention_kernel", "")
    if kernel in draft.profile.coefficients.attention:
        source = draft.cite("attention-kernel", "which kernel torch picks for attention by itself")
        leaf = PickedKernel(kernel=kernel, source=source)
        draft.profile = with_leaves(draft.profile, {"attention_picked.torch": leaf})
        draft.measured.add("attention_picked.torch")


def _values(rows: Iterable[Measurement], kind: str, name: str) -> list[float]:
    """Results that are not times, of rows whose name begins so."""
    found = (row for row in rows if row.kind == kind and row.name.startswith(name) and not row.skipped)
    return [row.value for row in found if row.value is not None]


def _finished(
    draft: _Draft, base: HardwareProfile, name: str, environment: Mapping[str, str], kept: Sequence[str]
) -> HardwareProfile:  # fmt: skip
    """The profile as it is read back from its file: checked whole, with the sources that it cites."""
    profile = draft.profile.model_copy(
        update={
            "name": name,
            "description": f"Calibrated on {environment.get('device', base.datasheet.device)}; base {base.name}",
            "as_of": draft.date,
            "provenance": {**environment, "base": f"{base.name}, as of {base.as_of}", **_from_base(kept)},
            "sources": {**draft.profile.sources, **draft.sources},
            **_unmeasured(base, environment.get("device", ""), kept),
        }
    )
    tables = tables_of(profile)
    cited = set(_cited(tables))
    tables["sources"] = {key: text for key, text in profile.sources.items() if key in cited}
    return parse_profile(tables, name)


def _unmeasured(base: HardwareProfile, device: str, kept: Sequence[str]) -> dict[str, frozenset[str]]:
    """What nobody measured on the device: that of a base of another card is inherited as a whole."""
    if device and not describes_cpu(base) and not is_same_device(device, base.datasheet.device):
        return {"assumed": frozenset(), "inherited": frozenset(kept)}
    return {
        "assumed": frozenset(path for path in kept if _is_assumed(_in_base(path), base)),
        "inherited": frozenset(path for path in kept if _in_base(path) in base.inherited),
    }


def _is_assumed(path: str, base: HardwareProfile) -> bool:
    """Whether a coefficient of the base is; one that the base does not have was begun with that of another kernel."""
    return path in base.assumed or leaf_at(base, path) is None


def _from_base(kept: Sequence[str]) -> dict[str, str]:
    """The levels whose collectives nobody measured here, for the provenance; empty where all were."""
    parts = [path.split(".") for path in kept if path.startswith(("collectives.", "sends."))]
    levels: dict[str, dict[str, None]] = {}
    for table, level, name, *_ in parts:
        levels.setdefault(level, {})["send_receive" if table == "sends" else name] = None
    text = "; ".join(f"{level}: {', '.join(names)}" for level, names in levels.items())
    return {"collectives_from_base": text} if text else {}


def _in_base(path: str) -> str:
    """Where a coefficient that was not measured stands in the base: curves of a data type begin as a copy."""
    own, _, rest = path.partition(".")
    return f"attention.{rest.partition('.')[2]}" if own == "attention_by_dtype" else path


def _cited(value: object) -> Iterable[str]:
    if isinstance(value, dict):
        if isinstance(value.get("source"), str):
            yield value["source"]
        for item in value.values():
            yield from _cited(item)
    elif isinstance(value, list):
        for item in value:
            yield from _cited(item)


def _notes(
    rows: Sequence[Measurement], base: str, raised: Sequence[str], classes: Sequence[ClassFit]
) -> Iterator[str]:  # fmt: skip
    """What a reader of the report must know."""
    if raised:
        yield f"measured above the datasheet of {base}, and put in its place: {', '.join(raised)}"
    fitted = {path for fit in classes for path in fit.paths}
    left_out = dict.fromkeys(row.operator_class for row in timed(rows, "memory_bound"))
    for name in (name for name in left_out if f"memory_bound.{name}" not in fitted):
        yield f"{name} is not fitted: no kernel of it moves more than the last-level cache, and {base} has no figure"
    skipped = [f"{row.kind} {row.name}: {row.skipped}" for row in rows if row.skipped]
    if skipped:
        yield f"{len(skipped)} measurements were skipped, such as {skipped[0]}"
