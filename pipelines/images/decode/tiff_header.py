"""Parse the header of a TIFF file (TIFF 6.0 and BigTIFF): its pages, and what the samples of the first one mean.

Decoders differ in what they make of further samples, of overviews and of white-is-zero, and say nothing. So the tags
are judged here before any of them is asked.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
ASSOCIATED, UNASSOCIATED = 1, 2
"""Values of tag ExtraSamples that declare an alpha channel."""
_SAMPLES_OF = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, CIELAB: 3}
_REDUCED, _MASK = 1, 4
# Compressions that Pillow reads: none, CCITT, LZW, JPEG, deflate, PackBits, LZMA, zstd.
_OF_PILLOW = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000)
_MAX_PAGES, _MAX_TAGS, _MAX_VALUE_BYTES = 10_000, 1_000, 2**16
_SIZES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}
_TAGS = {
    254: "subfile", 256: "width", 257: "height", 258: "bits", 259: "compression", 262: "photometric",
    270: "description", 274: "orientation", 277: "samples", 284: "planar", 320: "palette", 338: "extras",
    339: "formats", 34735: "geo", 42112: "gdal", 42113: "nodata",
}  # fmt: skip


@dataclass(frozen=True)
class Page:
    """Tags of one page (IFD) by our own names; numbers are tuples."""

    number: int
    tags: dict[str, Any]

    def first(self, name: str, default: int) -> int:
        values = self.tags.get(name, ())
        return int(values[0]) if values else default

    @property
    def layout(self) -> tuple[Any, ...]:
        """What pages have in common that are read alike."""
        names = ("height", "width", "bits", "photometric", "samples", "extras", "formats", "orientation", "nodata")
        return tuple(self.tags.get(name) for name in names)

    @property
    def is_reduced(self) -> bool:
        """Whether it is an overview or a transparency mask of another page."""
        return bool(self.first("subfile", 0) & (_REDUCED | _MASK))


@dataclass(frozen=True)
class TiffHeader:
    """Pages of full resolution, and the layout of the first."""

    pages: tuple[Page, ...]
    num_overviews: int

    @property
    def page(self) -> Page:
        return self.pages[0]

    @property
    def size_px(self) -> tuple[int, int]:
        return self.page.first("height", 0), self.page.first("width", 0)

    @property
    def num_frames(self) -> int:
        """Pages of full resolution; ImageJ may store many images behind one page."""
        description = self.page.tags.get("description", b"")
        if len(self.pages) == 1 and description.startswith(b"ImageJ="):
            for line in description.split(b"\n"):
                if line.startswith(b"images=") and line[7:].strip().isdigit():
                    return max(1, int(line[7:]))
        return len(self.pages)

    @property
    def bits(self) -> int:
        """Bits per sample. Raises ValueError if they differ."""
        found = set(self.page.tags.get("bits", (1,)))
        if len(found) != 1:
            raise ValueError(
                f"unsupported pixels: samples of {' and '.join(map(str, sorted(found)))} bits in one image"
            )
        return found.pop()

    @property
    def dtype(self) -> str:
        """Kind of the stored samples, such as uint16 or float32. Raises ValueError for complex and unknown ones."""
        formats = set(self.page.tags.get("formats", (1,)))
        kind = {1: "uint", 2: "int", 3: "float", 4: "uint"}.get(formats.pop()) if len(formats) == 1 else None
        if kind is None:
            raise ValueError("unsupported pixels: complex or mixed samples")
        bits = self.bits
        return f"{kind}{bits}" if kind != "uint" or bits in (1, 2, 4, 8, 16, 32, 64) else "uint16"

    @property
    def photometric(self) -> int:
        return self.page.first("photometric", BLACK_IS_ZERO)

    @property
    def num_samples(self) -> int:
        return self.page.first("samples", 1)

    @cached_property
    def alpha(self) -> int:
        """ASSOCIATED or UNASSOCIATED if the last sample is declared as alpha, otherwise 0.

        Raises ValueError if another sample is, or for colours that we do not know.
        """
        own = _SAMPLES_OF.get(self.photometric)
        if own is None:
            raise ValueError(f"unsupported pixels: TIFF photometric interpretation {self.photometric}")
        num_extra = self.num_samples - own
        if num_extra < 0:
            raise ValueError(f"damaged header: {self.num_samples} samples of photometric {self.photometric}")
        extras = (*self.page.tags.get("extras", ()), *(0,) * num_extra)[:num_extra]
        if any(extras[:-1]):
            raise ValueError("unsupported pixels: alpha that is not the last sample")
        return extras[-1] if extras and extras[-1] in (ASSOCIATED, UNASSOCIATED) else 0

    @property
    def num_colours(self) -> int:
        """Samples that are not alpha."""
        return self.num_samples - bool(self.alpha)

    @property
    def is_plain(self) -> bool:
        """Whether Pillow reads it as it is meant: 8 bits or fewer, in gray, palette or colour, perhaps with alpha."""
        gray = self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, PALETTE)
        if self.page.first("compression", 1) not in _OF_PILLOW:
            return False
        return self.dtype in ("uint1", "uint2", "uint4", "uint8") and self.num_colours == (
            1 if gray else _SAMPLES_OF[self.photometric]
        )

    @property
    def nodata(self) -> float | None:
        """GDAL's value of pixels without data."""
        text = self.page.tags.get("nodata", b"").strip(b"\0 ")
        try:
            return float(text) if text else None
        except ValueError:
            return None


