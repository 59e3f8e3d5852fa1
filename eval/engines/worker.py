"""One engine in one process: loads libllama, answers requests on stdin, sends logits through stdout.

Started by `eval.engines.process`; imports neither torch nor numpy. A request is one line of JSON. An answer is one line
of JSON, followed by as many raw bytes as its "bytes" says. What the engine prints goes to stderr, whichever stream it
meant: both engines write on stdout, too. Two engines export the same symbols, hence the processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from eval.engines.builds import (
    PARAMS_BYTES,
    ContextLayout,
    EngineError,
    check_quantize_defaults,
    probe_context,
)

BLOCK_BYTES = 1 << 26  # logits held by the engine at once, for vocabularies where a whole batch would be more
UBATCH = 512  # llama.cpp's default: how many tokens one graph takes


class _Params(ctypes.Structure):
    """Any parameter struct. By value a large struct travels as a copy in memory (System V, AAPCS64 and Windows alike),
    of which the callee reads its own, shorter part; so one size does for all builds."""

    _fields_ = (("raw", ctypes.c_ubyte * PARAMS_BYTES),)


class _Batch(ctypes.Structure):
    """llama_batch; `rest` holds what the fork has behind it."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
        ("rest", ctypes.c_ubyte * 64),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Params, ()),
    "llama_context_default_params": (_Params, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _Params)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, _Params)),
    "llama_free": (None, (ctypes.c_void_p,)),
    "llama_batch_init": (_Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
    "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_model_desc": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)),
    "llama_model_n_ctx_train": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_n_ctx_train": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_bos": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_get_add_bos": (ctypes.c_bool, (ctypes.c_void_p,)),
    "llama_add_bos_token": (ctypes.c_int32, (ctypes.c_void_p,)),  # the fork: of the model
    "llama_token_bos": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_should_add_bos_token": (ctypes.c_bool, (ctypes.c_void_p,)),
    "llama_get_memory": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_memory_clear": (None, (ctypes.c_void_p, ctypes.c_bool)),
    "llama_kv_self_clear": (None, (ctypes.c_void_p,)),
    "llama_kv_cache_clear": (None, (ctypes.c_void_p,)),
    "llama_model_quantize_default_params": (_Params, ()),
    "llama_model_quantize": (ctypes.c_uint32, (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)),
    "ggml_backend_load_all_from_path": (None, (ctypes.c_char_p,)),
}


class Library:
    """libllama through ctypes, with the layout of its context parameters."""

    def __init__(self, path: Path, preload: tuple[str, ...], expected: ContextLayout | None) -> None:
        helpers = [self._load(path.parent / name) for name in preload]
        self.main = self._load(path)
        self._helpers = helpers
        for name in ("llama_backend_init", "llama_context_default_params", "llama_decode", "llama_batch_init"):
            if self.optional(name) is None:
                raise EngineError(f"{path}: it exports no {name}; wanted a libllama")
        self.call("llama_backend_init")
        load_all = self.optional("ggml_backend_load_all_from_path")
        if load_all is not None and any(path.parent.glob("libggml-cpu-*")):  # one file per kind of processor
            load_all(os.fsencode(path.parent))
        self.layout = probe_context(bytes(self.call("llama_context_default_params").raw))
        if expected is not None and self.layout != expected:
            raise EngineError(
                f"{path}: its context parameters are laid out as {self.layout}, where the pinned build has {expected}; "
                f"the file was replaced, install the wheel again"
            )

    @staticmethod
    def _load(path: Path) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise EngineError(f"{path}: cannot be loaded: {error}") from error

    def optional(self, name: str) -> Callable[..., Any] | None:
        for library in (self.main, *self._helpers):
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = _SIGNATURES[name]
                return function
        return None

    def call(self, name: str, *arguments: Any) -> Any:
        function = self.optional(name)
        if function is None:
            raise EngineError(f"this libllama exports no {name}; use a pinned wheel")
        return function(*arguments)


