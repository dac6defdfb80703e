"""Random lives: trainers save, sidecars crash and stall, nodes are lost, the store and the disks fail.

The sidecars are the real ones, from the watcher to the drain, on small real directories; the store is the one
in memory, behind a simulated network; time is virtual (tests/model/world.py). inotify is simulated: a
hint comes at once, waits for a stopped process, or gets lost. What must never be is looked for at every write
to the bucket and after every step; in the end all is healed, and whatever was completed must be durable.

A failure is printed as the steps that lead to it. It comes again with the seed that pytest prints in its
header: `pytest -p randomly --randomly-seed=SEED tests/model/test_random_life.py`, or with the line
`@reproduce_failure(...)` that hypothesis prints.
"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ckpt_sidecar.bucket
import ckpt_sidecar.sidecar
import ckpt_sidecar.watcher
from ckpt_sidecar.bucket import ObjectRef, Unchanged
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import parse
from ckpt_sidecar.events import Claimed, Fenced, Restored
from ckpt_sidecar.manifest import Manifest, described
from ckpt_sidecar.names import HOME
from ckpt_sidecar.sidecar import Exit
from tests.fakes import ABLE, CARELESS, MemoryBucket
from tests.model.node import PART, Hints, Life, Node, Saves
from tests.model.world import Fault, Store, World

PREFIX = "job/"
LATEST = "job/latest.json"
NAMES = ("last.pt", "step_1.pt", "sub/step_2.pt")
SIZES = (10, 90, 400, 900)  # bytes besides the archive's own: one put, or several parts
DAY = 86_400
FAULTS = (
    *("unreachable", "throttled", "denied", "conflict", "corrupt"),
    *("lost", "echo", "late", "slow", "flip"),
)
SUITED = {"conflict": ("put", "complete", "delete"), "corrupt": ("put", "part"), "echo": ("put", "complete")}
VERBS = ("", "get", "head", "put", "create", "part", "complete", "abort", "list_parts", "get_range", "delete")
DISK = ("make_dir", "link", "rename", "unlink", "remove_tree", "sync_dir", "write_file", "append", "create")


class Witness(MemoryBucket):
    """A bucket that has every write looked at."""

    judge: Judge

    def _keep(self, key: str, body: bytes, etag: str, metadata: Mapping[str, str]) -> ObjectRef:
        self.judge.before_write(key, body, metadata)
        ref = super()._keep(key, body, etag, metadata)
        self.judge.after_write(key, body)
        return ref

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """As any bucket."""
        await super().delete(key, when=when, version_id=version_id)
        self.judge.after_delete(key)


class Judge:
    """What must hold at every write, every claim and every restore (docs/architecture.md, the rules)."""

    def __init__(self, world: World, memory: Witness) -> None:
        self.world, self.memory = world, memory
        memory.judge = self
        self.saves = Saves()
        self.ids: dict[str, Id] = {}  # at each key
        self.highest: Id | None = None  # of all that was ever the newest in latest.json
        self.claims: list[tuple[int, Life]] = []
        self.writers: dict[str, str] = {}  # the spool of whoever writes latest.json with that token
        self.meddled = False  # a person has deleted latest.json, and the fencing token with it

    @property
    def manifest(self) -> Manifest:
        """What stands in the bucket."""
        there = LATEST in self.memory.objects
        return parse(self.memory.body(LATEST), prefix=PREFIX) if there else Manifest()

    # --- the bucket ---

    def before_write(self, key: str, body: bytes, metadata: Mapping[str, str]) -> None:
        """An object's id grows, and its bytes are those of a whole save."""
        if not key.startswith(PREFIX):
            self.world.complain(f"{key} lies outside")
        if key == LATEST:
            self.before_swap(parse(body, prefix=PREFIX))
        if key == LATEST or HOME in key:
            return
        entry = described(ObjectRef(key, len(body), "", metadata=metadata), "x", 0)
        if entry is None or (key.removeprefix(PREFIX), body) not in self.saves.order:
            self.world.complain(f"{key} gets what was never completed: {short(body)}")
        elif key in self.ids and self.ids[key] > entry.id:
            self.world.complain(f"the id at {key} falls from {self.ids[key]} to {entry.id}")
        else:
            self.ids[key] = entry.id

    def before_swap(self, new: Manifest) -> None:
        """Only the holder writes latest.json; a person who deletes it takes the holder's name away."""
        if not self.meddled and (new.holder is None or new.holder.spool != self.writers[new.write]):
            self.world.complain(f"{self.writers[new.write]} writes, and {new.holder} holds the prefix")

    def after_write(self, key: str, body: bytes) -> None:
        """All that latest.json lists is there, and its newest never goes back."""
        seen = self.manifest
        if key == LATEST:
            newest = seen.newest.id if seen.newest else None
            if self.highest is not None and (newest is None or newest < self.highest):
                self.world.complain(f"the newest goes back from {self.highest} to {newest}")
            self.highest = newest
        self._all_there(seen)

    def after_delete(self, key: str) -> None:
        """Nothing that is listed may be deleted."""
        self.ids.pop(key, None)
        found = self.memory.objects.get(key)  # an older version, that stands there again
        before = described(found.ref, "x", 0) if found else None
        if before is not None:
            self.ids[key] = before.id
        self._all_there(self.manifest)

    def _all_there(self, seen: Manifest) -> None:
        for entry in seen.checkpoints:
            found = self.memory.objects.get(PREFIX + entry.name)
            theirs = described(found.ref, entry.name, 0) if found else None
            if found is None or theirs is None or theirs.id < entry.id:
                self.world.complain(
                    f"latest.json lists {entry.id} {entry.name}, and it is not there: {theirs}"
                )
            elif theirs.id == entry.id:
                self.saves.durable.add((entry.name, found.body))
                if replace(entry.objects[0], metadata={}) != replace(
                    found.ref, metadata={}, crc64nvme=entry.objects[0].crc64nvme
                ):
                    self.world.complain(f"{entry.name} is not as it is listed")

    # --- the lives ---

    def claimed(self, life: Life, event: Claimed) -> None:
        """Every generation has one holder, and is greater than all before; where a person did not meddle."""
        if not self.meddled and any(generation >= event.generation for generation, _ in self.claims):
            self.world.complain(f"generation {event.generation} is claimed twice")
        self.claims.append((event.generation, life))
        life.least = self.highest

    def fenced(self, life: Life, event: Fenced) -> None:
        """Only who was displaced by another is fenced."""
        holder = self.manifest.holder
        if holder is not None and holder.spool == life.spool.record.spool:
            self.world.complain(f"{life.node.name} is fenced, and holds the prefix")

    def restored(self, life: Life, event: Restored) -> None:
        """What is restored is at least as new as what was committed at the claim, if it can be had."""
        spoilt = self.world.store.flipped > life.flipped_before
        if life.least is not None and not spoilt and (event.id is None or event.id < life.least):
            self.world.complain(f"restored {event.outcome} {event.id}, and {life.least} was committed")
        if event.outcome == "restored":
            name = event.name or ""
            content = (life.node.root / name).read_bytes()
            if name not in life.node.writing and (name, content) not in self.saves.order:
                self.world.complain(f"{name} is restored as it never was: {short(content)}")

    def ended_badly(self, life: Life) -> None:
        """It may not pass over all of the bucket's checkpoints, unless bits flip."""
        assert life.end is not None
        if life.end.code != Exit.NOTHING_RESTORED or not self.world.store.flipped:
            self.world.complain(f"{life.end}")


