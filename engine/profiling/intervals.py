"""Arithmetic of spans of time: sorted lists of (begin, end) that do not overlap."""

from bisect import bisect_right

Spans = list[tuple[float, float]]


def union(spans: Spans) -> Spans:
    """Any spans, sorted and joined where they touch."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        elif end > begin:
            joined.append((begin, end))
    return joined


def common(a: Spans, b: Spans) -> Spans:
    """What lies in both."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(a: Spans, b: Spans) -> Spans:
    """What of `a` lies outside of `b`."""
    gaps, last = [], float("-inf")
    for begin, end in b:
        gaps.append((last, begin))
        last = end
    return common(a, [*gaps, (last, float("inf"))])


def length(spans: Spans) -> float:
    """Of all together."""
    return sum(end - begin for begin, end in spans)


def holds(spans: Spans, moment: float) -> bool:
    """Whether a moment lies in one of them."""
    place = bisect_right(spans, (moment, float("inf")))
    return place > 0 and moment < spans[place - 1][1]
