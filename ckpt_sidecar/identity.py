"""Who a spool is: its lock, `spool.json`, and the ids that it gives out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from ckpt_sidecar.bucket import crc64
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.disk import Disk, leads_to, locked
from ckpt_sidecar.journal import Record, load_record, pid_of, read_json

RESERVE = 1000  # ids taken from the record at a time: one durable write for a thousand checkpoints
OWN = 10**9  # ids of generation 0 that a spool has to itself; an id's number has 18 digits at most


class SpoolError(Exception):
    """The spool or the watch dir cannot be used; the message names it, the cause and the mend."""


class Identity:
    """The identity of the spool at `home`, for one thread at a time; OSError where the disk refuses it."""

    def __init__(self, home: Path, disk: Disk) -> None:
        self.record = Record(spool="")
        self._home = home
        self._disk = disk
        self._lock: BinaryIO | None = None
        self._sequence = 0

    def lock(self) -> None:
        """Lock the spool; SpoolError when another process has it."""
        self._lock = self._locked()

    def _locked(self) -> BinaryIO:
        if (lock := locked(self._home / "lock")) is None:
            other = pid_of(self._home)
            raise SpoolError(f"another ckpt-sidecar serves {self._home} (pid {other}): stop it first")
        return lock

    def read(self, new_id: str) -> list[str]:
        """Read the record, or begin one with that id; return what was found broken, in words."""
        self.record = Record(spool=new_id)
        try:
            self.record = load_record(read_json((self._home / "spool.json").read_bytes()))
        except FileNotFoundError:
            pass
        except (ValueError, TypeError) as error:
            return [f"spool.json cannot be read, a new one is made: {error}"]
        return []

    def go_on(self, ids: Iterable[Id], *, target: str) -> None:
        """Number above all these, which were given out before, and be the queue of that target."""
        ids = list(ids)
        generation = max([self.record.generation, *(each.generation for each in ids)])
        self._sequence = max([self.record.counter, *(each.sequence % OWN for each in ids)])
        counter = self._sequence + RESERVE
        self.save(generation=generation, counter=counter, target=target or self.record.target)

    @property
    def lost(self) -> bool:
        """Was it locked, and has it gone with the watch dir?"""
        return self._lock is not None and not leads_to(self._home / "lock", self._lock)

    def renew(self) -> None:
        """Lock and note it anew: it stays the same, and its ids go on."""
        lock = self._locked()
        try:
            self.save(counter=self._sequence + RESERVE)
        except OSError:
            lock.close()
            raise
        self.close()
        self._lock = lock

    def save(self, **changes: Any) -> None:
        """Note these, durably."""
        record = replace(self.record, **changes)
        data = json.dumps({"schema": 1} | asdict(record)).encode()
        self._disk.write_file(self._home / "spool.json", data, sync=True, in_place=True)
        self._disk.sync_dir(self._home)
        self.record = record

    def next_id(self, *, before_all: bool = False) -> Id:
        """Give out an id, above all that were; or one before whatever a claim has numbered."""
        if self._sequence == self.record.counter:
            self.save(counter=self._sequence + RESERVE)  # on the disk first: no id is ever given twice
        self._sequence += 1
        if self.record.generation and not before_all:
            return Id(self.record.generation, self._sequence)
        # Generation 0 is nobody's own: every new spool numbers in it before its first claim.
        return Id(0, crc64(self.record.spool.encode()) % 10**8 * OWN + self._sequence)

    def note_order(self, folder: Path) -> None:
        """Note when it was made, by the last number that was given out: as its time, for `is_before`."""
        with suppress(OSError):  # then only the clock tells
            os.utime(folder, (self._sequence, self._sequence))

    def is_before(self, folder: Path, ids: Iterable[Id]) -> bool:
        """Was it made before the last of these was given out? True where nothing is noted."""
        noted = int(folder.stat().st_mtime)
        return noted >= OWN or any(noted < each.sequence % OWN for each in ids)

    def close(self) -> None:
        """Unlock the spool."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
