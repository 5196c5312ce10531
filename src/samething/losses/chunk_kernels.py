"""Compiles ``chunk_kernels.c`` with this machine's C compiler, in half a second, and calls it.

torch.compile was tried first. It took 16 s for the first of these functions, and what it writes vectorises
neither comparisons into bytes nor a look at a number's bits: 15 and 20 ms per step for the two passes that
take 2.3 and 1.8 here (in cache, 34,800 classes, three centres, batch 128).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from samething.errors import InputError

SOURCE: Final = Path(__file__).with_suffix(".c")
_FLAGS: Final = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# gcc takes half as long vectors as there are unless told; not every compiler and machine knows every flag
_FOR_THIS_MACHINE: Final = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
_ARGUMENTS: Final = {
    "nearest": [_POINTER] * 3 + [_SIZE] + [_POINTER] * 3 + [_SIZE] * 3 + [_FLAG],
    "spread": [_POINTER] * 3 + [_SIZE] * 3,
    "normalise": [_POINTER] * 3 + [_SIZE] * 2 + [_FLAG],
}


class ChunkKernels:
    """The functions of ``chunk_kernels.c`` on contiguous tensors; see there for what they do.

    ``suffix`` is ``f32`` or ``bf16``, the type of the matrices.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name, arguments in _ARGUMENTS.items():
            for suffix in ("f32", "bf16"):
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, None
                self._functions[name, suffix] = function
        self._through_normalisation = library.through_normalisation
        self._through_normalisation.argtypes = [_POINTER] * 3 + [_SIZE] * 2
        self._through_normalisation.restype = None

    def nearest(
        self,
        suffix: str,
        cosines: Float[Tensor, "rows b"],
        nearest: Float[Tensor, "c b"],
        which: Shaped[Tensor, "c b"] | None,
        num_centers: int,
        shift: Float[Tensor, " b"] | None = None,
        places: Int[Tensor, " t"] | None = None,
        sums: Float[Tensor, " b"] | None = None,
    ) -> None:
        """Largest cosine of each class; with a shift, 2 to the power of it less the shift, and sums."""
        self._functions["nearest", suffix](
            cosines.data_ptr(),
            None if shift is None else shift.data_ptr(),
            None if places is None else places.data_ptr(),
            0 if places is None else len(places),
            nearest.data_ptr(),
            None if which is None else which.data_ptr(),
            None if sums is None else sums.data_ptr(),
            len(nearest),
            num_centers,
            nearest.shape[1],
            shift is not None,
        )

    def spread(
        self,
        suffix: str,
        kept: Float[Tensor, "c b"],
        which: Shaped[Tensor, "c b"],
        planes: Float[Tensor, "rows b"],
        num_centers: int,
    ) -> None:
        """Each number at its centre, zero at the others."""
        self._functions["spread", suffix](
            kept.data_ptr(), which.data_ptr(), planes.data_ptr(), len(kept), num_centers, kept.shape[1]
        )

    def normalise(
        self,
        suffix: str,
        weight: Float[Tensor, "rows d"],
        lengths: Float[Tensor, "rows 1"],
        unit: Float[Tensor, "rows d"],
        lengths_known: bool,
    ) -> None:
        """Rows at unit length, and their lengths."""
        self._functions["normalise", suffix](
            weight.data_ptr(), lengths.data_ptr(), unit.data_ptr(), *weight.shape, lengths_known
        )

    def through_normalisation(
        self,
        gradient: Float[Tensor, "rows d"],
        weight: Float[Tensor, "rows d"],
        lengths: Float[Tensor, "rows 1"],
    ) -> None:
        """Gradient by the unit rows to that by the rows, in place."""
        self._through_normalisation(gradient.data_ptr(), weight.data_ptr(), lengths.data_ptr(), *weight.shape)


@functools.cache
def chunk_kernels() -> ChunkKernels:
    """Compile and load, once a process.

    Raises:
        InputError: there is no C compiler (``CC``, cc, gcc or clang), or it does not compile the file.
    """
    named = os.environ.get("CC", "").split()
    found = [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path]
    compiler = named or found[:1]
    if not compiler:
        raise InputError(
            "--compile without a C compiler",
            expected="cc, gcc or clang in PATH, or the environment variable CC",
            next_step="install one (Debian: apt install gcc), or leave --compile away",
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "chunk_kernels.so"
        for flags in _FOR_THIS_MACHINE:
            command = [*compiler, *_FLAGS, *flags, "-o", str(target), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return ChunkKernels(ctypes.CDLL(str(target)))
    raise InputError(
        f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}",
        expected="a C compiler that knows C11 and -fopenmp-simd",
        next_step="set CC to another one, or leave --compile away",
    )


def compiles_for(weight: Float[Tensor, "rows d"], num_centers: int) -> bool:
    """Whether the compiled functions take these class weights; which centre was nearest is one byte."""
    return weight.dtype == torch.float32 and weight.is_contiguous() and num_centers <= 256
