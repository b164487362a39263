"""A text packed against another like it.

A long request and its answer are mostly the words of their neighbours: the same prompt around another instruction. So
each text is compressed against a *sample*, the first call of its kind, and what they share is stored once, be it a
document of 80 KB before each question. Samples are kept twice, in two tables and so on different pages, since every
call of their kind is unreadable without.
"""

import zlib

import lz4.block

SAMPLE_WINDOW = 32_768  # bytes of a sample that a text is compressed against
MAX_WHOLE_SAMPLE = SAMPLE_WINDOW - 512  # a sample no longer than this is taken whole
MAX_DECOMPRESSED_BYTES = (
    64 << 20
)  # bytes of a text: a damaged or hostile block may declare gigabytes, which would be allocated
LZ4, LONG = b"\1", b"\2"  # begin a packed text; LONG has the length of a shared beginning too; deflate's is 0x78


def compress_text(text: bytes, sample: bytes) -> bytes:
    """`text` compressed against a sample of its kind, its CRC-32 before it, since an LZ4 block has no checksum.

    Of a sample that is longer than LZ4 shall look back, what both begin with is kept as its length.
    """
    checksum = zlib.crc32(text).to_bytes(4)
    if len(sample) <= MAX_WHOLE_SAMPLE:
        return LZ4 + checksum + lz4_compress(text, sample)
    shared = shared_prefix_bytes(text, sample)
    return LONG + checksum + shared.to_bytes(4) + lz4_compress(text[shared:], sample_window(sample, shared))


def decompress_text(packed: bytes, sample: bytes) -> bytes:
    """What `pack` packed; zlib.error when either was changed."""
    kind, checksum = packed[:1], packed[1:5]
    if kind == LZ4:
        text = lz4_decompress(packed[5:], sample)
    elif kind == LONG:
        shared = int.from_bytes(packed[5:9])
        text = sample[:shared] + lz4_decompress(packed[9:], sample_window(sample, shared))
    else:
        return inflate_text(packed, sample)
    if zlib.crc32(text) != int.from_bytes(checksum):
        raise zlib.error("it is not what was packed")
    return text


def lz4_compress(text: bytes, words: bytes) -> bytes:
    """`text` as an LZ4 block with references to the words."""
    block: bytes = lz4.block.compress(text, dict=words)
    return block


def lz4_decompress(block: bytes, words: bytes) -> bytes:
    """What `squeezed` squeezed, or something else where either was changed; zlib.error where that shows."""
    if int.from_bytes(block[:4], "little") > MAX_DECOMPRESSED_BYTES:
        raise zlib.error(f"it declares more than {LARGEST:,} bytes")
    try:
        text: bytes = lz4.block.decompress(block, dict=words)
    except (lz4.block.LZ4BlockError, ValueError, MemoryError) as error:
        raise zlib.error(str(error)) from error
    return text


def inflate_text(packed: bytes, sample: bytes) -> bytes:
    """A text of a store as it was written before LZ4; deflate carries the checksums of text and sample."""
    stretch = zlib.decompressobj(zdict=sample)
    text = stretch.decompress(packed, MAX_DECOMPRESSED_BYTES)
    if not stretch.eof:
        raise zlib.error(f"cut short, or more than {LARGEST:,} bytes")
    return text


def shared_prefix_bytes(one: bytes, other: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def sample_window(sample: bytes, place: int) -> bytes:
    """As much of a sample as a text is compressed against, most of it from `place` on."""
    return sample[max(0, place - MAX_WHOLE_SAMPLE // 4) : place + MAX_WHOLE_SAMPLE * 3 // 4]
