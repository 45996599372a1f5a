"""Timing rules, tested with a clock of our own."""

import itertools

from compress.engines.benchmark import Timing, race


def test_contenders_take_turns_and_warm_calls_are_not_timed():
    calls = []
    ticks = itertools.count()
    timings = race(
        [lambda: calls.append("a"), lambda: calls.append("b")],
        rounds=2,
        burst_ms=0,
        warm_calls=2,
        clock=lambda: next(ticks) / 1000,
    )
    burst = 2 + 3
    assert "".join(calls) == "a" * burst + "b" * burst + "b" * burst + "a" * burst, "the order turns each round"
    assert [len(timing.samples_ms) for timing in timings] == [6, 6], "every timed call is kept, warm ones are not"
    assert all(abs(sample - 1.0) < 1e-6 for timing in timings for sample in timing.samples_ms), "milliseconds"


def test_a_burst_ends_after_its_time():
    clock = itertools.count()
    (timing,) = race([lambda: None], rounds=1, burst_ms=10_000, warm_calls=0, clock=lambda: next(clock) * 1.0)
    assert len(timing.samples_ms) == 10, "ten samples of one second fill a burst of ten seconds"


def test_noise_is_flagged_by_the_interquartile_range():
    assert not Timing((1.0, 1.01, 1.02, 1.0, 1.01)).noisy
    assert Timing((1.0, 1.0, 1.5, 1.5, 2.0)).noisy
    assert Timing((1.0, 2.0, 3.0)).p50_ms == 2.0
