"""Perturbations of a step: slow ranks, jitter of kernels, slow or failing links; from TOML, tables or objects.

A factor is of times: 2 takes twice as long, and a link of factor 2 moves half as many bytes a second. What has neither
`from_s` nor `to_s` lasts as long as the step. Times count from the beginning of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, InstanceOf, field_validator, model_validator

from spsim.errors import InputError
from spsim.inputs.configuration import Configuration
from spsim.inputs.resources import read_toml
from spsim.inputs.words import unknown_key

Factor = Annotated[float, Field(gt=0, le=1e6)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Place = Annotated[int, Field(ge=0, lt=2**32)]


def _ranks(value: Any) -> Any:
    """One rank or many as a tuple."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list | range) else value


class Window(Configuration):
    """When a perturbation lasts."""

    from_s: Seconds = 0.0
    to_s: Seconds | None = None
    """The end of the step unless given."""

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.to_s is not None and self.from_s >= self.to_s:
            raise InputError(
                f"{self.called()}: from_s = {self.from_s:g} is not before to_s = {self.to_s:g}; give an earlier from_s"
            )
        return self

    @property
    def lasting(self) -> str:
        """From when to when, for labels; empty of the whole step."""
        end = "" if self.to_s is None else f" to {self.to_s:g} s"
        return "" if self.is_whole else f" from {self.from_s:g} s{end}"

    @property
    def is_whole(self) -> bool:
        """Whether it lasts as long as the step."""
        return self.from_s == 0 and self.to_s is None


class SlowRanks(Window):
    """Ranks whose kernels take longer."""

    ranks: Annotated[tuple[Place, ...], BeforeValidator(_ranks), Field(min_length=1)]
    """Ranks of the plan, from 0: `3`, `[0, 8]` or `range(8)`."""
    factor: Factor

    @classmethod
    def called(cls) -> str:
        """By its key."""
        return "slow ranks"

    @property
    def changes(self) -> bool:
        """Whether it does."""
        return self.factor != 1

    @property
    def label(self) -> str:
        """For tables and pictures."""
        return f"{_named('rank', self.ranks)} × {self.factor:g}{self.lasting}"


class Jitter(Configuration):
    """Times of kernels drawn at random on every rank: factors of mean 1."""

    distribution: Literal["lognormal", "normal", "gamma"]
    """A normal one is cut off at 0."""
    spread: Annotated[float, Field(ge=0, le=10)]
    """Standard deviation over mean of a factor."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    each: Literal["kernel", "rank"] = "kernel"
    """What gets a factor of its own: each run of each kernel on each rank, or each rank for the whole step, as GPUs
    differ in clock.
    """

    @property
    def changes(self) -> bool:
        """Whether it does."""
        return self.spread > 0

    @property
    def label(self) -> str:
        """For tables and pictures."""
        return f"{self.distribution} jitter of {100 * self.spread:g} % of each {self.each}"


class Link(Configuration):
    """One link of a node: a network adapter, or the port of a GPU to the others of its node."""

    node: Place
    adapter: Place | None = None
    """Of the node, from 0; all of them unless an adapter or a GPU is named."""
    gpu: Place | None = None
    """Of the node, from 0."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self.adapter is not None and self.gpu is not None:
            raise InputError(
                f"link: adapter = {self.adapter} and gpu = {self.gpu} are two links; write a perturbation for each"
            )
        return self

    @property
    def label(self) -> str:
        """For tables and pictures."""
        if self.gpu is not None:
            return f"port of GPU {self.gpu} of node {self.node}"
        return f"adapter {self.adapter} of node {self.node}" if self.adapter is not None else f"node {self.node}"