class Model:
    """A loaded file with one context."""

    def __init__(
        self, library: Library, path: str, n_ctx: int, threads: int, cache: tuple[int, int] | None = None
    ) -> None:
        self.library = library
        self.model = library.call("llama_model_load_from_file", os.fsencode(path), self._model_params())
        if not self.model:
            raise EngineError(f"{path}: the engine refused the model")
        self.vocab = library.call("llama_model_get_vocab", self.model)
        self.n_vocab = int(library.call("llama_vocab_n_tokens", self.vocab))
        self.batch_tokens = max(16, min(n_ctx, UBATCH, BLOCK_BYTES // (4 * self.n_vocab)))
        params = library.call("llama_context_default_params")
        layout = library.layout
        for offset, value in (
            (layout.n_ctx, n_ctx),
            (layout.n_batch, self.batch_tokens),
            (layout.n_ubatch, self.batch_tokens),
            (layout.n_threads, threads),
            (layout.n_threads + 4, threads),
        ):
            struct.pack_into("<i", params.raw, offset, value)
        if layout.logits_all is not None:
            params.raw[layout.logits_all] = 1
        if cache is not None:
            self._set_cache(params, *cache)
        self.context = library.call("llama_init_from_model", self.model, params)
        if not self.context:
            raise EngineError(f"{path}: the engine made no context of {n_ctx} tokens")

    def _set_cache(self, params: _Params, type_k: int, type_v: int) -> None:
        """Types of keys and values, by ggml's numbers; flash attention on, without which values are not quantized."""
        layout = self.library.layout
        if layout.flash_attn is None:
            raise EngineError("this libllama is too old for a quantized cache here: its flash attention is not found")
        struct.pack_into("<2i", params.raw, layout.type_k, type_k, type_v)
        if layout.is_fork:
            params.raw[layout.flash_attn] = 1
        else:
            struct.pack_into("<i", params.raw, layout.flash_attn, 1)

    def _model_params(self) -> _Params:
        params: _Params = self.library.call("llama_model_default_params")
        return params

    def about(self) -> dict[str, Any]:
        text = ctypes.create_string_buffer(256)
        self.library.call("llama_model_desc", self.model, text, len(text))
        trained = self.library.optional("llama_model_n_ctx_train") or self.library.optional("llama_n_ctx_train")
        return {
            "n_vocab": self.n_vocab,
            "add_bos": self._adds_bos(),
            "bos": int(self._bos()),
            "n_ctx_train": int(trained(self.model)) if trained else 0,
            "description": text.value.decode("utf-8", "replace"),
            "batch_tokens": self.batch_tokens,
        }

    def _bos(self) -> int:
        function = self.library.optional("llama_vocab_bos")
        return int(function(self.vocab) if function else self.library.call("llama_token_bos", self.model))

    def _adds_bos(self) -> bool:
        function = self.library.optional("llama_vocab_get_add_bos")
        if function:
            return bool(function(self.vocab))
        return int(self.library.call("llama_add_bos_token", self.model)) == 1

    def clear(self) -> None:
        get = self.library.optional("llama_get_memory")
        if get is not None:
            self.library.call("llama_memory_clear", get(self.context), True)
            return
        clear = self.library.optional("llama_kv_self_clear") or self.library.optional("llama_kv_cache_clear")
        if clear is None:
            raise EngineError("this libllama exports no function that clears its cache; use a pinned wheel")
        clear(self.context)

    def logits(self, tokens: list[int], first: int, last: int) -> Iterator[bytes]:
        """Float32 rows of the positions first <= i < last of one sequence, a batch at a time."""
        self.clear()
        batch = self.library.call("llama_batch_init", self.batch_tokens, 0, 1)
        try:
            for start in range(0, len(tokens), self.batch_tokens):
                part = tokens[start : start + self.batch_tokens]
                batch.n_tokens = len(part)
                for n, token in enumerate(part):
                    batch.token[n], batch.pos[n] = token, start + n
                    batch.n_seq_id[n], batch.seq_id[n][0] = 1, 0
                    batch.logits[n] = 1 if first <= start + n < last else 0
                rows = max(0, min(last, start + len(part)) - max(first, start))
                if not rows:
                    batch.logits[len(part) - 1] = 1  # some builds want one output a batch
                code = self.library.call("llama_decode", self.context, batch)
                if code != 0:
                    raise EngineError(f"the engine could not run tokens {start} to {start + len(part)} (code {code})")
                if rows:  # llama_get_logits has those of the marked positions only, one behind the other
                    yield ctypes.string_at(self.library.call("llama_get_logits", self.context), rows * 4 * self.n_vocab)
        finally:
            self.library.call("llama_batch_free", batch)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        function = self.library.main.llama_tokenize
        function.restype = ctypes.c_int32
        function.argtypes = (
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        )
        space = len(data) + 16
        out = (ctypes.c_int32 * space)()
        owner = self.model if self.library.layout.is_fork else self.vocab
        count = function(owner, data, len(data), out, space, True, False)
        if count < 0:
            raise EngineError(f"the engine could not tokenize the text (code {count})")
        return list(out[:count])


class _TensorType(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


def quantize(library: Library, request: Mapping[str, Any]) -> None:
    """llama_model_quantize of mainline; importance comes as a raw file of float32 with an index in the request."""
    params = library.call("llama_model_quantize_default_params")
    layout = check_quantize_defaults(bytes(params.raw))
    struct.pack_into("<2i", params.raw, layout.nthread, request["threads"], request["ftype"])
    for key, offset in (("output_type", layout.output_type), ("embedding_type", layout.embedding_type)):
        if request.get(key) is not None:
            struct.pack_into("<i", params.raw, offset, request[key])
    params.raw[layout.allow_requantize] = 1 if request.get("allow_requantize") else 0
    params.raw[layout.pure] = 1 if request.get("pure") else 0
    kept: list[Any] = []  # ctypes does not hold on to what a struct points at
    rules = request.get("tensor_types") or []
    if rules:
        table = (_TensorType * (len(rules) + 1))(*(_TensorType(p.encode(), t) for p, t in rules), _TensorType(None, 0))
        kept.append(table)
        struct.pack_into("<Q", params.raw, layout.tensor_types, ctypes.addressof(table))
    if request.get("importance"):
        data = Path(request["importance"]["file"]).read_bytes()
        buffer = (ctypes.c_float * (len(data) // 4)).from_buffer_copy(data)
        entries = []
        for name, start, count in request["importance"]["entries"]:
            pointer = ctypes.cast(ctypes.addressof(buffer) + 4 * start, ctypes.POINTER(ctypes.c_float))
            entries.append(_Importance(name.encode(), pointer, count))
        array = (_Importance * (len(entries) + 1))(*entries, _Importance(None, None, 0))
        kept += [buffer, array]
        struct.pack_into("<Q", params.raw, layout.imatrix, ctypes.addressof(array))
    source, target = os.fsencode(request["source"]), os.fsencode(request["target"])
    code = library.call("llama_model_quantize", source, target, ctypes.byref(params))
    if code != 0:
        raise EngineError(f"{request['source']}: the engine's quantizer gave up (code {code})")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests, a line of JSON each, until there are no more; runs in a process of its own."""
    library: Library | None = None
    model: Model | None = None

    def answer(head: Mapping[str, Any]) -> None:
        answers.write(json.dumps(head).encode() + b"\n")
        answers.flush()

    for line in requests:
        request = json.loads(line)
        try:
            kind = request["do"]
            if kind == "open":
                layout = ContextLayout(**request["layout"]) if request["layout"] else None
                library = Library(Path(request["library"]), tuple(request["preload"]), layout)
                answer({"ok": True})
                continue
            assert library is not None
            if kind == "load":
                model = Model(library, request["path"], request["n_ctx"], request["threads"], request["cache"])
                answer({"ok": True, **model.about()})
            elif kind == "quantize":
                quantize(library, request)
                answer({"ok": True})
            elif kind == "tokenize":
                assert model is not None
                answer({"ok": True, "tokens": model.tokenize(request["text"])})
            elif kind == "logits":
                assert model is not None
                for block in model.logits(request["tokens"], request["first"], request["last"]):
                    answer({"ok": True, "bytes": len(block)})
                    answers.write(block)
                answer({"ok": True, "bytes": 0})
        except EngineError as error:
            answer({"ok": False, "error": str(error)})


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