class RandomLife(RuleBasedStateMachine):
    """The rules by which random things happen."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="random-life-", dir=_shared_memory()))
        self.nodes: list[Node] = []
        self.numbers = count(1)
        self.clock_was_set = False

    @initialize(
        seed=st.integers(0, 2**32),
        store=st.sampled_from(("able", "able", "versioned", "careless", "conditional puts only")),
        keep_local=st.sampled_from((0, 0, 1, 2)),
        keep_remote=st.sampled_from((0, 0, 1, 2)),
    )
    def begin(self, seed: int, store: str, keep_local: int, keep_remote: int) -> None:
        """A store of some kind, and one node with a sidecar."""
        self.world = World(seed)
        weak = {"careless": CARELESS, "conditional puts only": replace(CARELESS, conditional_put=True)}
        self.alone = store in weak  # such a store cannot keep two apart
        memory = Witness(abilities=weak.get(store, ABLE), versioned=store == "versioned", min_part_bytes=PART)
        self.world.store = Store(self.world, memory, orderly=self.alone)
        self.world.after_step = lambda life: life.stepped()  # type: ignore[attr-defined]
        self.judge = Judge(self.world, memory)
        self.choices: dict[str, Any] = {
            "keep_local": keep_local,
            "keep_remote": keep_remote,
            "allow_unfenced": store == "careless",
        }
        self.new_node()

    def new_node(self) -> Node:
        """Another machine, another attempt."""
        number = next(self.numbers)
        node = Node(
            self.home / f"node-{number}", self.judge, attempt=f"attempt-n{number}", choices=self.choices
        )
        self.nodes.append(node)
        node.start()
        return node

    @property
    def here(self) -> list[Node]:
        """The nodes that are not lost."""
        return [each for each in self.nodes if not each.lost]

    def pick(self, which: int) -> Node:
        """One of the nodes that are here."""
        return self.here[which % len(self.here)]

    # --- the trainer ---

    @precondition(lambda self: self.here)
    @rule(
        which=st.integers(0, 1),
        name=st.sampled_from(NAMES),
        size=st.sampled_from(SIZES),
        at=st.sampled_from(("now", "now", "now", "1970", "future")),
        hint_lost=st.booleans(),
        then=st.integers(0, 40),
    )
    def save(self, which: int, name: str, size: int, at: str, *, hint_lost: bool, then: int) -> None:
        """A trainer saves."""
        self.pick(which).save(name, size, at=at, hint_lost=hint_lost)
        self.world.steps(then)

    @precondition(lambda self: self.here)
    @rule(which=st.integers(0, 1), name=st.sampled_from(NAMES), size=st.sampled_from(SIZES))
    def save_in_place(self, which: int, name: str, size: int) -> None:
        """A trainer begins a save in place, or finishes the one that it is at."""
        node = self.pick(which)
        if name in node.writing:
            node.finish(name)
        else:
            node.begin(name, size)

    @precondition(lambda self: self.here)
    @rule(
        which=st.integers(0, 1),
        name=st.sampled_from(NAMES),
        to=st.sampled_from(NAMES),
        what=st.sampled_from(("delete", "touch", "append", "rotate")),
        then=st.integers(0, 20),
    )
    def meddle(self, which: int, name: str, to: str, what: str, then: int) -> None:
        """A trainer does something to a file that stands there."""
        node = self.pick(which)
        if name not in node.writing and (node.root / name).exists():
            if what == "delete":
                node.delete(name)
            elif what == "touch":
                node.touch(name, at="now")
            elif what == "append":
                node.append(name)
            elif name != to:
                node.rotate(name, to)
        self.world.steps(then)

    # --- the sidecars ---

    @precondition(lambda self: self.here)
    @rule(
        which=st.integers(0, 1),
        name=st.sampled_from(NAMES),
        size=st.sampled_from(SIZES),
        then=st.integers(1, 120),
        what=st.sampled_from(("kill", "rewrite", "rewrite all")),
    )
    def save_and_disturb(self, which: int, name: str, size: int, *, then: int, what: str) -> None:
        """A save is followed by a crash somewhere on its way, or by the next one, in place."""
        node = self.pick(which)
        node.save(name, size)
        if what == "kill" and node.living is not None:
            node.living.fuse = (then, what)
        self.world.steps(then)
        if what != "kill":
            node.begin(name, size)
            if what == "rewrite all":
                node.finish(name)
            self.world.steps(then)

    @precondition(lambda self: self.here)
    @rule(
        which=st.integers(0, 1),
        what=st.sampled_from(("kill", "kill", "stall", "term")),
        at=st.one_of(st.integers(1, 30), st.integers(1, 300)),
        then=st.integers(0, 60),
    )
    def strike(self, which: int, what: str, at: int, then: int) -> None:
        """A sidecar dies, stalls, or is told to stop, some steps from now."""
        life = self.pick(which).living
        if life is not None and what == "term":
            life.sidecar.stop.set()
        elif life is not None:
            life.fuse = (at, what)
        self.world.steps(then)

    @precondition(lambda self: self.here)
    @rule(which=st.integers(0, 1), another_attempt=st.booleans(), then=st.integers(0, 60))
    def revive(self, which: int, *, another_attempt: bool, then: int) -> None:
        """A sidecar that stalls goes on; one that is gone is started again."""
        node = self.pick(which)
        if node.living is not None:
            node.living.wake()
        else:
            node.start(another_attempt=another_attempt)
        self.world.steps(then)

    @precondition(lambda self: len(self.nodes) < 4)
    @rule(lose=st.booleans(), flip=st.booleans(), then=st.integers(0, 60))
    def reschedule(self, *, lose: bool, flip: bool, then: int) -> None:
        """The job goes on on another node; the old one is lost, or its sidecar does not know yet."""
        if flip and self.judge.memory.abilities.checksum:  # else nobody can tell
            self.world.store.faults.append(Fault("flip", "flip", 1))
        only_one = self.alone or self.judge.meddled  # nothing tells two apart
        if self.here and (lose or only_one or len(self.here) > 1):
            self.here[0].lose()
        self.new_node()
        self.world.steps(then)

    # --- faults ---

    @rule(kind=st.sampled_from(FAULTS), verb=st.sampled_from(VERBS), left=st.integers(1, 8))
    def bucket_fault(self, kind: str, verb: str, left: int) -> None:
        """So many requests fail, or are answered badly, late or never."""
        if kind == "flip":
            if self.judge.memory.abilities.checksum:
                self.world.store.faults.append(Fault(kind, kind, left))
        elif verb in SUITED.get(kind, VERBS) and not (self.alone and kind == "late"):
            self.world.store.faults.append(Fault(kind, verb, left))

    @precondition(lambda self: self.here)
    @rule(
        which=st.integers(0, 1),
        verbs=st.lists(st.sampled_from(DISK), min_size=1, max_size=3),
        code=st.sampled_from((errno.ENOSPC, errno.EIO)),
    )
    def disk_fault(self, which: int, verbs: list[str], code: int) -> None:
        """A disk refuses some calls."""
        self.pick(which).break_disk(verbs, code)

    @rule()
    def heal(self) -> None:
        """All that fails is mended."""
        self.world.store.faults.clear()
        for node in self.here:
            node.mend()

    @rule(chance=st.integers(0, 5))
    def lose_an_upload(self, chance: int) -> None:
        """The store throws an upload away, as a lifecycle rule would."""
        uploads = self.judge.memory.uploads
        if uploads:
            del uploads[sorted(uploads)[chance % len(uploads)]]

    @precondition(lambda self: len(self.here) == 1)
    @rule()
    def delete_the_manifest(self) -> None:
        """A person deletes latest.json; while two are at it that is more than they can mend."""
        if self.judge.memory.objects.pop(LATEST, None):
            self.judge.meddled = True

    # --- time ---

    @rule(n=st.integers(1, 300))
    def steps(self, n: int) -> None:
        """So many steps are done."""
        self.world.steps(n)

    @rule(seconds=st.sampled_from((0.1, 1.0, 5.0, 60.0, 1000.0, 3600.0)))
    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self.world.pass_time(seconds)

    @rule(seconds=st.sampled_from((-DAY, DAY, -3600, 3600, -1, 1)))
    def set_the_clock(self, seconds: int) -> None:
        """The wall clock jumps."""
        self.world.ahead += seconds * 10**9
        self.clock_was_set = True

    # --- what must hold all the time ---

    @invariant()
    def nothing_torn_is_put_in_place(self) -> None:
        """A file that no trainer has written is a whole save of that name."""
        for node in self.here:
            for name, path in node.standing():
                if path.stat().st_ino not in node.written:
                    assert (name, path.read_bytes()) in self.judge.saves.order, name

    @invariant()
    def no_lag_is_negative(self) -> None:
        """Whatever the clocks say; and none is left when nothing is on its way."""
        for node in self.here:
            if node.living is not None:
                lag = node.living.book.lag(self.world.wall() / 1e9)
                assert lag >= 0.0 and (lag == 0.0 or len(node.living.book))

    # --- the end ---

    def teardown(self) -> None:
        """All is healed: then whatever was completed and not lost is durable."""
        try:
            if self.nodes:
                self.come_to_rest()
        finally:
            for node in self.here:
                node.lose()
            shutil.rmtree(self.home)

    def come_to_rest(self) -> None:
        """Heal everything, let the last holder finish, and have a new node restore."""
        self.heal()
        for node in self.here:
            if node.living is not None:
                node.living.fuse = None
                node.living.wake()
        self.world.pass_time(2000)
        last = self.last_holder()
        for node in self.here:
            if node is not last and node.living is not None:
                self.stop(node)
        if last is not None:
            self.finish(last)
        self.restore_anew()

    def last_holder(self) -> Node | None:
        """The node whose sidecar has claimed last; None when that is lost."""
        claimed = [life.node for _, life in self.judge.claims]
        return claimed[-1] if claimed and not claimed[-1].lost else None

    def stop(self, node: Node) -> None:
        """Have the sidecar drain and end."""
        life = node.living
        assert life is not None
        life.sidecar.stop.set()
        self.world.pass_time(5000, until=lambda: life.dead)
        assert life.end is not None, f"{node.name} does not end: {life.book!r}"

    def finish(self, node: Node) -> None:
        """The last holder goes on, once more from the start: all that its disk holds becomes durable."""
        if node.living is not None:
            self.stop(node)
        order = self.judge.saves.order
        written = [each for each in node.standing() if each[1].stat().st_ino in node.written]
        standing = {(name, path.read_bytes()) for name, path in written}
        wanted = {each for each in (*standing, *node.held()) if each in order}
        node.start(take_over=True)
        life = node.life
        assert life is not None
        self.world.pass_time(2000)
        self.stop(node)
        assert life.end is not None and life.end.code == Exit.DURABLE, life.end
        for name, content in sorted(wanted):
            self.check_durable(node, name, content, standing=(name, content) in standing)
        self.check_order(node)
        assert list(node.held()) == []
        assert list((node.root / HOME / "incoming").iterdir()) == []

    def check_durable(self, node: Node, name: str, content: bytes, *, standing: bool) -> None:
        """It is listed, or a newer save of that name is; or retention has no room for it."""
        order, by = self.judge.saves.order, self.judge.saves.by
        seen = self.judge.manifest
        entry = seen.entry_of(name)
        if entry is not None:
            body = self.judge.memory.body(PREFIX + name)
            # What only a listing finds goes by its time: the last is one from the future.
            ahead = (name, body) in self.judge.saves.ahead
            later = not standing and (ahead or order[name, body] > order[name, content])
            two = {by[name, body], by[name, content]} != {node.name}  # only ids order what two trainers save
            assert body == content or later or two, (
                f"{name} is not durable: {short(content)}, but {short(body)}"
            )
        else:
            keep = self.choices["keep_remote"]
            # A hold that the disk did not take back, of what a newer save, spoilt since, has superseded.
            newer = any(it[0] == name and n > order[name, content] for it, n in order.items())
            spoilt = bool(node.refused) and newer and not standing
            kept = keep and len(seen.checkpoints) >= keep
            assert kept or spoilt, f"{name} is not durable: {short(content)}"

    def check_order(self, node: Node) -> None:
        """What it saved in the plainest way is numbered in that order.

        Unless no link could be made, so that a crash has lost the order; or the clock was set meanwhile, by
        which a listing goes.
        """
        if self.clock_was_set or node.refused & {"make_dir", "link", "rename"}:
            return
        saves, memory = self.judge.saves, self.judge.memory
        listed = [(each.name, memory.body(PREFIX + each.name)) for each in self.judge.manifest.checkpoints]
        numbers = [saves.order[it] for it in listed if it in saves.plain and saves.by[it] == node.name]
        assert numbers == sorted(numbers, reverse=True), f"{node.name} saved {numbers}, the newest first"

    def restore_anew(self) -> None:
        """A node that has nothing gets the newest, and no upload of ours is left."""
        deleted = LATEST not in self.judge.memory.objects  # then it is made anew from the objects
        newest = self.judge.manifest.newest
        node = self.new_node()
        life = node.life
        assert life is not None
        self.world.pass_time(2000)
        assert life.ready
        newest = self.judge.manifest.newest if deleted else newest
        files = {name: path.read_bytes() for name, path in node.standing()}
        if newest is None:
            assert files == {}
        else:
            body = self.judge.memory.body(PREFIX + newest.name)
            got = [(name, short(content)) for name, content in files.items()]
            assert files == {newest.name: body}, f"restored {got}, the newest is {newest.id} {newest.name}"
        self.stop(node)
        assert life.end is not None and life.end.code == Exit.DURABLE
        # Whose disk is gone, or has refused the journal, cannot know of the uploads that it asked for.
        forgetful = any(each.lost or each.ever_hurt for each in self.nodes)
        if not (self.judge.meddled or self.world.store.littered or forgetful):
            assert set(self.judge.memory.uploads) <= self.world.store.orphans


def short(content: bytes) -> str:
    """Which save these bytes are."""
    return repr(content[34:50].partition(b"x")[0])


def _shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world in which a part has a few hundred bytes, and the hints are the trainer's own calls."""
    monkeypatch.setattr(ckpt_sidecar.bucket, "MIN_PART_BYTES", PART)
    monkeypatch.setattr(ckpt_sidecar.bucket, "MIB", 1)
    monkeypatch.setattr(ckpt_sidecar.sidecar, "PART_BYTES", PART)
    monkeypatch.setattr(ckpt_sidecar.watcher, "Tree", Hints)


def live(examples: int, steps: int, *, shrink: bool) -> None:
    """Play so many random lives of so many steps; pytest-randomly's seed gives the same ones."""
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    seed = random.getrandbits(64)
    print(f"seed {seed}")  # noqa: T201  (pytest shows it when the test fails)
    chosen = settings(
        max_examples=examples,
        phases=phases,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    machine = hypothesis.seed(seed)(type("RandomLife", (RandomLife,), {}))
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.fault("A16", "E8", "E9")
def test_nothing_is_lost_or_torn_in_a_random_life() -> None:
    """Every invariant, over some random lives; a failure is shown as it was found."""
    live(60, 30, shrink=False)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.fault("A16", "E8", "E9")
def test_nothing_is_lost_or_torn_in_many_random_lives() -> None:
    """The same over many and longer ones; a failure is made as short as it will be."""
    live(500, 50, shrink=True)
