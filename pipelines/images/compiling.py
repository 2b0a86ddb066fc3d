"""Python functions become machine code: numba's compiler, and what our own instructions for it are built from."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic
from numba.np import arrayobj

# What an intrinsic takes is not what its function takes, which begins with the typing context.
inlined: Any = intrinsic


def compiler(folder: Path) -> Callable[[Callable[..., Any]], Any]:
    """Makes a folder's functions compiled at their first call, kept beside their file or in the user's cache for later
    processes.

    What would take seconds to compile (arrays made, slices assigned) is left to the callers or to loops.
    """
    # Numba keeps a function under its name until its own file changes; those that it calls are in others.
    sources = b"".join(path.read_bytes() for path in (Path(__file__), *sorted(folder.glob("*.py"))))
    stamp = hashlib.sha256(sources).hexdigest()[:16]

    def compiled(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{stamp}"
        try:
            return numba.njit(cache=True, nogil=True)(function)
        except RuntimeError:
            # No folder that can be written to: each process compiles.
            return numba.njit(nogil=True)(function)

    return compiled


def pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any, pointee: ir.Type) -> Any:
    """Where element `at` of an array of one dimension lies."""
    data = arrayobj.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), pointee.as_pointer())
