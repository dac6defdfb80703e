"""What a checkpoint is: ids, names, states, the book."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt_sidecar.checkpoint as module
from ckpt_sidecar.bucket import ObjectRef
from ckpt_sidecar.checkpoint import (
    NEXT,
    Book,
    Changed,
    Checkpoint,
    Committed,
    File,
    Id,
    IllegalMove,
    Pinned,
    Skipped,
    State,
    Stored,
    Superseded,
    Uploading,
    advance,
    state_name,
)
from ckpt_sidecar.events import Moved, WatchLost, event_name
from ckpt_sidecar.names import flaw_of_name, step_of

REF = ObjectRef("run/a.pt", 3, "e")
EXAMPLES: dict[type[State], State] = {
    Pinned: Pinned(),
    Uploading: Uploading(("u",)),
    Stored: Stored((REF,)),
    Committed: Committed((REF,)),
    Changed: Changed(),
    Skipped: Skipped("why"),
    Superseded: Superseded(Id(1, 2)),
}


def a_checkpoint(name: str = "a.pt", sequence: int = 1, size: int = 3, saved_at: int = 10**18) -> Checkpoint:
    return Checkpoint(Id(1, sequence), name, (File(name, size, saved_at),), saved_at)


def test_ids_order_by_generation_then_sequence() -> None:
    """An id of a later generation is greater than any of an earlier one."""
    ids = [Id(2, 1), Id(1, 9), Id(1, 10)]
    assert [str(each) for each in sorted(ids)] == ["1-9", "1-10", "2-1"]


@given(st.integers(0, 10**17), st.integers(0, 10**17))
def test_an_id_reads_back_what_it_wrote(generation: int, sequence: int) -> None:
    """Ids survive the way through text."""
    assert Id.parse(str(Id(generation, sequence))) == Id(generation, sequence)


@pytest.mark.parametrize(
    "text", ["", "1", "1-", "-1-2", "1-2-3", "a-b", "1-2\n", "\uff11-\uff12", f"1-{10**19}"]
)
def test_what_is_no_id_is_refused(text: str) -> None:
    """Nothing but two short decimal numbers is an id."""
    with pytest.raises(ValueError, match="not an id"):
        Id.parse(text)


@pytest.mark.parametrize("start", list(NEXT))
@pytest.mark.parametrize("to", list(NEXT))
def test_only_the_arrows_of_the_table_may_be_gone(start: type[State], to: type[State]) -> None:
    """A move is legal exactly when NEXT has it."""
    checkpoint = Checkpoint(Id(1, 1), "a.pt", (), 0, EXAMPLES[start])
    if to in NEXT[start]:
        assert advance(checkpoint, EXAMPLES[to]).state == EXAMPLES[to]
    else:
        with pytest.raises(IllegalMove, match=state_name(EXAMPLES[to])):
            advance(checkpoint, EXAMPLES[to])


def test_the_docstring_shows_the_life_cycle_as_it_is() -> None:
    """The picture at the top of the module is the table."""
    drawn = {}
    for left, right in re.findall(r"^    (\w+)\s+-> (.+)$", module.__doc__ or "", re.MULTILINE):
        drawn[left] = set(right.split(" | "))
    assert drawn == {kind.__name__: {to.__name__ for to in tos} for kind, tos in NEXT.items() if tos}
    ends = re.search(r"([\w, ]+) and (\w+) are ends", module.__doc__ or "")
    assert ends is not None
    assert {*ends[1].strip().split(", "), ends[2]} == {k.__name__ for k, tos in NEXT.items() if not tos}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_100.pt", 100),
        ("epoch=3-step=1200.ckpt", 1200),
        ("model_epoch_10.pt", 10),
        ("checkpoint-0500/optimizer.pt", 500),
        ("global_step77.pt", 77),
        ("last.pt", None),
        ("step_.pt", None),
    ],
)
def test_the_step_is_read_from_the_name(name: str, step: int | None) -> None:
    """A step beats an epoch; a name without one tells none."""
    assert step_of(name) == step


@pytest.mark.parametrize("name", ["a.pt", "run 1/ä%+#?.pt", "-dash.pt", "x" * 255, "deep/" * 20 + "a.pt"])
def test_good_names_have_no_flaw(name: str) -> None:
    """Spaces, signs and Unicode are fine in S3 keys and on the disk."""
    assert flaw_of_name(name) is None


@pytest.mark.parametrize(
    ("name", "flaw"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("../a.pt", "normalised"),
        ("a/../b.pt", "normalised"),
        ("a//b.pt", "normalised"),
        ("./a.pt", "normalised"),
        ("x" * 256, "too long"),
        ("ab/" * 400 + "a.pt", "too long"),
        ("a\nb.pt", "control"),
        ("a\x00b.pt", "control"),
        (".ckpt-sidecar/pins/1-1/a.pt", "own names"),
        ("latest.json", "own names"),
        ("caf\udce9.pt", "UTF-8"),
    ],
)
def test_bad_names_are_named(name: str, flaw: str) -> None:
    """Every name that cannot go both ways says why."""
    assert flaw in (flaw_of_name(name) or "")


def test_the_book_counts_what_is_on_its_way() -> None:
    """What is durable or ended leaves the book; lag is the oldest one's age, never negative."""
    book = Book()
    older, newer = a_checkpoint("a.pt", 1, 3, 5 * 10**9), a_checkpoint("b.pt", 2, 4, 8 * 10**9)
    book.put(newer)
    book.put(older)
    assert [str(each.id) for each in book] == ["1-1", "1-2"]
    assert (len(book), book.bytes, book.lag(10.0), book.lag(1.0)) == (2, 7, 5.0, 0.0)
    assert repr(book) == "<2 checkpoints: 2 pinned; 7 B>"
    book.put(advance(older, EXAMPLES[Stored]))
    assert repr(book) == "<2 checkpoints: 1 pinned, 1 stored; 7 B>"
    for each in list(book):
        book.put(Checkpoint(each.id, each.name, each.files, each.saved_at, EXAMPLES[Committed]))
    assert (repr(book), book.lag(10.0)) == ("<0 checkpoints: none on its way; 0 B>", 0.0)


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([Pinned, Uploading, Stored, Committed]))))
def test_the_book_knows_its_order_whatever_comes_and_goes(moves: list[tuple[int, type[State]]]) -> None:
    """By id, by name and in turn it tells the same as a look through all that wait."""
    book, waiting = Book(), {}
    for n, kind in moves:
        each = Checkpoint(Id(1, n), f"{n % 2}.pt", (), 0, EXAMPLES[kind])
        book.put(each)
        waiting[n] = each
        if kind is Committed:
            del waiting[n]
    newest_first = [waiting[n] for n in sorted(waiting, reverse=True)]
    stored = [each for each in newest_first if isinstance(each.state, Stored)]
    assert list(book) == newest_first[::-1]
    assert list(book.in_turn()) == stored + newest_first
    for name in ("0.pt", "1.pt"):
        assert book.named(name) == [each for each in newest_first[::-1] if each.name == name]


def test_events_have_stable_names() -> None:
    """The log's event name is the class in snake case; a move is named by where it went."""
    assert event_name(WatchLost("x")) == "watch_lost"
    assert event_name(Moved(a_checkpoint(), 0.0)) == "checkpoint_pinned"
    assert repr(a_checkpoint()) == "<1-1 a.pt 3 B pinned>"
