"""Compression with a sample loses nothing, and every damage of a text or its sample is detected."""

import random
import tracemalloc
import zlib
from contextlib import suppress

import lz4.block
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.store.compression import MAX_DECOMPRESSED_BYTES, compress_text, decompress_text


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=500), st.binary(max_size=500), st.sampled_from([1, 200]))
def test_compression_is_lossless(text, sample, times):
    for other in (text, sample * times + text, text + sample * times):
        assert decompress_text(compress_text(other, sample * times), sample * times) == other


def test_a_text_compressed_by_an_older_version_is_readable():
    deflate = zlib.compressobj(zdict=b"like this")
    old = deflate.compress(b"like this one") + deflate.flush()
    assert decompress_text(old, b"like this") == b"like this one"
    for wrong, sample in ((old[:-1], b"like this"), (old, b"like that")):
        with pytest.raises(zlib.error):
            decompress_text(wrong, sample)


def test_a_block_that_declares_gigabytes_is_refused_without_allocating():
    block = lz4.block.compress(b"a" * 1000)
    huge = (2**31 - 1).to_bytes(4, "little") + block[4:]
    bomb = zlib.compress(bytes(MAX_DECOMPRESSED_BYTES + 1))
    tracemalloc.start()
    for packed in (b"\1" + bytes(4) + huge, b"\2" + bytes(8) + huge, bomb):
        with pytest.raises(zlib.error):
            decompress_text(packed, b"")
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_DECOMPRESSED_BYTES
    tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_or_another_sample_is_detected(place, change):
    text, sample = b"a text like its sample, and a little more " * 3, b"a text like its sample"
    packed = bytearray(compress_text(text, sample))
    packed[place % len(packed)] ^= change
    with suppress(zlib.error):  # a reference to another copy of the same words changes nothing
        assert decompress_text(bytes(packed), sample) == text
    with pytest.raises(zlib.error):
        decompress_text(
            compress_text(b"a text like its sample", b"a text like its sample"), b"another sample altogether"
        )


@pytest.mark.parametrize("size", [1000, 32_255, 32_256, 32_257, 100_000])
def test_a_changed_sample_is_detected(size):
    chance = random.Random(size)
    sample = chance.randbytes(size)
    text = sample[: size - 100] + chance.randbytes(100)
    packed = compress_text(text, sample)
    assert decompress_text(packed, sample) == text
    assert len(packed) < 500
    for place in (0, size // 2, size - 101):
        changed = bytearray(sample)
        changed[place] ^= 1
        with pytest.raises(zlib.error):
            decompress_text(packed, bytes(changed))
    with pytest.raises(zlib.error):
        decompress_text(packed[:-1], sample)
