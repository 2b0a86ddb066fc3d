"""What all images of a prepared dataset share: plain 8-bit pixels, or values of one type and number of channels.

The first readable images of the listing decide it. An image of another kind is quarantined: no dataset can hold both,
and which one is meant is for its owner to say.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mae_core.errors import UserError
from mae_core.normalization import Reading
from pipelines.config import PrepareConfig
from pipelines.images.decode import ImageHeader, inspect
from pipelines.images.decode.headers import MissingLibraryError
from pipelines.sources.reading import Content

NUM_EXAMINED = 16
_EIGHT_BITS, _SIXTEEN_BITS = ("uint8", 3), ("uint16", 3)


@dataclass(frozen=True, kw_only=True)
class PixelKind:
    """dtype and channels of all images; 3 channels of whole numbers stand for 1 and 3."""

    dtype: str
    channels: int
    is_plain: bool
    """Whether shards hold 8-bit images in one or three channels as they came, the same as without this module."""

    def check(self, header: ImageHeader) -> None:
        """Raise ValueError, the reason for quarantine, if an image is of another kind."""
        # 16 bits of full range are read as 8 where the others have no more.
        fitting = (_EIGHT_BITS, _SIXTEEN_BITS) if self.is_plain else ((self.dtype, self.channels),)
        if header.kind not in fitting:
            raise ValueError(
                f"other pixels: {shown(*header.kind)}, but most images of the source are "
                f"{shown(self.dtype, self.channels)}; prepare them apart"
            )


PLAIN = PixelKind(dtype="uint8", channels=3, is_plain=True)


def kind_of(contents: Iterable[Content], config: PrepareConfig) -> PixelKind:
    """Return the most frequent kind of these images, the first one on a tie; plain if none is readable.

    Raises UserError if a library that reads them is missing.
    """
    found: Counter[tuple[str, int]] = Counter()
    for content in contents:
        try:
            if not isinstance(content, ValueError):
                found[inspect(content, config.max_pixels, config.reading).kind] += 1
        except MissingLibraryError as error:
            raise UserError(str(error)) from None
        except ValueError:
            continue
    kind = found.most_common(1)[0][0] if found else _EIGHT_BITS
    is_plain = kind == _EIGHT_BITS and not config.range and config.reading == Reading()
    return PixelKind(dtype=kind[0], channels=kind[1], is_plain=is_plain)


def shown(dtype: str, channels: int) -> str:
    """Describe a kind for people."""
    if dtype in ("uint8", "uint16") and channels == 3:
        return f"{dtype} in 1 or 3 channels"
    return f"{dtype} in {channels} channel{'s' if channels > 1 else ''}"
