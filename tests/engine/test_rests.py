"""Who rests after a failure, for how long, and who tries first when nobody answered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.rests import Rests

A, B, C = Id(1, 1), Id(1, 2), Id(1, 3)


class Clock:
    """Seconds, and chances one after the other."""

    def __init__(self, *chances: float) -> None:
        self.now = 100.0
        self._chances = iter(chances)

    def rests(self) -> Rests:
        """Rests by this clock."""
        return Rests(lambda: self.now, lambda: next(self._chances))


def test_each_failure_makes_the_next_rest_longer_until_it_succeeds() -> None:
    """The ceiling doubles; a success begins anew; an end of the rest alone does not."""
    rests = Clock(0.5, 0.5, 0.5, 0.5).rests()
    assert rests.after(A, unanswered=False) == 1.0
    assert rests.get(A, 0.0) == 101.0
    rests.end(A)
    assert rests.get(A, 0.0) == 0.0
    assert rests.after(A, unanswered=False) == 2.0
    rests.forget(A)
    assert rests.after(A, unanswered=True) == 1.0
    rests.end_all()
    assert rests.soonest() is None
    assert rests.after(A, unanswered=True, least=5.0) == 5.0


def test_a_rest_is_no_longer_than_the_longest() -> None:
    """As once the node is about to be taken away."""
    rests = Clock(0.9, 0.9).rests()
    rests.longest = 1.0
    rests.after(A, unanswered=False, least=30.0)
    rests.after(B, unanswered=True, least=30.0)
    assert rests.get(A, 0.0) == rests.get(B, 0.0) == 101.0


@pytest.mark.fault("C15")
def test_where_nobody_answers_the_newest_asks_first() -> None:
    """The rests are shared out anew among those that wait for the store; the others keep their own."""
    clock = Clock(0.1, 0.9, 0.5, 0.2)
    rests = clock.rests()
    for id_ in (A, C, B):
        rests.after(id_, unanswered=True)
    assert [rests.get(each, 0.0) - 100.0 for each in (C, B, A)] == pytest.approx([0.2, 1.0, 1.8])
    assert rests.soonest() == pytest.approx(0.2)
    clock.now += 0.2
    rests.after(C, unanswered=True)  # in vain: 0.8 s more
    assert [rests.get(each, 0.0) - 100.0 for each in (C, B, A)] == pytest.approx([1.0, 1.0, 1.8])
    rests.forget(C)
    assert [rests.get(each, 0.0) - 100.0 for each in (B, A)] == pytest.approx([1.0, 1.8])


@given(st.lists(st.tuples(st.sampled_from("feu"), st.integers(1, 9)), max_size=60), st.integers())
def test_the_newer_never_rests_longer_than_the_older(steps: list[tuple[str, int]], seed: int) -> None:
    """Whoever fails, ends or succeeds; and the next rest that is over is found."""
    clock, chance = Clock(), random.Random(seed)
    rests = Rests(lambda: clock.now, chance.random)
    waiting: set[Id] = set()
    for what, number in steps:
        id_ = Id(1, number)
        if what == "u":
            rests.after(id_, unanswered=True)
            waiting.add(id_)
        else:
            (rests.forget if what == "f" else rests.end)(id_)
            waiting.discard(id_)
        clock.now += chance.random()
        times = [rests.get(each, -1.0) for each in sorted(waiting, reverse=True)]
        assert times == sorted(times)
        later = [each - clock.now for each in times if each > clock.now]
        assert rests.soonest() == (min(later) if later else None)
        assert all(rests.get(Id(1, n), -1.0) == -1.0 for n in range(1, 10) if Id(1, n) not in waiting)
