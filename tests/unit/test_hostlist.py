"""Host lists against lists written by hand, at the edges where padding and brackets go wrong."""

from __future__ import annotations

import time

import pytest

from strop.slurm import env, hostlist

CASES = [
    ("", []),
    ("a1", ["a1"]),
    ("node[1-3,07-09],a1", ["node1", "node2", "node3", "node07", "node08", "node09", "a1"]),
    ("n[9-11]", ["n9", "n10", "n11"]),  # a range that grows by a digit
    ("n[098-101]", ["n098", "n099", "n100", "n101"]),  # and a padded one
    ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
    ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
]


@pytest.mark.parametrize(("text", "names"), CASES)
def test_expand(text, names):
    assert hostlist.expand(text) == names


@pytest.mark.parametrize(
    "text", ["gpu[1-99999999]", "r[1-999]n[1-999]", "[1-9][1-9][1-9][1-9][1-9][1-9][1-9]"]
)
def test_more_names_than_any_cluster_has(text):
    """An error at once, not gigabytes of names."""
    began = time.monotonic()
    with pytest.raises(ValueError, match="more than 262144 hosts"):
        hostlist.expand(text)
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("numbers", "limit", "text"),
    [
        ([], None, ""), ([7], None, "7"), ([1, 0], None, "0-1"), ([0, 1, 3, 3, 9, 8, 7], None, "0-1,3,7-9"),
        (range(512), 1, "0-511"), ([1, 3, 5, 6], 2, "1,3 and 2 more"),
    ],
)  # fmt: skip
def test_ranges(numbers, limit, text):
    assert hostlist.ranges(numbers, limit) == text


@pytest.mark.parametrize("text", ["n[1-3", "n1-3]", "n[3-1]", "n[[1]]"])
def test_what_is_no_list(text):
    with pytest.raises(ValueError):
        hostlist.expand(text)


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("8(x2)", [8, 8]), ("4(x2),3", [4, 4, 3]), ("2,1(x3)", [2, 1, 1, 1])]
)
def test_counts(text, counts):
    assert env.expand_counts(text) == counts
