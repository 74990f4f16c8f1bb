import pytest

from dcomp.calibrate.timing import MIN_SECONDS, WARM_UPS, time_in_turns


class Workshop:
    """Two functions that take known times on a clock of their own."""

    def __init__(self, original: float, compressed: float) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.seconds = {"a": original, "b": compressed}

    def run(self, name: str) -> None:
        self.log.append(name)
        self.now += self.seconds[name]

    def time(self, repeats: int, **options: int) -> list[tuple[float, float]]:
        return time_in_turns(lambda: self.run("a"), lambda: self.run("b"), repeats, clock=lambda: self.now, **options)


def test_runs_are_interleaved_and_who_goes_first_alternates() -> None:
    shop = Workshop(3.0, 1.0)
    pairs = shop.time(4, warm_ups=1)
    assert "".join(shop.log) == "ab" + "abbaabba"
    assert pairs == [(3.0, 1.0)] * 4


def test_short_functions_run_several_times_both_equally_often() -> None:
    quick = 2**-5  # exact in binary
    shop = Workshop(2 * quick, quick)
    pairs = shop.time(3, warm_ups=2)
    loops = -(-MIN_SECONDS // quick)
    assert shop.log.count("a") == shop.log.count("b") == 2 + 3 * loops
    assert [value for pair in pairs for value in pair] == pytest.approx([2 * quick, quick] * 3)


def test_nothing_is_timed_cold() -> None:
    shop = Workshop(1.0, 1.0)
    assert len(shop.time(3)) == 3
    assert len(shop.log) == 2 * (WARM_UPS + 3)
