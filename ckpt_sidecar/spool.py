"""The durable queue on the trainer's own disk: what is held, and what the sidecar must remember of itself.

    <watch>/.ckpt-sidecar/
        spool.json             who we are: a random id, the attempt, the generation last claimed, the counter
        lock                   held while a sidecar serves this directory
        caught/<n>/<name>      a hard link taken at the first hint, before it is known to be whole
        pins/<id>/<name>       the same link, once it is a checkpoint: renamed in one step, directory and all
        pins/<id>.json         its journal entry: what a restart needs besides the pin
        known.jsonl            files that are durable, so that they are not taken up again
        incoming/              restores under way
        aside/                 torn files that stood where a restored one belongs

The pin alone says id, name, size and time: an entry that is missing or torn costs nothing but a look into
the bucket. What cannot be held by a link is held by an open descriptor, which a crash would lose.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import BinaryIO

from ckpt_sidecar.checkpoint import Caught, Checkpoint, File, Id
from ckpt_sidecar.disk import (
    Disk,
    PinnedFile,
    file_of,
    foreign,
    inode_of,
    mend_of,
    nameless_bytes,
)
from ckpt_sidecar.identity import Identity, SpoolError
from ckpt_sidecar.journal import (
    Record,
    Recovered,
    catch_name,
    dump_entry,
    pin_dirs,
    read_back,
)
from ckpt_sidecar.known import Known
from ckpt_sidecar.names import HOME


class Spool:
    """One watch dir's spool. Blocking calls: the event loop uses it through threads, `catch` from any."""

    def __init__(self, root: Path, *, home: Path | None = None, disk: Disk | None = None) -> None:
        self.root = root
        self.home = home or root / HOME
        self.disk = disk or Disk()
        self._caught = self.home / "caught"
        self._pins = self.home / "pins"
        self._mutex = threading.Lock()
        self._numbers = count()
        self._identity = Identity(self.home, self.disk)
        self._held: dict[tuple[tuple[int, int], str], int] = {}
        self._pinned_descriptors: dict[Id, int] = {}
        self._numbered: dict[tuple[tuple[int, int], str], tuple[File, Id]] = {}  # and could not be pinned yet
        self.known = Known(root, self.home, self.disk)

    # --- opening ---

    def open(self, *, new_id: str, target: str = "") -> list[str]:
        """Make or take up the spool and lock it; return what was found broken, in words.

        `new_id` names a spool that is made new, `target` says where it leads to. Raises SpoolError when the
        directory cannot be used, or has something on its way to another target.
        """
        try:
            self._open_root()
            self._open_home()
            self._identity.lock()
            return self._take_up(new_id, target)
        except OSError as error:
            self.close()
            what = f"{error.strerror}: {error.filename or self.home} ({mend_of(error)})"
            raise SpoolError(f"cannot write into the watch dir: {what}") from error
        except SpoolError:
            self.close()
            raise

    def _open_root(self) -> None:
        if not self.root.exists():
            if not self.root.parent.is_dir():
                raise SpoolError(f"no such directory: {self.root.parent} (make it, or mend --watch)")
            self.root.mkdir()
        if not self.root.is_dir():
            raise SpoolError(f"not a directory: {self.root} (--watch takes the checkpoint directory)")

    def _open_home(self) -> None:
        for folder in (self.home, self._caught, self._pins):
            self.disk.make_dir(folder)
            for paths in ([folder], folder.iterdir()):
                if (path := foreign(paths)) is not None:
                    raise SpoolError(f"{path} belongs to another user (run as its owner, or remove it)")
                folder.chmod(0o700)  # before a look at what is in it

    def _take_up(self, new_id: str, target: str) -> list[str]:
        complaints = self._identity.read(new_id)
        if target and self.record.target not in ("", target):
            complaints.append(self._leave_target(target))
            self._identity.record = Record(spool=new_id)
        ids = [*self.known.read(), *(id_ for id_, _ in pin_dirs(self._pins))]
        self._identity.go_on(ids, target=target)
        return complaints

    def _leave_target(self, target: str) -> str:
        was, pins = self.record.target, pin_dirs(self._pins)
        if pins and self.record.generation:  # without one nothing of them can be there
            raise SpoolError(
                f"{self.home} holds {len(pins)} checkpoints on their way to {was}, not to {target}: "
                "run once more with that bucket and prefix until all is durable (or remove it, and lose them)"
            )
        self.known.clear()
        return f"it was the spool of {was}: it begins anew, and what stands in the watch dir goes to {target}"

    def _renew(self) -> None:
        """Make the spool anew where it went with the watch dir."""
        if self._identity.lost:
            self.root.stat()  # that one is the trainer's to make
            self._open_home()
            self._identity.renew()

    def close(self) -> None:
        """Unlock the spool and give every descriptor back; what is held on the disk stays."""
        for descriptor in [*self._held.values(), *self._pinned_descriptors.values()]:
            os.close(descriptor)
        self._held.clear()
        self._pinned_descriptors.clear()
        self._identity.close()

    # --- the record ---

    @property
    def record(self) -> Record:
        """What the spool knows of itself."""
        return self._identity.record

    def claimed(self, *, generation: int, attempt: str) -> None:
        """Note the claim that has succeeded; OSError where a restart could not know of it."""
        with self._mutex:
            self._identity.record = replace(self.record, generation=generation, attempt=attempt)
            self._identity.save()

    def serving(self, *, address: str, pid: int) -> None:
        """Note where this sidecar answers, for `status` and the trainer's helpers."""
        with self._mutex:
            self._identity.save(address=address, pid=pid)

    # --- catching: from the first hint to the verdict ---

    def catch(self, name: str) -> Caught | None:
        """Hold the regular file that stands at `name`; None when there is none. Idempotent; any thread.

        OSError when it can be held neither by a link nor by a descriptor.
        """
        path = self.root / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return None
            with self._mutex:
                self._renew()
                return self._catch_by_link(path, name)
        except FileNotFoundError:
            return None
        except (OSError, SpoolError):  # another user's file, another file system, too many links, a full disk
            return self._catch_by_descriptor(path, name)

    def _catch_by_link(self, path: Path, name: str) -> Caught:
        fresh = self._caught / f"new-{next(self._numbers)}"
        link = fresh / name
        self.disk.make_dir(link.parent)
        try:
            self.disk.link(path, link)
            status = link.lstat()
            inode = (status.st_dev, status.st_ino)
            settled = self._caught / catch_name(inode, name)
            if not settled.exists():
                self._identity.note_order(fresh)
                self.disk.rename(fresh, settled)
        finally:
            if fresh.exists():
                self.disk.remove_tree(fresh)
        return Caught(name, inode, str(settled / name))

    def _catch_by_descriptor(self, path: Path, name: str) -> Caught | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):  # it is gone, or a symlink stands there now
                return None
            raise
        status = os.fstat(descriptor)
        inode = (status.st_dev, status.st_ino)
        with self._mutex:
            held = self._held.setdefault((inode, name), descriptor)
        if held != descriptor:
            os.close(descriptor)
        return Caught(name, inode, None, held)

    def let_go(self, caught: Caught) -> None:
        """Hold the file no longer; what was handed over meanwhile is not touched."""
        key = caught.inode, caught.name
        with self._mutex:
            self._numbered.pop(key, None)
            if caught.path is not None:
                self.disk.remove_tree(self._caught / catch_name(*key))
            elif self._held.get(key) == caught.descriptor:
                os.close(self._held.pop(key))

    def open_caught(self, caught: Caught) -> BinaryIO:
        """The held bytes, to look at; the caller closes it. FileNotFoundError once they were handed over."""
        if caught.path is not None:
            return Path(caught.path).open("rb")
        with self._mutex:
            return os.fdopen(os.dup(self._own_descriptor(caught)), "rb")

    def _own_descriptor(self, caught: Caught) -> int:
        """The descriptor by which it is held, if it still is: the number may be another file's by now."""
        held = self._held.get((caught.inode, caught.name))
        if held is None or held != caught.descriptor:
            raise FileNotFoundError(errno.ENOENT, "it is not held any more", caught.name)
        return held

    def held_bytes(self) -> int:
        """Bytes that nothing but our links and descriptors keeps on the disk any more."""
        held = (*self._held.values(), *self._pinned_descriptors.values())
        return nameless_bytes((self._caught, self._pins), held)

    # --- pins ---

    def pin(
        self, batch: Sequence[tuple[Caught, File]], in_doubt: Callable[[OSError], None] = lambda _: None
    ) -> tuple[list[Checkpoint], list[tuple[Caught, OSError]]]:
        """Make checkpoints of what was caught and found whole, numbered in this order, durably queued.

        Returns them, and what could not be pinned with the reason; that stays caught. `in_doubt` is told
        when the pins are made, but a power loss may undo them.
        """
        pinned, failed = [], []
        with self._mutex, suppress(OSError, SpoolError):  # what cannot be pinned says so itself
            self._renew()
            self.disk.make_dir(self._pins)
        for caught, file in batch:
            try:
                with self._mutex:
                    pinned.append(self._pin(caught, file))
            except OSError as error:
                failed.append((caught, error))
        try:
            self.disk.sync_dir(self._pins)
        except FileNotFoundError:
            pass  # removed under us: the pins will be missed when they are sent
        except OSError as error:  # not asked again: the kernel tells it once, and then forgets
            in_doubt(error)
        return pinned, failed

    def _pin(self, caught: Caught, file: File) -> Checkpoint:
        key = caught.inode, caught.name
        numbered, id_ = self._numbered.get(key, (None, None))
        id_ = id_ if id_ and numbered == file else self._identity.next_id()
        self._numbered[key] = file, id_  # should it fail now, others must not come before it
        checkpoint = Checkpoint(id_, file.name, (file,), file.mtime_ns)
        if caught.path is not None:
            held = self._caught / catch_name(caught.inode, caught.name)
            self.disk.rename(held, self._pins / str(checkpoint.id))
            with suppress(OSError):  # on a full disk the pin alone tells all that a restart needs
                self._write_entry(checkpoint, sync=False)
        else:
            self._pinned_descriptors[checkpoint.id] = self._own_descriptor(caught)
            del self._held[key]
        del self._numbered[key]
        self.known.taken(file)
        return checkpoint

    def write(self, checkpoint: Checkpoint) -> None:
        """Journal the checkpoint's state, durably."""
        if checkpoint.id not in self._pinned_descriptors:
            self._write_entry(checkpoint, sync=True)
            self.disk.sync_dir(self._pins)

    def _write_entry(self, checkpoint: Checkpoint, *, sync: bool) -> None:
        data = json.dumps(dump_entry(checkpoint)).encode()
        self.disk.write_file(self._pins / f"{checkpoint.id}.json", data, sync=sync)

    def release(self, checkpoint: Checkpoint, *, durable_as: Id | None) -> None:
        """Let go of the pin; its file is known from now on, as durable under that id or as not to be sent."""
        for file in checkpoint.files:
            self.known.settled(file, durable_as)
        self._drop_pin(checkpoint)

    def _drop_pin(self, checkpoint: Checkpoint) -> None:
        descriptor = self._pinned_descriptors.pop(checkpoint.id, None)
        if descriptor is not None:
            os.close(descriptor)
            return
        # The entry goes first: a pin without one is taken up again, one without a pin would look lost.
        self.disk.unlink(self._pins / f"{checkpoint.id}.json")
        self.disk.remove_tree(self._pins / str(checkpoint.id))

    def reconsider(self, checkpoint: Checkpoint) -> Caught | None:
        """Turn a pin whose bytes changed back into a catch, to be judged anew.

        Where the pin is gone (somebody removed it) what stands at the name now is caught; None when nothing.
        """
        name = checkpoint.name
        for file in checkpoint.files:
            self.known.forget(file)
        folder = self._pins / str(checkpoint.id)
        try:
            status = (folder / name).lstat()
        except OSError:  # held by a descriptor, or removed by somebody
            self._drop_pin(checkpoint)
            return self.catch(name)
        inode = (status.st_dev, status.st_ino)
        settled = self._caught / catch_name(inode, name)
        with self._mutex:
            if settled.exists():
                self.disk.remove_tree(folder)
            else:
                self.disk.rename(folder, settled)
        with suppress(OSError):  # the next start will find it, and that it has no pin
            self.disk.unlink(self._pins / f"{checkpoint.id}.json")
        return Caught(name, inode, str(settled / name))

    @contextmanager
    def reading(self, checkpoint: Checkpoint, file: File) -> Iterator[PinnedFile]:
        """The pinned bytes of one file; they stay readable although the pin be removed meanwhile."""
        held = self._pinned_descriptors.get(checkpoint.id)
        if held is not None:
            descriptor = os.dup(held)
        else:
            descriptor = os.open(self._pins / str(checkpoint.id) / file.name, os.O_RDONLY | os.O_CLOEXEC)
        pinned = PinnedFile(descriptor, file)
        try:
            yield pinned
        finally:
            pinned.close()

    def recover(self) -> Recovered:
        """Read back what a predecessor left: pins with their journal, catches without a verdict.

        A catch that no name leads to, older than the newest that is pinned or durable, is one that the disk
        did not let be pinned, or be given back: it will be numbered before whatever a claim has numbered. But
        what was caught after that one was numbered is newer, and only the clock was set back.
        """
        found = read_back(self._pins, self._caught, self.disk)
        for checkpoint in found.checkpoints:
            self.known.taken(checkpoint.files[0])
        newest = max([self.known.newest_mtime_ns, *(each.saved_at for each in found.checkpoints)])
        ids = [each.id for each in found.checkpoints] + ([self.known.newest] if self.known.newest else [])
        for caught in found.caught:
            file = file_of(caught.name, Path(str(caught.path)).stat())
            folder = self._caught / catch_name(caught.inode, caught.name)
            nameless = inode_of(self.root / caught.name) != caught.inode
            if nameless and file.mtime_ns < newest and self._identity.is_before(folder, ids):
                self._numbered[caught.inode, caught.name] = file, self._identity.next_id(before_all=True)
        return found
