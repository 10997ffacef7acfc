"""A profile with a base: `base = "dgx-h100"` and what differs from it.

What a profile does not say is that of its base. A data sheet is of one device: that of another is given whole. A number
that was measured on one card says nothing sure of another: where the device differs, every coefficient of the base is
`inherited`, whatever block of the base it stood in, and has no held-out error any more; rates of kernels from memory
keep their share of its bandwidth. The same holds for the curves of a level that differs:

- Where their rate differs, `[[scaled]]` has to say what becomes of the curves; no factor is guessed.
- A factor is one of bandwidth. A message of a curve takes latency + (time - latency) / scale, so that long ones have
  `scale` times the bus bandwidth and short ones the latency that they had.
- Sends by channels have `scale` times the rate of the link, and that of a channel up to it: a channel is a block of an
  SM, whatever the links.
- Rates of libraries that dispatch tokens to experts are of the links that they were measured on, and of no others.
- Curves of more ranks than a node has are kept: they describe fewer ranks too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from spsim.errors import InputError, first_problem
from spsim.inputs.collective_curves import CollectiveCurve, CollectiveName
from spsim.inputs.hardware import Datasheet, HardwareProfile, Leaf, Level, leaves
from spsim.inputs.quantities import Number, Provenance

BLOCKS = ("calibrated", "assumed", "inherited")
"""Of coefficients, in the file of a profile."""
WHOLE = ("peak_tflops", "topology")
"""Tables of a data sheet that say what there is: given, they take the place of the base's as a whole."""
OF_LEVELS = ("collectives", "sends", "between_nodes")
"""Tables of coefficients by level."""


class ScaledCurves(Provenance):
    """What the bandwidth of curves of the base is multiplied by."""

    level: str
    collective: CollectiveName | None = None
    """All of the level, unless given; what is said of one goes before what is said of all."""
    scale: Annotated[Number, Field(ge=1e-3, le=1e3)]


_SCALED = TypeAdapter(list[ScaledCurves])


def bus_factor(collective: str, ranks: int) -> float:
    """Bus bandwidth x time / message, as nccl-tests define it: what one rank sends of a message."""
    if collective == "send_receive":
        return 1.0
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks


def is_leaf(value: Any) -> bool:
    """Whether a value of a profile's file is a number with its source, or curves, and no table of such."""
    return not isinstance(value, dict) or "source" in value or "value" in value


