"""System calls that Python lacks, or makes while it holds the GIL. Each raises OSError, or says that it is missing."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys

_LINUX = sys.platform == "linux"
if _LINUX:
    import resource
_NUMBERS_ARE_KNOWN = _LINUX and os.uname().machine in ("x86_64", "aarch64")  # some others number flags and calls anew
_libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL

_PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_MAP_FIXED_NOREPLACE = 0x100000  # Linux 4.17
_MAP_NORESERVE = 0x4000 if _NUMBERS_ARE_KNOWN else 0
_MADV_WILLNEED = 3
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # Linux 5.14
_MAP_FAILED = ctypes.c_void_p(-1).value

_mmap = getattr(_libc, "mmap64", None) or _libc.mmap  # mmap64: 64-bit offsets also on 32-bit glibc
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_SYS_CACHESTAT = 451  # Linux 6.5
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000  # Linux 6.1


def map_file(address: int, nbytes: int, fd: int, offset_bytes: int) -> None:
    """Put private, writable pages of a file where pages of the caller's are; all arguments are multiples of a page."""
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    if _mmap(address, nbytes, _PROT_READ_WRITE, flags, fd, offset_bytes) == _MAP_FAILED:
        raise _last_error()


def fill_hole(address: int, nbytes: int) -> None:
    """Put anonymous pages where nothing is mapped; without effect where something is."""
    if _LINUX:
        _mmap(address, nbytes, _PROT_READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE, -1, 0)


def prefer_huge_pages(address: int, nbytes: int) -> None:
    """What is read into the page cache for these pages should come in huge ones; a hint, which may have no effect."""
    if _LINUX:
        _madvise(address, nbytes, _MADV_HUGEPAGE)


def populate(address: int, nbytes: int) -> None:
    """Fault mapped pages in. OSError where a use of them would be a bus error; where the kernel is too old, a hint."""
    if _LINUX and _madvise(address, nbytes, _MADV_POPULATE_READ) == 0:
        return
    if _LINUX and ctypes.get_errno() != errno.EINVAL:
        raise _last_error()
    _madvise(address, nbytes, _MADV_WILLNEED)


def may_keep_mappings() -> bool:
    """Whether mappings of files cost nothing while :func:`drop` has left nothing of them in memory.

    Not where address space is limited (``ulimit -v``); nor but on Linux, for elsewhere written pages may outlive that.
    """
    return _LINUX and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def drop(address: int, nbytes: int) -> None:
    """Give the memory of mapped pages back to the system; used again, they are what the file holds."""
    _madvise(address, nbytes, mmap.MADV_DONTNEED)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


def cached_pages(fd: int, offset_bytes: int, nbytes: int) -> int | None:
    """Pages of a range of a file that are in the page cache; None where the kernel cannot, or may not, tell."""
    if not _NUMBERS_ARE_KNOWN:
        return None
    asked, found = _Range(offset_bytes, nbytes), _CacheStat()
    failed = _libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT), ctypes.c_int(fd), ctypes.byref(asked), ctypes.byref(found), ctypes.c_uint(0)
    )
    return None if failed else int(found.cached)


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """(memory, file offset) alignment in bytes that direct reads need, zeros where refused; None where not told."""
    statx = getattr(_libc, "statx", None) if _LINUX else None
    if statx is None:
        return None
    status = (ctypes.c_uint32 * 64)()  # struct statx: 256 bytes
    if statx(ctypes.c_int(fd), b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_DIOALIGN), status):
        return None
    if not status[0] & _STATX_DIOALIGN:  # stx_mask
        return None
    return status[38], status[39]  # stx_dio_mem_align, stx_dio_offset_align


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
