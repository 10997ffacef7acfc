"""Named constants and the two conversions that cross a boundary of the package.

Inside the package every quantity is SI: bytes, FLOP, seconds, bytes per second. Files, tables, JSON and
plots carry the unit in the name (`latency_us`, `bandwidth_gb_per_s`, `capacity_gib`). The engine alone
counts integer picoseconds, so that equal runs are equal bit for bit.
"""

KILO = 10**3
MEGA = 10**6
GIGA = 10**9
TERA = 10**12

KIB = 2**10
MIB = 2**20
GIB = 2**30

GB = GIGA
"""One gigabyte: 1e9 bytes, as in every bandwidth. Capacities are GiB."""

MS_PER_S = 1e3
US_PER_S = 1e6
NS_PER_US = 10**3
PS_PER_S = 10**12
PS_PER_NS = 10**3
PS_PER_US = 10**6
PS_PER_MS = 10**9


def picoseconds(seconds: float) -> int:
    """Engine time of a duration in seconds, to the nearest picosecond."""
    return round(seconds * PS_PER_S)


def seconds(ps: int) -> float:
    """Seconds of an engine time in picoseconds."""
    return ps / PS_PER_S
