"""Settings of a process that belongs to bdprune: the command line, and the processes that it starts."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, for later tensors.

    By default glibc returns every large block to the system. Each new tensor then consists of pages that the system
    must first clear, which takes long for large feature maps. The setting
    affects the whole process, so only programs should make it, not libraries.

    Returns:
        Whether it was possible: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