def read_tiff_header(content: bytes) -> TiffHeader:
    """Parse the pages of a TIFF. Raises ValueError if it is damaged or has no page of full resolution."""
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    try:
        at = struct.unpack_from(f"{order}{'Q' if big else 'I'}", content, 8 if big else 4)[0]
        pages, seen = [], set()
        while at and len(pages) < _MAX_PAGES:
            if at in seen:
                raise ValueError("damaged header: TIFF pages in a circle")
            seen.add(at)
            tags, at = _tags(content, at, order, big=big)
            pages.append(Page(len(pages), tags))
    except struct.error:
        raise ValueError("damaged header: TIFF tags outside the file") from None
    if at:
        raise ValueError(f"too many pages: more than {_MAX_PAGES}")
    full = tuple(page for page in pages if not page.is_reduced)
    if pages and pages[0].tags.get("description", b"").startswith(b"Aperio"):
        # A slide: its first page is the scan, and the others are smaller levels, a thumbnail, label and macro.
        full = tuple(pages[:1])
    if not full:
        raise ValueError("damaged header: a TIFF without a page of full resolution")
    return TiffHeader(full, len(pages) - len(full))


def _tags(content: bytes, at: int, order: str, *, big: bool) -> tuple[dict[str, Any], int]:
    """Return the tags of a page that we know, and the offset of the next page."""
    count = struct.unpack_from(f"{order}{'Q' if big else 'H'}", content, at)[0]
    if count > _MAX_TAGS:
        raise ValueError(f"damaged header: a TIFF page of {count} tags")
    at += 8 if big else 2
    entry, inline, offset = ("HHQ", 12, "Q") if big else ("HHI", 8, "I")
    size, room = (20, 8) if big else (12, 4)
    found: dict[str, Any] = {}
    for i in range(count):
        start = at + i * size
        tag, kind, number = struct.unpack_from(order + entry, content, start)
        if tag not in _TAGS or kind not in _SIZES:
            continue
        code = _SIZES[kind]
        num_bytes = number * struct.calcsize(order + code)
        if num_bytes > _MAX_VALUE_BYTES:
            number = _MAX_VALUE_BYTES // struct.calcsize(order + code)
        place = start + inline
        if num_bytes > room:
            place = struct.unpack_from(order + offset, content, place)[0]
        values = struct.unpack_from(f"{order}{number}{code}", content, place)
        found[_TAGS[tag]] = values[0] if code == "s" else values
    return found, struct.unpack_from(order + offset, content, at + count * size)[0]
