"""What is remembered, and for how long."""

from concurrent.futures import ThreadPoolExecutor

from spsim.lazy import Cache


def test_a_value_is_made_once():
    made = []
    cache = Cache(100, len)
    assert cache.get("a", lambda: made.append(1) or "xx") == cache.get("a", lambda: made.append(2)) == "xx"
    assert made == [1]


def test_the_ones_used_longest_ago_are_forgotten():
    """Three of 40 bytes do not fit 100; the one that was asked for again stays."""
    cache = Cache(100, lambda value: 40)
    for key in ("a", "b", "a", "c"):
        cache.get(key, lambda key=key: key)
    assert cache.bytes == 80
    assert cache.get("a", lambda: "new") == "a"
    assert cache.get("b", lambda: "new") == "new"


def test_a_value_beyond_the_limit_is_not_kept():
    cache = Cache(10, len)
    assert cache.get("a", lambda: "x" * 11) == "x" * 11
    assert (cache.bytes, cache.get("a", lambda: "y")) == (0, "y")


def test_threads_may_share_it():
    """Any of them may make a value; the bytes are those of what is kept."""
    cache = Cache(50, lambda value: 10)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: cache.get(n % 7, lambda: n % 7), range(2000)))
    assert found == [n % 7 for n in range(2000)]
    assert cache.bytes == 50
