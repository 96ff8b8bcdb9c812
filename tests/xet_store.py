"""Files out of what hf_xet uploads: chunks in xorbs, and shards that say which of them make a file.

Formats: https://huggingface.co/docs/xet. Hashes of chunks and xorbs are BLAKE3's, which Python does not have:
they are taken as names, and a file is checked by its size and the SHA-256 that its shard states.
"""

import hashlib
import struct

MAGIC = b"HFRepoMetaData\0UigEj{\x81W\x83\xa5\xbd\xd9\\\xcd\xd1J\xa9"
ENTRY = 48  # bytes of whatever a shard holds
END = b"\xff" * 32
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30


class XetStore:
    def __init__(self):
        self.xorbs: dict[str, list[bytes]] = {}

    def add_xorb(self, name: str, content: bytes) -> None:
        self.xorbs[name] = read_chunks(content)

    def files_of(self, shard: bytes) -> dict[str, bytes]:
        """The files of a shard by their SHA-256. ValueError for whatever is wrong with it."""
        if not shard.startswith(MAGIC):
            raise ValueError("not a shard")
        entries = (shard[i : i + ENTRY] for i in range(ENTRY, len(shard), ENTRY))
        found = {}
        while (header := next(entries))[:32] != END:
            flags, parts = struct.unpack_from("<II", header, 32)
            content = b"".join([self.read(next(entries)) for _ in range(parts)])
            if flags & VERIFIED:
                for _ in range(parts):
                    next(entries)
            stated = hash_name(next(entries)[:32]) if flags & WITH_SHA256 else "none"
            if stated != hashlib.sha256(content).hexdigest():
                raise ValueError(f"a file of {len(content)} bytes has another SHA-256 than {stated}")
            found[stated] = content
        return found

    def read(self, entry: bytes) -> bytes:
        """Some successive chunks of a xorb."""
        _, size, first, last = struct.unpack_from("<4I", entry, 32)
        content = b"".join(self.xorbs[hash_name(entry[:32])][first:last])
        if len(content) != size:
            raise ValueError(f"chunks {first} to {last} have {len(content)} bytes, not {size}")
        return content


def hash_name(binary: bytes) -> str:
    """Four little-endian numbers as hexadecimal digits."""
    return "".join(binary[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def read_chunks(xorb: bytes) -> list[bytes]:
    """Stored, LZ4, or LZ4 of every fourth byte after each other; headers of eight bytes."""
    chunks, at = [], 0
    while at < len(xorb) and xorb[at] == 0:  # or it is the footer
        size, scheme = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        length = int.from_bytes(xorb[at + 5 : at + 8], "little")
        chunk = xorb[at + 8 : at + 8 + size]
        if scheme:
            chunk = lz4_frame(chunk)
        if scheme == 2:
            chunk = interleaved(chunk)
        if len(chunk) != length:
            raise ValueError(f"a chunk has {len(chunk)} bytes, not {length}")
        chunks.append(bytes(chunk))
        at += 8 + size
    return chunks


def interleaved(grouped: bytes) -> bytes:
    result, at = bytearray(len(grouped)), 0
    for i in range(4):
        size = len(result[i::4])
        result[i::4] = grouped[at : at + size]
        at += size
    return bytes(result)


def lz4_frame(frame: bytes) -> bytes:
    magic, flags = struct.unpack_from("<IB", frame)
    if magic != 0x184D2204:
        raise ValueError("not an LZ4 frame")
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)  # content size, dictionary
    result = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        block = frame[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:
            result += block
        else:
            lz4_block(block, result)
        at += 4 + len(block) + 4 * bool(flags & 16)  # checksum
    return bytes(result)


def lz4_block(block: bytes, result: bytearray) -> None:
    """Appends to `result`, whose end the block may refer to."""
    at = 0

    def length(total: int) -> int:
        nonlocal at
        more = total == 15
        while more:
            total += block[at]
            more = block[at] == 255
            at += 1
        return total

    while at < len(block):
        token = block[at]
        at += 1
        literals = length(token >> 4)
        result += block[at : at + literals]
        at += literals
        if at < len(block):  # the last sequence has literals alone
            distance = int.from_bytes(block[at : at + 2], "little")
            at += 2
            size = length(token & 15) + 4
            repeated = result[-distance:]
            result += (repeated * (size // len(repeated) + 1))[:size]
