"""Which points of accuracy against latency are dominated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A deployed model: one file on one runtime."""

    row: str
    runtime: str
    accuracy: float
    """0..1, higher is better."""
    ms: float
    """Lower is better."""

    def dominates(self, other: Point) -> bool:
        """At least as good in both and better in one (Pareto dominance)."""
        as_good = self.accuracy >= other.accuracy and self.ms <= other.ms
        return as_good and (self.accuracy, self.ms) != (other.accuracy, other.ms)


def dominators(ours: Iterable[Point], peers: Iterable[Point]) -> dict[str, list[Point]]:
    """For each row of ours the peers' points that dominate it; empty when a point of the row stands.

    A row has a point for each runtime and is deployed on whichever is best, so it is dominated when each of its points
    is. The list then holds the dominators of its fastest point.
    """
    rivals, found = list(peers), {}
    rows: dict[str, list[Point]] = {}
    for point in ours:
        rows.setdefault(point.row, []).append(point)
    for row, points in rows.items():
        beaten = [[rival for rival in rivals if rival.dominates(point)] for point in points]
        fastest = min(range(len(points)), key=lambda index: points[index].ms)
        found[row] = beaten[fastest] if all(beaten) else []
    return found


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other dominates, the fastest first."""
    every = list(points)
    standing = [point for point in every if not any(other.dominates(point) for other in every)]
    return sorted(standing, key=lambda point: point.ms)
