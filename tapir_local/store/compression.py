"""Compress a request or an answer with a similar text as the dictionary.

Requests of one stage use the same prompt around different instructions. Each text is therefore compressed against a
*sample*, the first call of the same kind, and the shared part is stored only once, even a document of 80 KB before each
question. On 14,148 calls of the quickstart the store has 6.4 MB, and 13.8 MB with one zstd frame per text. Samples are
stored twice, in two tables and so on different pages, because the calls of a kind cannot be read without their sample.
"""

import zlib

import lz4.block

SAMPLE_WINDOW = 32_768  # bytes of a sample that are used as the dictionary
MAX_WHOLE_SAMPLE = SAMPLE_WINDOW - 512  # bytes: a sample of at most this length is used whole
MAX_DECOMPRESSED_BYTES = 64 << 20  # a damaged or hostile block may declare gigabytes, which would be allocated
# The first byte of a compressed text. SHARED_PREFIX also stores the length of a shared prefix. Deflate's is 0x78.
LZ4, SHARED_PREFIX = b"\1", b"\2"


def compress_text(text: bytes, sample: bytes) -> bytes:
    """Compress `text` against a sample. A CRC-32 is stored in front, because an LZ4 block has no checksum.

    If the sample is longer than MAX_WHOLE_SAMPLE, only the length of the prefix that both share is stored for it.
    """
    checksum = zlib.crc32(text).to_bytes(4)
    if len(sample) <= MAX_WHOLE_SAMPLE:
        return LZ4 + checksum + lz4_compress(text, sample)
    shared = shared_prefix_bytes(text, sample)
    return SHARED_PREFIX + checksum + shared.to_bytes(4) + lz4_compress(text[shared:], sample_window(sample, shared))


def decompress_text(packed: bytes, sample: bytes) -> bytes:
    """The inverse of `compress_text`; zlib.error if the text or the sample was changed."""
    kind, checksum = packed[:1], packed[1:5]
    if kind == LZ4:
        text = lz4_decompress(packed[5:], sample)
    elif kind == SHARED_PREFIX:
        shared = int.from_bytes(packed[5:9])
        text = sample[:shared] + lz4_decompress(packed[9:], sample_window(sample, shared))
    else:
        return inflate_text(packed, sample)
    if zlib.crc32(text) != int.from_bytes(checksum):
        raise zlib.error("the checksum does not match")
    return text


def lz4_compress(text: bytes, words: bytes) -> bytes:
    """Compress `text` to an LZ4 block with `words` as the dictionary."""
    block: bytes = lz4.block.compress(text, dict=words)
    return block


def lz4_decompress(block: bytes, words: bytes) -> bytes:
    """Decompress an LZ4 block; zlib.error if LZ4 detects damage. Undetected damage needs the caller's checksum."""
    if int.from_bytes(block[:4], "little") > MAX_DECOMPRESSED_BYTES:
        raise zlib.error(f"it declares more than {MAX_DECOMPRESSED_BYTES:,} bytes")
    try:
        text: bytes = lz4.block.decompress(block, dict=words)
    except (lz4.block.LZ4BlockError, ValueError, MemoryError) as error:
        raise zlib.error(str(error)) from error
    return text


def inflate_text(packed: bytes, sample: bytes) -> bytes:
    """Decompress a text of an older store, which used deflate; deflate checks both the text and the sample."""
    stretch = zlib.decompressobj(zdict=sample)
    text = stretch.decompress(packed, MAX_DECOMPRESSED_BYTES)
    if not stretch.eof:
        raise zlib.error(f"cut short, or more than {MAX_DECOMPRESSED_BYTES:,} bytes")
    return text


def shared_prefix_bytes(one: bytes, other: bytes) -> int:
    """The length in bytes of the common prefix of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def sample_window(sample: bytes, place: int) -> bytes:
    """The part of a long sample that serves as the dictionary: three quarters of it from `place` on."""
    return sample[max(0, place - MAX_WHOLE_SAMPLE // 4) : place + MAX_WHOLE_SAMPLE * 3 // 4]