class SlowLink(Window):
    """A link that moves fewer bytes a second, or none."""

    link: InstanceOf[Link]
    factor: Factor | None = None
    outage: bool = False
    """Nothing moves, and all goes on when it ends."""

    @classmethod
    def called(cls) -> str:
        """By its key."""
        return "slow link"

    @field_validator("link", mode="before")
    @classmethod
    def _of_table(cls, value: Any) -> Any:
        return Link.of_table(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.outage == (self.factor is not None):
            raise InputError("slow link: give either factor, such as 2.0 for half the rate, or outage = true")
        if self.outage and self.to_s is None:
            raise InputError("slow link: outage = true without to_s never ends; give the second at which it does")
        return self

    @property
    def changes(self) -> bool:
        """Whether it does."""
        return self.factor != 1

    @property
    def label(self) -> str:
        """For tables and pictures."""
        return f"{self.link.label} {'down' if self.outage else f'× {self.factor:g}'}{self.lasting}"


Perturbation = SlowRanks | Jitter | SlowLink
KINDS: Mapping[str, type[Perturbation]] = {"ranks": SlowRanks, "distribution": Jitter, "link": SlowLink}
"""By the key that tells a table."""


class Perturbations(Configuration):
    """All that perturbs a step."""

    perturbations: tuple[InstanceOf[SlowRanks] | InstanceOf[Jitter] | InstanceOf[SlowLink], ...] = ()

    @classmethod
    def of(cls, value: Any) -> Self:
        """From the path of a TOML file, a table, an object, several of these, or what is one already."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str | Path):
            return cls._of_file(Path(value))
        several = value if isinstance(value, Sequence) else [value]
        return cls(perturbations=tuple([_perturbation(own, f"perturbation {n}") for n, own in enumerate(several, 1)]))

    @classmethod
    def _of_file(cls, path: Path) -> Self:
        tables = read_toml(path)
        for name in tables:
            if name != "perturbations":
                raise unknown_key(str(path), name, ("perturbations",))
        rows = tables.get("perturbations")
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{path}: has no [[perturbations]]; write one for each, with ranks, distribution or link")
        places = ((row, f"{path}: perturbation {number}") for number, row in enumerate(rows, 1))
        return cls(perturbations=tuple([_perturbation(*place) for place in places]))

    @property
    def slow_ranks(self) -> tuple[SlowRanks, ...]:
        """Those of ranks."""
        return tuple([own for own in self.perturbations if isinstance(own, SlowRanks)])

    @property
    def jitters(self) -> tuple[Jitter, ...]:
        """Those that are drawn."""
        return tuple([own for own in self.perturbations if isinstance(own, Jitter)])

    @property
    def slow_links(self) -> tuple[SlowLink, ...]:
        """Those of links."""
        return tuple([own for own in self.perturbations if isinstance(own, SlowLink)])

    @property
    def labels(self) -> list[str]:
        """For tables and pictures."""
        return [own.label for own in self.perturbations]

    @property
    def changes(self) -> bool:
        """Whether any does."""
        return any(own.changes for own in self.perturbations)

    @property
    def windows(self) -> bool:
        """Whether any that changes something lasts for a part of the step only."""
        own: list[SlowRanks | SlowLink] = [*self.slow_ranks, *self.slow_links]
        return any(window.changes and not window.is_whole for window in own)

    def check(self, gpus: int, gpus_per_node: int) -> None:
        """`InputError` where a rank, node, adapter or GPU is none of a plan on so many GPUs of each node."""
        for slow in self.slow_ranks:
            _refuse_beyond("rank", max(slow.ranks), gpus, "the plan")
        for link in (slow.link for slow in self.slow_links):
            _refuse_beyond("node", link.node, gpus // gpus_per_node, "the plan")
            _refuse_beyond("gpu", link.gpu or 0, gpus_per_node, "a node")
            _refuse_beyond("adapter", link.adapter or 0, gpus_per_node, "a node")


def _refuse_beyond(what: str, number: int, count: int, whose: str) -> None:
    if number >= count:
        raise InputError(f"perturbations: {what} {number} is none of {whose}, which has {count}: give 0 to {count - 1}")


def _perturbation(value: Any, where: str) -> Perturbation:
    """One of a table, told by its key, or an object as it is."""
    if isinstance(value, SlowRanks | Jitter | SlowLink):
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {value!r} is no table; write for instance {{'ranks': [3], 'factor': 1.5}}")
    kinds = [name for name in KINDS if name in value]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise InputError(f"{where}: give one of ranks, distribution and link, which say what it is; has {found}")
    return KINDS[kinds[0]].of_table(value)


def _named(what: str, numbers: Sequence[int]) -> str:
    """Numbers in words; many by their count."""
    if len(numbers) > 1:
        return f"{len(numbers)} {what}s" if len(numbers) > 4 else f"{what}s {', '.join(map(str, numbers))}"
    return f"{what} {numbers[0]}"
