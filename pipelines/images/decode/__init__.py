"""Decode images of every format to pixels, or refuse them with a reason.

| module | what it does |
|---|---|
| `opening` | recognise the format and choose the reader: `inspect`, `decode`, `read_values`, `input_view` |
| `plain` | 8 bits in one or three channels, by libjpeg-turbo and Pillow |
| `headers` | what is known of an image before its pixels are decoded |
| `tiff_header`, `tiff`, `arrays`, ... | formats of further values and channels, each with its own library |
| `stored` | lossless storage in shards of what is not kept as it came |
| `views` | the image at the size of the network's input |

The registry packages this folder as `mae_decode` with every model version, beside `mae_core`: modules import each other
relatively, and nothing else of ours but `mae_core`.
"""

from .headers import MAX_PIXELS, ImageArray, ImageHeader, ValueArray
from .opening import SUFFIXES, data_of, decode, input_view, inspect, own_window, preview, read_values, unit_pixels
from .plain import Box, Scratch, decode_jpeg
from .views import evaluation_view

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "Box",
    "ImageArray",
    "ImageHeader",
    "Scratch",
    "ValueArray",
    "data_of",
    "decode",
    "decode_jpeg",
    "evaluation_view",
    "input_view",
    "inspect",
    "own_window",
    "preview",
    "read_values",
    "unit_pixels",
]
