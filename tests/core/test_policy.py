"""What next: plain decisions, without a loop or a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_sidecar.bucket import ObjectRef
from ckpt_sidecar.checkpoint import Book, Checkpoint, File, Id, Pinned, State, Stored, Uploading
from ckpt_sidecar.policy import (
    Skip,
    Supersede,
    Upload,
    drain_order,
    expired_local,
    next_step,
    retry_delay,
)


def waiting(sequence: int, name: str, state: State | None = None) -> Checkpoint:
    return Checkpoint(Id(1, sequence), name, (File(name, 1, 0),), 0, state or Pinned())


def book_of(*all_waiting: Checkpoint) -> Book:
    book = Book()
    for each in all_waiting:
        book.put(each)
    return book


def the_next(*all_waiting: Checkpoint, busy: tuple[str, ...] = (), **more: object) -> object:
    return next_step(book_of(*all_waiting), busy=busy, resting=more.pop("resting", {}), now=0.0, **more)  # type: ignore[arg-type]


def test_the_newest_goes_first_and_older_ones_backfill() -> None:
    """A free worker takes the newest; while that is busy, the next one."""
    a, b = waiting(1, "a.pt"), waiting(2, "b.pt")
    assert the_next(a, b) == Upload(b)
    assert the_next(a, b, busy=("b.pt",)) == Upload(a)
    assert the_next() is None


def test_an_older_pin_of_the_same_name_is_superseded() -> None:
    """Of one name only the newest is sent; the older says by whom it was superseded."""
    old, new = waiting(1, "last.pt"), waiting(2, "last.pt")
    assert the_next(old, new) == Supersede(old, new.id)


def test_a_name_that_is_being_sent_is_left_alone() -> None:
    """Per key there is one upload at a time, so that constant replacing never starves."""
    old, new = waiting(1, "last.pt", Uploading(("u",))), waiting(2, "last.pt")
    assert the_next(old, new, busy=("last.pt",)) is None


def test_one_that_rests_lets_others_go_first() -> None:
    """What failed is left alone until its rest is over."""
    a, b = waiting(1, "a.pt"), waiting(2, "b.pt")
    assert the_next(a, b, resting={b.id: 5.0}) == Upload(a)
    assert the_next(b, resting={b.id: 5.0}) is None
    assert the_next(b, resting={b.id: 0.0}) == Upload(b)


def test_what_retention_would_delete_at_once_is_not_sent() -> None:
    """Behind by more than is kept, an old pin is skipped; one whose upload has begun is finished."""
    old = waiting(1, "a.pt")
    durable = (Id(1, 5), Id(1, 4))
    step = the_next(old, keep_remote=2, durable=durable)
    assert isinstance(step, Skip)
    assert step.checkpoint == old
    assert the_next(old, keep_remote=3, durable=durable) == Upload(old)
    assert the_next(old, keep_remote=0, durable=durable) == Upload(old)
    assert the_next(old, keep_remote=2, durable=durable, asked={old.id}) == Upload(old)
    assert the_next(old, keep_remote=2, durable=durable, resting={old.id: 5.0}) is None
    begun = waiting(1, "a.pt", Uploading(("u",)))
    assert the_next(begun, keep_remote=2, durable=durable) == Upload(begun)


def test_a_drain_lists_what_is_stored_first_then_the_newest() -> None:
    """One swap makes a stored one safe: it costs least."""
    a, b = waiting(1, "a.pt", Stored((ObjectRef("a.pt", 1, "e"),))), waiting(2, "b.pt")
    assert drain_order([b, a, waiting(3, "c.pt")]) == [a, waiting(3, "c.pt"), b]


def test_local_files_beyond_the_newest_n_may_go_but_never_the_manifests_newest() -> None:
    """The oldest goes first; 0 keeps all."""
    names = {Id(1, n): f"{n}.pt" for n in range(1, 6)}
    assert expired_local(names, keep=2, newest=Id(1, 5)) == [Id(1, 1), Id(1, 2), Id(1, 3)]
    assert expired_local(names, keep=2, newest=Id(1, 2)) == [Id(1, 1), Id(1, 3)]
    assert expired_local(names, keep=0, newest=None) == []


@given(st.integers(1, 1000), st.floats(0, 0.999), st.floats(0, 1000))
def test_the_wait_grows_is_capped_and_honours_what_the_store_asked(
    tries: int, chance: float, asked: float
) -> None:
    """Full jitter under an exponential ceiling; Retry-After is the least, within reason."""
    delay = retry_delay(tries, chance=chance, asked=asked)
    assert min(asked, 300.0) <= delay <= max(30.0, min(asked, 300.0))
    assert retry_delay(tries, chance=chance) <= 0.2 * 2.0**tries


@pytest.mark.fault("C1")
def test_the_ceiling_doubles() -> None:
    """Base 0.2 s: 0.4, 0.8, 1.6 … 30."""
    assert [retry_delay(n, chance=0.5) for n in (1, 2, 3, 50)] == [0.2, 0.4, 0.8, 15.0]