def leaf_paths(block: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted paths of all that a block of a profile's file says."""
    paths: list[str] = []
    for key, value in block.items():
        paths += [f"{path}{key}"] if is_leaf(value) else leaf_paths(value, f"{path}{key}.")
    return paths


def tables_of(profile: HardwareProfile) -> dict[str, Any]:
    """The tables of a profile's file, without a base: `profiles.parse_profile` makes the same profile of them."""
    left_out = {"coefficients", "assumed", "inherited", "fitted_on"}
    tables = profile.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
    for path, leaf in leaves(profile.coefficients):
        _put(tables, f"{_block_of(profile, path)}.{path}", _plain(leaf))
    return tables


def _block_of(profile: HardwareProfile, path: str) -> str:
    return next((block for block in BLOCKS[1:] if path in getattr(profile, block)), BLOCKS[0])


def _put(tables: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        tables = tables.setdefault(name, {})
    tables[last] = value


def _plain(leaf: Leaf) -> Any:
    if isinstance(leaf, tuple):
        return [_plain(curve) for curve in leaf]
    plain = leaf.model_dump(mode="json", exclude_defaults=True)
    return {name: plain.pop(name) for name in ("algorithm", "source") if name in plain} | plain


def with_base(tables: Mapping[str, Any], base: HardwareProfile, where: str) -> dict[str, Any]:
    """The tables of a profile, completed by its base; `InputError` where a curve would have to be guessed."""
    return _Heir(tables, base, where).tables()


class _Heir:
    """A profile in the making: what it says itself, and its base."""

    def __init__(self, tables: Mapping[str, Any], base: HardwareProfile, where: str) -> None:
        self.own = {name: value for name, value in tables.items() if name not in ("base", "scaled")}
        self.base = base
        self.where = where
        self.other_device = False
        self.sheet = self._sheet(self.own.get("datasheet", {}))
        self.levels = dict(_levels(self.sheet))
        self.scaled = self._scaled(tables.get("scaled", []))
        self.given = {path for block in BLOCKS for path in leaf_paths(self._block(block))}
        self.sources = dict(base.sources)

    def tables(self) -> dict[str, Any]:
        """With every coefficient and figure of the base that it does not have itself."""
        found = {**self.own, "datasheet": self.sheet}
        found |= {block: _over({}, self._block(block)) for block in BLOCKS if block in self.own}
        for path, leaf in leaves(self.base.coefficients):
            if not self._is_given(path):
                self._inherit(found, path, leaf)
        found["sources"] = self._all_sources()
        return found

    def _sheet(self, given: Any) -> Any:
        """The data sheet: of another device as it is given, else the base's with what is given."""
        if not isinstance(given, dict):
            return given
        sheet = self.base.datasheet.model_dump(mode="json", exclude_defaults=True)
        self.other_device = given.get("device", sheet["device"]) != sheet["device"]
        if not self.other_device:
            return _over(sheet, given)
        own = {path.partition(".")[0] if path.startswith(WHOLE) else path for path in leaf_paths(given)}
        needed = dict.fromkeys(path.partition(".")[0] if path.startswith(WHOLE) else path for path in leaf_paths(sheet))
        optional = [name for name, field in Datasheet.model_fields.items() if not field.is_required()]
        missing = [path for path in needed if path not in own and path not in optional]
        if missing:
            raise InputError(
                f"{self.where}: datasheet: {given['device']!r} is another device than {sheet['device']!r} of "
                f"{self.base.name}, whose figures are not its own; give {', '.join(missing)}"
            )
        return given

    def _block(self, name: str) -> dict[str, Any]:
        block = self.own.get(name, {})
        if not isinstance(block, dict):
            raise InputError(f"{self.where}: {name}: must be a table of coefficients")
        return block

    def _is_given(self, path: str) -> bool:
        """Whether the profile says it itself, or in another form: sends by a curve, or by their channels."""
        table, _, rest = path.partition(".")
        level, _, name = rest.partition(".")
        if table == "sends":
            return path in self.given or f"collectives.{level}.send_receive" in self.given
        if table == "collectives" and name == "send_receive":
            return path in self.given or any(given.startswith(f"sends.{level}.") for given in self.given)
        return path in self.given

    def _inherit(self, found: dict[str, Any], path: str, leaf: Leaf) -> None:
        """Put what the base says at a path into the block where it belongs."""
        table, _, rest = path.partition(".")
        level = rest.partition(".")[0] if table in OF_LEVELS else None
        if level is not None and level not in self.levels:
            return
        if table == "dispatchers" and ".levels." in path:
            over = path.split(".")[3]
            if over not in self.levels or self._differs(over):
                return
        if level is not None and self._differs(level):
            leaf = self._carried(path, level, leaf)
        elif not self.other_device:
            _put(found, f"{_block_of(self.base, path)}.{path}", _plain(leaf))
            return
        elif path.endswith(".memory_gb_per_s"):
            leaf = self._of_memory(leaf)
        _put(found, f"inherited.{path}", _unproven(_plain(leaf)))

    def _of_memory(self, leaf: Any) -> Leaf:
        """The rate of a kernel from the memory, with the share of the bandwidth that it has in the base."""
        ours, theirs = self._memory_bandwidth(), self.base.datasheet.memory.bandwidth_gb_per_s.value
        if ours is None or ours == theirs:
            return leaf  # type: ignore[no-any-return]
        key = f"{leaf.source}-share"
        self.sources[key] = f"As {leaf.source} of {self.base.name}, at the same share of the memory bandwidth"
        return leaf.model_copy(update={"value": round(leaf.value * ours / theirs, 1), "source": key})  # type: ignore[no-any-return]

    def _memory_bandwidth(self) -> float | None:
        """GB/s; None where it is not as it should be, which whoever reads the profile will say."""
        try:
            return float(self.sheet["memory"]["bandwidth_gb_per_s"]["value"])
        except (KeyError, TypeError, ValueError):
            return None

    def _differs(self, level: str) -> bool:
        """Whether the level is not as in the base, or its curves are scaled."""
        ours, theirs = self.levels[level], self._theirs(level)
        traits = [(level.kind, level.gpus, level.adapter_bandwidth) for level in (ours or theirs, theirs)]
        return traits[0] != traits[1] or any(name == level for name, _ in self.scaled)

    def _theirs(self, level: str) -> Level:
        return next(found for found in self.base.datasheet.topology if found.name == level)

    def _carried(self, path: str, level: str, leaf: Leaf) -> Leaf:
        """Curves, or coefficients of sends, as the links of the profile let them be."""
        table, _, rest = path.partition(".")
        name = rest.partition(".")[2]
        collective = {"collectives": name, "sends": "send_receive"}.get(table)
        scale = self.scaled.get((level, collective)) or self.scaled.get((level, None))
        ours, theirs = self.levels[level], self._theirs(level)
        if scale is None and ours is not None and ours.adapter_bandwidth != theirs.adapter_bandwidth:
            raise InputError(
                f"{self.where}: level {level!r} has {ours.adapter_bandwidth / 1e9:g} GB/s and {self.base.name} "
                f"{theirs.adapter_bandwidth / 1e9:g}, at which {path} was measured; give it, or [[scaled]] with "
                f"level = {level!r} and, for instance, scale = {ours.adapter_bandwidth / theirs.adapter_bandwidth:.3g}"
            )
        if scale is None:
            return leaf
        if isinstance(leaf, tuple):
            return tuple(self._scaled_curve(curve, collective or name, scale) for curve in leaf)
        return self._scaled_rate(table, name, level, leaf, scale)

    def _scaled_curve(self, curve: Any, collective: str, scale: ScaledCurves) -> CollectiveCurve:
        """Of each message, latency + (time - latency) / scale."""
        points = []
        for size, bandwidth in curve.points:
            wire = bus_factor(collective, curve.ranks) * size
            time = wire / bandwidth
            latency = min(curve.latency_us * 1e3, time)
            points.append((size, round(wire / (latency + (time - latency) / scale.scale), 4)))
        update = {"points": tuple(points), "source": self._product(curve.source, scale)}
        scaled: CollectiveCurve = curve.model_copy(update=update)
        return scaled

    def _scaled_rate(self, table: str, name: str, level: str, leaf: Any, scale: ScaledCurves) -> Provenance:
        """The rate of links and adapters times the scale, and that of channels of a send up to that."""
        value = leaf.value
        if name == "link_gb_per_s" or name.startswith("adapter_gb_per_s."):
            value *= scale.scale
        elif table == "sends" and name.endswith("channel_gb_per_s"):
            value = min(value, self.base.coefficients.sends[level].link_gb_per_s.value * scale.scale)
        if value == leaf.value:
            return leaf  # type: ignore[no-any-return]
        update = {"value": round(value, 4), "source": self._product(leaf.source, scale)}
        return leaf.model_copy(update=update)  # type: ignore[no-any-return]

    def _product(self, source: str, scale: ScaledCurves) -> str:
        """The key of the source of a scaled number, which names both."""
        key = f"{source}-times-{scale.source}"
        self.sources[key] = f"As {source} of {self.base.name}, bandwidth times {scale.scale:g}: {scale.source}"
        return key

    def _scaled(self, entries: Any) -> dict[tuple[str, str | None], ScaledCurves]:
        try:
            read = _SCALED.validate_python(entries)
        except ValidationError as error:
            raise first_problem(error, f"{self.where}: scaled") from None
        found: dict[tuple[str, str | None], ScaledCurves] = {}
        for entry in read:
            if (entry.level, entry.collective) in found:
                raise InputError(
                    f"{self.where}: scaled: {entry.level} {entry.collective or ''} is there twice; keep one"
                )
            self._check_scaled(entry)
            found[entry.level, entry.collective] = entry
        return found

    def _check_scaled(self, entry: ScaledCurves) -> None:
        known = [level.name for level in self.base.datasheet.topology if level.name in self.levels]
        if entry.level not in known:
            raise InputError(
                f"{self.where}: scaled: level {entry.level!r} is not in both profiles; use one of {', '.join(known)}"
            )
        if entry.source not in {*self.base.sources, *self.own.get("sources", {})}:
            raise InputError(
                f"{self.where}: scaled: source {entry.source!r} is not in [sources]; add the citation there"
            )

    def _all_sources(self) -> Any:
        own = self.own.get("sources", {})
        if not isinstance(own, dict):
            return own
        for key, text in own.items():
            if self.sources.get(key, text) != text:
                raise InputError(
                    f"{self.where}: sources.{key}: {self.base.name} has another source of this name; call it otherwise"
                )
        return {**self.sources, **own}


def _over(below: Mapping[str, Any], above: Any) -> Any:
    """Tables with what is given above in the place of what is below, number by number."""
    if not isinstance(above, dict):
        return above
    found = dict(below)
    for name, value in above.items():
        under = found.get(name)
        inner = not is_leaf(value) and name not in WHOLE
        found[name] = _over(under if isinstance(under, dict) else {}, value) if inner else value
    return found


def _levels(sheet: Any) -> Iterator[tuple[str, Level | None]]:
    """The levels by name; None for one that is not as it should be, which whoever reads the profile will say."""
    topology = sheet.get("topology", ()) if isinstance(sheet, dict) else ()
    for table in topology if isinstance(topology, Sequence) else ():
        name = table.get("name") if isinstance(table, dict) else None
        if isinstance(name, str):
            try:
                yield name, Level.model_validate(table)
            except ValidationError:
                yield name, None


def _unproven(value: Any) -> Any:
    """Without what a calibration of another card says of its error."""
    if isinstance(value, list):
        return [_unproven(item) for item in value]
    return {name: item for name, item in value.items() if name not in ("held_out_error_percent", "flagged")}
