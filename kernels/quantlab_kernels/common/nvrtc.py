"""CUDA C++ to machine code at run time, with the NVRTC that torch's CUDA wheels bring: no nvcc, no headers.

The library is called through ctypes: its C interface is small and stable, and no further package is needed (torch
brings `cuda-bindings` only since 2.11). Compiled kernels are kept on disk; many processes may compile the same kernel
at the same time, each writes a temporary file and renames it, and a damaged file is noticed and compiled anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantlab_kernels.common.backends import Mendable
from quantlab_kernels.common.cache import cache_folder

_MAGIC = b"quantlab cubin 1\n"
# ptxas gave up on asynchronous warpgroup MMA: right results, a fraction of the speed.
_SERIALIZED = re.compile(r"C75(10|14)|[Pp]otential [Pp]erformance [Ll]oss")


class CompilerMissingError(ModuleNotFoundError):
    """No NVRTC in this installation. `name` says what is missing, as for any module that does not import."""

    def __init__(self, tried: str) -> None:
        super().__init__(
            f"NVRTC not found ({tried}): the Hopper kernels are compiled when they are first used. torch's CUDA wheels "
            "bring it; install one, or the nvidia-cuda-nvrtc package of torch's CUDA version",
            name="NVRTC",
        )


class CompileError(RuntimeError):
    """The compiler refused the source, or gave code that must not be used; the text ends with its log."""


@dataclass(frozen=True)
class Source:
    """One kernel to compile.

    name     for messages
    text     CUDA C++
    headers  include name -> text
    macros   passed as -DNAME=VALUE
    arch     "sm_90a"
    """

    name: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
    macros: Mapping[str, int] = field(default_factory=dict)
    arch: str = "sm_90a"

    def options(self) -> list[str]:
        defined = [f"-D{key}={value}" for key, value in sorted(self.macros.items())]
        return [f"--gpu-architecture={self.arch}", "-std=c++17", "-lineinfo", "--ptxas-options=-v", *defined]

    def key(self, compiler: str) -> str:
        """Hash of everything that decides the machine code."""
        parts = [_MAGIC.decode(), compiler, self.name, self.text, *self.options()]
        for name in sorted(self.headers):
            parts += [name, self.headers[name]]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(f"{len(part)}:".encode() + part.encode())
        return digest.hexdigest()[:40]


def cubin(source: Source) -> bytes:
    """Machine code of the source, from the disk cache or freshly compiled.

    Raises CompilerMissingError without NVRTC, CompileError when the source does not compile. A cache that cannot be
    written costs the time of a compilation in each process and nothing else.
    """
    path = cache_folder("cubin") / f"{source.name}-{source.key(compiler_version())}.cubin"
    code = _read(path)
    if code is None:
        code, _ = compile_source(source)
        with contextlib.suppress(OSError):
            _write(path, code)
    return code


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    magic, digest, code = content[: len(_MAGIC)], content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    return code if magic == _MAGIC and hashlib.sha256(code).digest() == digest else None


def compile_all(sources: Iterable[Source], *, workers: int = 8) -> int:
    """Compile each different source once, side by side, into the disk cache; returns how many those are."""
    unique = {source.key(""): source for source in sources}
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(cubin, unique.values()))
    return len(unique)


def missing() -> Mendable | None:
    """Why nothing can be compiled here, for a backend's `supports`; None where it can."""
    try:
        library()
    except CompilerMissingError as error:
        return Mendable(str(error))
    return None


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC of torch's CUDA version, or the one that ``$QUANTLAB_NVRTC`` names. Raises CompilerMissingError."""
    chosen = os.environ.get("QUANTLAB_NVRTC")
    if chosen:
        candidates = [chosen]
    elif torch.version.cuda is None:
        raise CompilerMissingError("this torch was built without CUDA")
    else:
        name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
        candidates = [*_wheel_libraries(name), name]
    for candidate in candidates:
        with contextlib.suppress(OSError):
            return _open(candidate)
    raise CompilerMissingError(f"tried {', '.join(candidates)}")


def _open(path: str) -> ctypes.CDLL:
    # NVRTC opens its built-in headers by bare name, which the wheels' folder is no search path for.
    for companion in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
        ctypes.CDLL(str(companion))
    return ctypes.CDLL(path)


def _wheel_libraries(name: str) -> list[str]:
    """Where NVIDIA's wheels put the library: nvidia/cu13/lib, or nvidia/cuda_nvrtc/lib for CUDA 12."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations or () if spec else ()
    return [str(path) for root in roots for path in sorted(Path(root).glob(f"*/lib/{name}"))]


@functools.cache
def compiler_version() -> str:
    """ "NVRTC 13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return f"NVRTC {major.value}.{minor.value}"


def compile_source(source: Source) -> tuple[bytes, str]:
    """Machine code and the compiler's log (registers, spills), without the cache."""
    nvrtc, program = library(), ctypes.c_void_p()
    names = [name.encode() for name in source.headers]
    texts = [text.encode() for text in source.headers.values()]
    options = [option.encode() for option in source.options()]
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.text.encode(), f"{source.name}.cu".encode(), len(names),
            (ctypes.c_char_p * len(texts))(*texts), (ctypes.c_char_p * len(names))(*names),
        ),
        "nvrtcCreateProgram",
    )  # fmt: skip
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _fetch(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status != 0:
            raise CompileError(f"{source.name} does not compile with {compiler_version()}:\n{log}")
        if _SERIALIZED.search(log):
            raise CompileError(f"{source.name}: the assembler serialized its MMAs {dict(source.macros)}:\n{log}")
        return _fetch(program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(program: ctypes.c_void_p, what: str) -> bytes:
    nvrtc, size = library(), ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer), f"nvrtcGet{what}")
    return buffer.raw


def _check(status: int, call: str) -> None:
    if status != 0:
        text = library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise CompileError(f"{call}: {text(status).decode()}")
