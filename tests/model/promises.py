"""What must hold, whatever happens: each promise as a function that raises Broken."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import parse
from ckpt_sidecar.manifest import Entry, Manifest, described
from ckpt_sidecar.names import MANIFEST_NAME
from tests.model.life import PREFIX, View
from tests.model.store import Object, Store

LATEST = PREFIX + MANIFEST_NAME


class Broken(Exception):
    """A promise was broken; the message says which."""


def manifest_in(store: Store) -> Manifest:
    """What stands as latest.json; a blank one before anybody has written it."""
    found = store.at(LATEST)
    return Manifest() if found is None else _parsed(found.body)


@cache
def _parsed(body: bytes) -> Manifest:
    return parse(body, prefix=PREFIX)


@cache
def _entry(found: Object) -> Entry:
    entry = described(found.ref, found.key.removeprefix(PREFIX), 0)
    if entry is None:
        raise Broken(f"{found.key} is not whole, or not ours")
    return entry


def entry_at(store: Store, name: str) -> Entry | None:
    """What the object of that name says of itself."""
    found = store.at(PREFIX + name)
    return _entry(found) if found is not None else None


# --- of the bucket, from one state to the next -------------------------------------------------------


def nothing_goes_back(before: Store, after: Store, by: View, *, bound: bool) -> None:
    """The newest checkpoint, the history, the generation and the id at each key only grow.

    But where the store does not look at the condition of a complete (not `bound`) the holder may replace
    what a fenced one has put there after the holder's look: it was never committed, and is still pinned.
    """
    old, new = manifest_in(before), manifest_in(after)
    if new.generation < old.generation:
        raise Broken(f"the generation goes back: {old.generation} -> {new.generation}")
    if old.newest is not None and (new.newest is None or new.newest.id < old.newest.id):
        raise Broken(f"the newest goes back: {old.newest.id} -> {new.newest and new.newest.id}")
    for entry in old.checkpoints:
        now = new.entry_of(entry.name)
        if now is None or now.id < entry.id:
            raise Broken(f"history is lost: {entry.id} {entry.name} -> {now and now.id}")
    for found in before.objects:
        if found.key != LATEST:
            name = found.key.removeprefix(PREFIX)
            was, now = _entry(found), entry_at(after, name)
            listed = old.entry_of(name)
            never_committed = listed is None or listed.id < was.id
            excused = not bound and by.generation == old.generation and never_committed
            if now is None or (now.id < was.id and not excused):
                raise Broken(f"the id at {found.key} goes back: {was.id} -> {now and now.id}")


def nobody_displaced_comes_back(before: Store, after: Store, by: View) -> None:
    """Who has held the prefix, and has lost it to another, never takes it back in the same attempt."""
    old, new = manifest_in(before), manifest_in(after)
    another = old.holder is not None and old.holder.spool != f"spool {by.side}"
    if another and new.generation > old.generation > by.claimed > 0:
        raise Broken(f"{by.side} had been displaced, and takes the prefix back")


def whole(store: Store, views: Sequence[View]) -> None:
    """Every object has the very bytes of the save that it says it is; the committed is there, or newer."""
    saves = {save.saved_at: save for view in views for save in view.saves}
    for found in store.objects:
        if found.key != LATEST:
            it = _entry(found)
            if saves[it.saved_at].content != found.body or saves[it.saved_at].name != it.name:
                raise Broken(f"{found.key} has not the bytes of {it.id}")
    for entry in manifest_in(store).checkpoints:
        there = entry_at(store, entry.name)
        if there is None or there.id < entry.id:
            raise Broken(f"{entry.id} {entry.name} is committed, and {there and there.id} stands there")


# --- of the two sidecars -----------------------------------------------------------------------------


def alive(view: View) -> None:
    """Nobody dies, and nobody stands still with work left."""
    if view.died_of:
        raise Broken(f"{view.side} died of {view.died_of}")
    if view.up and not view.asked and not view.fenced and (not view.ready or view.waiting or view.pins):
        raise Broken(f"{view.side} stands still with {view.waiting} checkpoints on their way")


def fenced_rightly(view: View, store: Store) -> None:
    """A holder never thinks that it is fenced."""
    seen = manifest_in(store)
    if view.fenced and view.generation and seen.generation == view.generation:
        raise Broken(f"{view.side} holds the prefix and thinks that it is fenced")


def restored_enough(view: View, store: Store, saves: Sequence[View]) -> None:
    """A restore yields at least the newest checkpoint that was ever committed, byte for byte."""
    if view.restored is None:
        return
    word, id_, content = view.restored
    seen = manifest_in(store)
    if seen.generation != view.generation:
        return  # displaced meanwhile: it will not get far
    newest = seen.newest
    if word == "failed" or (newest is not None and (id_ is None or id_ < newest.id)):
        raise Broken(f"the restore {word} {id_}, committed was {newest and newest.id}")
    if id_ is not None:
        contents = {save.content for each in saves for save in each.saves}
        if content not in contents:
            raise Broken(f"what was restored as {id_} is no save: {content!r}")


def nothing_is_let_go(views: Sequence[View], store: Store) -> None:
    """Whatever was pinned still is, or is in the bucket; or a newer save of its name is."""
    kept: dict[str, Id] = {}
    for id_, name in {pin for view in views for pin in view.pins}:
        kept[name] = max(kept.get(name, id_), id_)
    for view in views:
        for id_, name, _ in view.pinned:
            there = entry_at(store, name)
            if kept.get(name, Id(0, 0)) < id_ and (there is None or there.id < id_):
                raise Broken(f"{id_} {name} is neither pinned nor in the bucket, nor is a newer one")


def all_is_well_in_the_end(view: View, views: Sequence[View], store: Store) -> None:
    """Where the holder has nothing left to do: all its saves are committed, no upload is left."""
    seen = manifest_in(store)
    if view.fenced or view.asked or not view.up or seen.generation != view.generation:
        return
    for id_, name, _ in view.pinned:
        entry = seen.entry_of(name)
        if entry is None or entry.id < id_:
            raise Broken(f"{id_} {name} is not committed in the end")
    if seen.uploads:
        raise Broken(f"{seen.uploads[0].upload_id} stays announced in the end")
    for found in store.objects:
        if found.key != LATEST and "-" in found.etag:  # of parts: it was announced, so it is taken up
            it = _entry(found)
            entry = seen.entry_of(it.name)
            superseded = any(
                name == it.name and id_ > it.id for each in views for id_, name, _ in each.pinned
            )
            if not superseded and (entry is None or entry.id < it.id):
                raise Broken(f"{it.id} {it.name} was completed after it was announced, and is not adopted")
    for upload in store.uploads:
        if upload.by.startswith(view.side) and not upload.late:
            raise Broken(f"upload {upload.upload_id} stays behind")
