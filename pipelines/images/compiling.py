"""Compile Python functions to machine code with numba; building blocks for custom LLVM instructions."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic
from numba.np import arrayobj

# Typed as Any: callers of an intrinsic omit the typing context, the first parameter of its function.
inlined: Any = intrinsic


def compiler(folder: Path) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a folder's functions at their first call and caches the machine code.

    The cache is stored next to the file, or in the user's cache folder. Compiled functions avoid what takes seconds to
    compile: callers allocate arrays, and loops replace slice assignments.
    """
    # Numba caches a function until its own file changes, but it may call functions of other files: hash them all.
    sources = b"".join(path.read_bytes() for path in (Path(__file__), *sorted(folder.glob("*.py"))))
    stamp = hashlib.sha256(sources).hexdigest()[:16]

    def compiled(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{stamp}"
        try:
            return numba.njit(cache=True, nogil=True)(function)
        except RuntimeError:
            # No cache folder is writable: each process compiles for itself.
            return numba.njit(nogil=True)(function)

    return compiled


def pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any, pointee: ir.Type) -> Any:
    """Return a pointer to element `at` of a one-dimensional array."""
    data = arrayobj.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), pointee.as_pointer())
