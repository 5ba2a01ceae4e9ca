"""Products of matrices by a BLAS library: numpy's own, or another that is pointed to.

numpy's wheels carry OpenBLAS (Accelerate on macOS). Work is divided among threads here, by columns of the product, and
each calls BLAS for its own part. So BLAS itself must use one thread per call, which threadpoolctl sees to.

Sources: cblas.h of OpenBLAS; the names of its symbols in scipy-openblas64 and in MKL; threadpoolctl's README.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxonnx.errors import UsageError

# Names another BLAS: the path of a shared library, the name of one that the system finds, or of a Python package with
# a `get_lib_dir`, such as scipy_openblas64.
VARIABLE = "FLUXONNX_BLAS"

# Names of the function in C, and the type of its sizes. Builds with 64-bit sizes have suffixes, and scipy's a prefix.
SYMBOLS = (
    ("scipy_cblas_sgemm64_", ctypes.c_int64),
    ("cblas_sgemm64_", ctypes.c_int64),
    ("cblas_sgemm_64", ctypes.c_int64),
    ("scipy_cblas_sgemm", ctypes.c_int32),
    ("cblas_sgemm", ctypes.c_int32),
)
ROW_MAJOR, AS_IS, TRANSPOSED = 101, 111, 112

_lock = threading.Lock()
_running: list[Any] = []  # runs that are under way; the first holds what ends the limit


@dataclass(frozen=True)
class Blas:
    """A BLAS library.

    Attributes:
        name: For a person.
        sgemm: Its cblas_sgemm; None if only numpy can call it.
        size: The type of its sizes.
        is_numpys: Whether it is the one that `numpy.matmul` calls.
    """

    name: str
    sgemm: Any
    size: Any
    is_numpys: bool

    def multiply(self, a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
        """Write a @ b into `out`, or add it.

        Args:
            a: float32 [rows, inner].
            b: float32 [inner, columns].
            out: float32 [rows, columns], no part of a or b; rows may lie apart.
            add: Whether what `out` holds is kept.
        """
        if self.sgemm is None or (self.is_numpys and not add) or not self._call(a, b, out, add):
            if add:
                out += a @ b
            else:
                np.matmul(a, b, out=out)

    def _call(self, a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool) -> bool:
        """Call the library; returns whether it can be, which depends on the strides."""
        if 0 in (*out.shape, a.shape[1]):
            return False
        one, other, result = _layout(a), _layout(b), _layout(out)
        if one is None or other is None or result is None or result[0] != AS_IS:
            return False
        n, f = self.size, ctypes.c_float
        self.sgemm(
            ROW_MAJOR, one[0], other[0], n(out.shape[0]), n(out.shape[1]), n(a.shape[1]), f(1.0),
            ctypes.c_void_p(a.ctypes.data), n(one[1]), ctypes.c_void_p(b.ctypes.data), n(other[1]),
            f(1.0 if add else 0.0), ctypes.c_void_p(out.ctypes.data), n(result[1]),
        )  # fmt: skip
        return True


def _layout(matrix: np.ndarray) -> tuple[int, int] | None:
    """Return whether a matrix lies transposed in memory, and the distance of its rows there; None if neither."""
    rows, columns = matrix.shape
    vertical, horizontal = (stride // 4 for stride in matrix.strides)
    if matrix.dtype != np.float32 or any(stride % 4 for stride in matrix.strides):
        return None
    if (horizontal == 1 or columns == 1) and (vertical >= columns or rows == 1):
        return AS_IS, max(vertical, columns)
    if (vertical == 1 or rows == 1) and (horizontal >= rows or columns == 1):
        return TRANSPOSED, max(horizontal, rows)
    return None


def find_blas(name: str | None = None) -> Blas:
    """Return the BLAS library to use.

    Args:
        name: See `VARIABLE`; by default what that environment variable says, else numpy's own.

    Raises:
        UsageError: There is no such library, it is no BLAS, or threadpoolctl is missing.
    """
    name = name or os.environ.get(VARIABLE)
    controller = _controller()
    if not name:
        for library in controller.info():
            # numpy's wheels keep their libraries in numpy.libs, or in numpy/.dylibs
            if library["user_api"] == "blas" and "numpy" in Path(library["filepath"]).parent.as_posix():
                with suppress(OSError, UsageError):
                    return _open(library["filepath"], f"numpy's {_described(library)}", is_numpys=True)
        return Blas("numpy's BLAS", None, None, is_numpys=True)
    path = _library_path(name)
    try:
        return _open(path, name, is_numpys=False)
    except OSError as error:
        raise UsageError(f"{VARIABLE}: {path} can't be loaded ({error}): give the path of a BLAS library") from None


def _described(library: dict[str, Any]) -> str:
    return " ".join(str(library[key]) for key in ("internal_api", "version", "architecture") if library.get(key))


def _library_path(name: str) -> str:
    """Return what to load for a name; see `VARIABLE`."""
    if Path(name).is_file():
        return name
    with suppress(ImportError, AttributeError, ValueError):
        package = importlib.import_module(name.replace("-", "_"))
        folder = Path(package.get_lib_dir())
        found = sorted(file for file in folder.iterdir() if package.get_library() in file.name and file.suffix != ".a")
        if found:
            return str(found[0])
    found_name = ctypes.util.find_library(name.removeprefix("lib")) if os.sep not in name else None
    if found_name is None:
        raise UsageError(
            f"{VARIABLE} names {name!r}, which is no file, no library of the system and no Python package with one: "
            f"give the path of a BLAS library, or unset it to use numpy's own"
        )
    return found_name


def _open(path: str, name: str, is_numpys: bool) -> Blas:
    library = ctypes.CDLL(path)
    for symbol, size in SYMBOLS:
        if sgemm := getattr(library, symbol, None):
            sgemm.restype = None
            sgemm.argtypes = [
                *[ctypes.c_int] * 3, *[size] * 3, ctypes.c_float, ctypes.c_void_p, size, ctypes.c_void_p, size,
                ctypes.c_float, ctypes.c_void_p, size,
            ]  # fmt: skip
            return Blas(name, sgemm, size, is_numpys)
    raise UsageError(f"{path} has no cblas_sgemm: set {VARIABLE} to a BLAS library with the C interface")


def _controller() -> Any:
    """Return what sets the threads of the libraries that are loaded now.

    Raises:
        UsageError: threadpoolctl is missing.
    """
    try:
        from threadpoolctl import ThreadpoolController  # an extra
    except ImportError:
        raise UsageError(
            "the openblas provider needs threadpoolctl: run pip install threadpoolctl, or use --provider cpu"
        ) from None
    return ThreadpoolController()


@contextmanager
def one_thread_per_call() -> Iterator[None]:
    """Have BLAS compute each call on the thread that calls, for the length of a `with` block.

    The setting is the process's, so it is restored when the last of several blocks ends.
    """
    with _lock:
        if not _running:
            limit = _controller().limit(limits=1, user_api="blas")
            limit.__enter__()
            _running.append(limit)
        else:
            _running.append(None)
    try:
        yield
    finally:
        with _lock:
            if len(_running) == 1:
                _running[0].__exit__(None, None, None)
                _running.clear()
            else:
                _running.pop()
