"""When a file is finished is decided by what is known of it, and needs neither a file nor a clock."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_sidecar.completion import Candidate, Evidence, Verdict, judge, merge, noticed, rest_needed
from ckpt_sidecar.formats import Look, Rules

RULES = Rules(settle=1.0, patience=10.0)
SEALED, WHOLE, TORN = Look(None, sealed=True), Look(None), Look("is empty")
PLACED, CLOSED, CREATED, FOUND = Evidence.PLACED, Evidence.CLOSED, Evidence.CREATED, Evidence.FOUND
SECOND = 1_000_000_000


def candidate(evidence: Evidence, *, since: float = 100.0, size: int = 5, mtime_ns: int = 7) -> Candidate:
    return Candidate(evidence, size, mtime_ns, since, due=since)


@pytest.mark.parametrize(
    ("evidence", "look", "rest"),
    [
        (PLACED, SEALED, 0.0),
        (PLACED, WHOLE, 0.0),
        (CLOSED, SEALED, 0.0),
        (CLOSED, WHOLE, 1.0),
        (CREATED, SEALED, 1.0),
        (CREATED, WHOLE, 10.0),
        (FOUND, SEALED, 1.0),
        (FOUND, WHOLE, 1.0),
        (PLACED, TORN, 10.0),
        (CLOSED, TORN, 10.0),
        (CREATED, TORN, 10.0),
        (FOUND, TORN, 10.0),
    ],
)
def test_the_table_of_rests(evidence: Evidence, look: Look, rest: float) -> None:
    assert rest_needed(evidence, look, RULES) == rest
    before = judge(candidate(evidence), look, size=5, mtime_ns=7, now=100.0 + rest - 0.01, rules=RULES)
    after = judge(candidate(evidence), look, size=5, mtime_ns=7, now=100.0 + rest, rules=RULES)
    assert before[0] is Verdict.WAIT and before[1].due == 100.0 + rest
    assert after[0] is (Verdict.TORN if look.flaw else Verdict.TAKE)


@pytest.mark.parametrize("evidence", list(Evidence))
@pytest.mark.parametrize("look", [SEALED, WHOLE, TORN])
@pytest.mark.parametrize(("size", "mtime_ns"), [(6, 7), (5, 8), (0, 0)])
def test_what_changes_is_never_taken(evidence: Evidence, look: Look, size: int, mtime_ns: int) -> None:
    """It must rest anew from now on, and what was known of an earlier writer counts no more."""
    verdict, changed = judge(candidate(evidence), look, size=size, mtime_ns=mtime_ns, now=500.0, rules=RULES)
    assert verdict is Verdict.WAIT
    assert (changed.since, changed.due) == (500.0, 501.0)
    assert (changed.size, changed.mtime_ns) == (size, mtime_ns)
    assert changed.evidence is min(evidence, CREATED)


def test_a_listed_file_has_rested_since_its_mtime() -> None:
    assert noticed(FOUND, 5, 40 * SECOND, now=100.0, wall=50.0, rules=RULES).since == 90.0
    assert noticed(FOUND, 5, 0, now=100.0, wall=50.0, rules=RULES).since == 50.0


@pytest.mark.fault("A16")
def test_a_listed_file_of_the_future_rests_from_now_on() -> None:
    assert noticed(FOUND, 5, 90 * SECOND, now=100.0, wall=50.0, rules=RULES).since == 100.0


@pytest.mark.fault("A16")
@pytest.mark.parametrize("evidence", [PLACED, CLOSED, CREATED])
def test_a_hinted_file_rests_from_the_hint_on_whatever_its_mtime(evidence: Evidence) -> None:
    assert noticed(evidence, 5, 0, now=100.0, wall=50.0, rules=RULES).since == 100.0


def test_all_but_a_file_just_created_are_looked_at_at_once() -> None:
    due = {each: noticed(each, 5, 0, now=100.0, wall=50.0, rules=RULES).due for each in Evidence}
    assert due == {FOUND: 100.0, CREATED: 101.0, CLOSED: 100.0, PLACED: 100.0}


def test_a_first_notice_is_taken_as_it_is() -> None:
    assert merge(None, candidate(CREATED)) == candidate(CREATED)


def test_a_listing_adds_nothing_but_a_look() -> None:
    """Not even when it sees another size: the look will see that for itself."""
    old = Candidate(CLOSED, 5, 7, since=100.0, due=110.0)
    assert merge(old, candidate(FOUND, since=105.0, size=9)) == Candidate(
        CLOSED, 5, 7, since=100.0, due=105.0
    )
    assert merge(candidate(CLOSED), candidate(FOUND, since=105.0)).due == 100.0


def test_a_writer_that_closes_completes_what_it_created() -> None:
    merged = merge(candidate(CREATED, size=0), candidate(CLOSED, since=103.0, size=5))
    assert merged == candidate(CLOSED, since=103.0, size=5)


def test_the_stronger_evidence_on_one_version_stays() -> None:
    """It has rested since it was first seen so: an event that comes late is no change."""
    merged = merge(candidate(PLACED), candidate(CLOSED, since=103.0))
    assert (merged.evidence, merged.since, merged.due) == (PLACED, 100.0, 100.0)


def test_the_evidence_on_another_version_counts_no_more() -> None:
    assert merge(candidate(PLACED), candidate(CLOSED, since=103.0, size=6)).evidence is CLOSED


@settings(deadline=None)
@given(
    evidence=st.sampled_from(Evidence),
    look=st.sampled_from([SEALED, WHOLE, TORN]),
    steps=st.lists(st.tuples(st.floats(0.01, 5.0), st.integers(0, 1)), max_size=30),
)
def test_every_file_that_comes_to_rest_gets_a_verdict(
    evidence: Evidence, look: Look, steps: list[tuple[float, int]]
) -> None:
    """Whatever it did before; and no verdict comes while it changes."""
    now, size = 100.0, 0
    this = noticed(evidence, size, 0, now=now, wall=0.0, rules=RULES)
    for pause, grows in steps:
        now, size = max(now + pause, this.due), size + grows
        verdict, this = judge(this, look, size=size, mtime_ns=0, now=now, rules=RULES)
        assert verdict is Verdict.WAIT or not grows
        if verdict is not Verdict.WAIT:
            return
    for _ in range(3):
        now = max(now, this.due)
        verdict, this = judge(this, look, size=size, mtime_ns=0, now=now, rules=RULES)
    assert verdict is (Verdict.TORN if look.flaw else Verdict.TAKE)
