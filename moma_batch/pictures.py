"""Whether a picture's file is whole, and what a PNG says of itself; with the standard library only."""

import struct
import zlib
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
_MAGIC = (PNG, b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")


class BrokenPictureError(ValueError):
    """The file is no picture, or not all of one."""


def check_picture(content: bytes) -> None:
    """Check the kind by its first bytes; of a PNG every chunk, of a JPEG its end.

    Raises:
        BrokenPictureError: Saying what was found.
    """
    if not content:
        raise BrokenPictureError("the file is empty")
    if not content.startswith(_MAGIC):
        raise BrokenPictureError(f"the file is no picture: it begins with {content[:8]!r}")
    if content.startswith(PNG):
        for _ in chunks(content):
            pass
    elif content.startswith(b"\xff\xd8\xff") and b"\xff\xd9" not in content[-4096:]:
        raise BrokenPictureError("the JPEG ends in the middle")
    elif content.startswith(b"RIFF") and struct.unpack_from("<I", content.ljust(8), 4)[0] + 8 > len(content):
        raise BrokenPictureError("the WebP ends in the middle")


def chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG: type and data.

    Raises:
        BrokenPictureError: It ends early, or a checksum is wrong.
    """
    place, kind = len(PNG), b""
    while kind != b"IEND":
        if place + 12 > len(content):
            raise BrokenPictureError(f"the PNG ends in the middle, after {len(content)} bytes")
        size, kind = struct.unpack_from(">I4s", content, place)
        data = content[place + 8 : place + 8 + size]
        place += 12 + size
        if place > len(content):
            raise BrokenPictureError(f"the PNG ends in the middle, after {len(content)} bytes")
        if zlib.crc32(data, zlib.crc32(kind)) != struct.unpack_from(">I", content, place - 4)[0]:
            raise BrokenPictureError(f"the PNG's part {kind.decode('latin-1')} is damaged")
        yield kind, data


def png_texts(content: bytes) -> dict[str, str]:
    """The texts that a PNG carries, by their names."""
    found = {}
    for kind, data in chunks(content) if content.startswith(PNG) else ():
        if kind == b"tEXt":
            name, _, text = data.partition(b"\0")
            found[name.decode("latin-1")] = text.decode("latin-1")
    return found
