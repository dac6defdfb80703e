"""Layouts and checksums: every byte is in one part, and a whole's checksum is that of its parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_sidecar.bucket import (
    GIB,
    MAX_OBJECT_BYTES,
    MAX_PART_BYTES,
    MAX_PARTS,
    MIB,
    MIN_PART_BYTES,
    PART_BYTES,
    BucketError,
    Conflict,
    Corrupt,
    Denied,
    Missing,
    Refused,
    Span,
    Unreachable,
    crc64,
    decode_crc64,
    encode_crc64,
    join_crc64,
    part_bytes_for,
    spans,
)

# --- checksums ------------------------------------------------------------------------------------------


def test_the_checksum_is_the_one_that_s3_keeps() -> None:
    """CRC-64/NVME, by its published check value."""
    assert crc64(b"123456789") == 0xAE8B14860A799888
    assert encode_crc64(0xAE8B14860A799888) == "rosUhgp5mIg="


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_the_checksum_of_a_whole_is_made_of_those_of_its_parts(first: bytes, second: bytes) -> None:
    """Going on from one, or joined afterwards; of any kind of buffer."""
    whole = crc64(first + second)
    assert crc64(memoryview(second), crc64(bytearray(first))) == whole
    assert join_crc64(crc64(first), crc64(second), len(second)) == whole


@given(st.integers(0, 2**64 - 1))
def test_a_checksum_reads_back_what_was_written(value: int) -> None:
    """As S3 writes it: eight bytes in base64."""
    assert decode_crc64(encode_crc64(value)) == value


@pytest.mark.parametrize("text", ["", "AAAA", "!", "rosUhgp5mIg", "rosUhgp5mIg=\n", "rosUhgp5mIh4", "é"])
def test_what_is_no_checksum_is_refused(text: str) -> None:
    """By the number of its bytes, or because it is no base64."""
    with pytest.raises(ValueError, match=r"8 bytes|base64|padding|ASCII"):
        decode_crc64(text)


# --- layouts --------------------------------------------------------------------------------------------


@pytest.mark.fault("A17")
@given(st.integers(0, MAX_OBJECT_BYTES), st.integers(0, 64 * MIB))
def test_every_size_has_a_layout_that_s3_takes(size: int, at_least: int) -> None:
    """No more than 10,000 parts, none too small or too large, of whole MiB where the size decides."""
    part = part_bytes_for(size, at_least)
    assert max(MIN_PART_BYTES, at_least) <= part <= MAX_PART_BYTES
    assert -(-size // part) <= MAX_PARTS
    assert part in (MIN_PART_BYTES, at_least) or part % MIB == 0


def test_parts_grow_only_as_their_number_demands() -> None:
    """8 MiB will do up to 78 GiB."""
    assert part_bytes_for(0) == part_bytes_for(78 * GIB) == PART_BYTES
    assert part_bytes_for(MAX_PARTS * PART_BYTES) == PART_BYTES
    assert part_bytes_for(MAX_PARTS * PART_BYTES + 1) == PART_BYTES + MIB
    assert part_bytes_for(MAX_OBJECT_BYTES) == MAX_PART_BYTES
    assert part_bytes_for(1, at_least=1) == MIN_PART_BYTES


@pytest.mark.fault("A17")
def test_what_no_object_can_hold_is_refused_with_the_mend() -> None:
    """It would fail after days of sending."""
    with pytest.raises(Refused) as caught:
        part_bytes_for(MAX_OBJECT_BYTES + 1)
    assert "more than S3 can hold in one object" in str(caught.value)
    assert caught.value.hint == "save the checkpoint in several files (shards)"


@given(st.integers(0, 500), st.integers(1, 50))
def test_parts_cover_every_byte_once_in_order(size: int, part_bytes: int) -> None:
    """All but the last have the full size, and they count from 1."""
    parts = spans(size, part_bytes)
    assert [each.number for each in parts] == list(range(1, len(parts) + 1))
    assert [each.offset for each in parts] == [0, *(each.end for each in parts)][: len(parts)]
    assert all(each.size == part_bytes for each in parts[:-1])
    assert sum(each.size for each in parts) == size
    assert all(each.size > 0 for each in parts)


def test_a_span_ends_behind_its_last_byte() -> None:
    """The offset at which the next one begins."""
    assert spans(25, 10) == [Span(1, 0, 10), Span(2, 10, 10), Span(3, 20, 5)]
    assert Span(3, 20, 5).end == 25


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (BucketError, "other"),
        (Missing, "key"),
        (Conflict, "conflict"),
        (Denied, "denied"),
        (Unreachable, "connection"),
        (Corrupt, "checksum"),
        (Refused, "refused"),
    ],
)
def test_an_error_says_the_mend_and_has_a_stable_reason(kind: type[BucketError], reason: str) -> None:
    """Its own when none is given; metrics and logs count by it."""
    plain = kind("it failed")
    assert (str(plain), plain.hint, plain.reason) == ("it failed", "", reason)
    told = kind("it failed", hint="mend it", reason="bucket")
    assert (str(told), told.hint, told.reason) == ("it failed (mend it)", "mend it", "bucket")


def test_a_store_may_ask_for_a_rest() -> None:
    """None, where it does not say."""
    assert Unreachable("slow down", reason="throttled", retry_after=7.0).retry_after == 7.0
    assert Unreachable("gone").retry_after == 0.0
