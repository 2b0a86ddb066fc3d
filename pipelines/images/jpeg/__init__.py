"""Parse the header of a JPEG file (ITU-T T.81): its marker segments, and the grid of its MCUs."""

from dataclasses import dataclass
from typing import NamedTuple

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
JFIF, ADOBE = 0xE0, 0xEE
DQT, DHT, DRI, SOS, RST0 = 0xDB, 0xC4, 0xDD, 0xDA, 0xD0
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
_MAX_PARTS = 1000


class Component(NamedTuple):
    """A colour component: its sampling factors and the numbers of its Huffman tables."""

    across: int
    down: int
    dc_table: int
    ac_table: int


class Part(NamedTuple):
    """A marker segment of the header: its marker and the byte range of its content."""

    marker: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class JpegHeader:
    """Header of a sequential JPEG of one scan with one or three components: only these can be decoded in part."""

    height_px: int
    width_px: int
    components: tuple[Component, ...]
    restart_interval: int
    """MCUs between restart markers; 0 without markers."""
    size_at: int
    """Byte offset of height and width, two bytes each."""
    scan_at: int
    """Byte offset of the entropy-coded data."""
    parts: tuple[Part, ...]

    @property
    def mcu_height_px(self) -> int:
        return 8 * max(c.down for c in self.components)

    @property
    def mcu_width_px(self) -> int:
        return 8 * max(c.across for c in self.components)

    @property
    def mcu_rows(self) -> int:
        return -(-self.height_px // self.mcu_height_px)

    @property
    def mcus_per_row(self) -> int:
        return -(-self.width_px // self.mcu_width_px)

    @property
    def is_subsampled(self) -> bool:
        return self.mcu_height_px * self.mcu_width_px > 64


def read_header(content: bytes) -> JpegHeader:
    """Parse the header of a sequential JPEG. Raises ValueError with the reason for any other or damaged file."""
    parts = _parts(content)
    frame = next((part for part in parts if part.marker in _FRAMES), None)
    scan = parts[-1]
    if frame is None or frame.marker not in _SEQUENTIAL:
        raise ValueError("not a sequential JPEG")
    body = content[frame.start : frame.stop]
    if len(body) < 6 or body[0] != 8 or body[5] not in (1, 3) or len(body) != 6 + 3 * body[5]:
        raise ValueError("not a JPEG of 8 bits and one or three components")
    height_px, width_px = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if not height_px or not width_px:
        raise ValueError("a JPEG without a size in its header")
    return JpegHeader(
        height_px=height_px,
        width_px=width_px,
        components=_components(body[6:], content[scan.start : scan.stop]),
        restart_interval=_restart_interval(content, parts),
        size_at=frame.start + 1,
        scan_at=scan.stop,
        parts=parts,
    )


def _parts(content: bytes) -> tuple[Part, ...]:
    """Return the header's marker segments up to the start of the first scan, which is the last."""
    if content[:2] != SOI:
        raise ValueError("not a JPEG")
    found, at = [], 2
    while len(found) < _MAX_PARTS:
        if at + 4 > len(content) or content[at] != 0xFF:
            raise ValueError("damaged JPEG header")
        marker = content[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        stop = at + 2 + (content[at + 2] << 8 | content[at + 3])
        if marker == 0 or RST0 <= marker <= 0xD9 or stop < at + 4 or stop > len(content):
            raise ValueError("damaged JPEG header")
        found.append(Part(marker, at + 4, stop))
        if marker == SOS:
            return tuple(found)
        at = stop
    raise ValueError("a JPEG header of too many marker segments")


def _components(frame: bytes, scan: bytes) -> tuple[Component, ...]:
    """Combine the frame's list of (id, sampling, quantisation) with the scan's list of (id, tables)."""
    count = len(frame) // 3
    if scan[:1] != bytes([count]) or len(scan) != 4 + 2 * count or scan[-3:] != b"\x00\x3f\x00":
        raise ValueError("not a JPEG of one sequential scan")
    if frame[0::3] != scan[1:-3:2]:
        raise ValueError("a JPEG whose scan and frame differ in their components")
    found = tuple(
        Component(factors >> 4, factors & 15, tables >> 4, tables & 15)
        for factors, tables in zip(frame[1::3], scan[2:-3:2])
    )
    if any(not 1 <= factor <= 4 for c in found for factor in (c.across, c.down)):
        raise ValueError("damaged JPEG header")
    # A single component is not interleaved: its MCU is one block, regardless of its sampling factors.
    return found if count > 1 else (Component(1, 1, found[0].dc_table, found[0].ac_table),)


def _restart_interval(content: bytes, parts: tuple[Part, ...]) -> int:
    found = [part for part in parts if part.marker == DRI]
    if any(part.stop - part.start != 2 for part in found):
        raise ValueError("damaged JPEG header")
    return int.from_bytes(content[found[-1].start : found[-1].stop], "big") if found else 0
