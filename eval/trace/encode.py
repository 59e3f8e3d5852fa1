"""Prompts to tokens by the tokenizer's own chat template, in a child process with limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from eval.trace.prompts import Prompt
from recompile.errors import RecompileError, UnsupportedError
from recompile.model.guarded import stepped
from recompile.model.rows import first_with_tokenizer
from recompile.model.tokenizer import with_tokenizer


@dataclass(frozen=True)
class EncodedPrompts:
    """ids: a prompt: its tokens up to where the model answers; vocab: the tokenizer's size; end: its end of a text."""

    ids: tuple[tuple[int, ...], ...]
    vocab: int
    end: int | None
    template_sha256: str
    tools_in_text: bool
    thinking_switch: bool


def encode_prompts(model_dir: Path, prompts: Sequence[Prompt]) -> EncodedPrompts:
    """Raises UnsupportedError for a tokenizer without a chat template, RecompileError for a template that refuses a
    prompt."""
    text_bytes = sum(len(json.dumps([prompt.messages, prompt.tools])) for prompt in prompts)
    folder = first_with_tokenizer([model_dir])
    return with_tokenizer(folder, lambda tokenizer: _encode(tokenizer, prompts, folder), text_bytes=text_bytes)


def encode_texts(model_dir: Path, texts: Mapping[int, str]) -> dict[int, list[int]]:
    """Tokens of texts that a model wrote, by their numbers; nothing is put around them."""

    def work(tokenizer: Any) -> dict[int, list[int]]:
        found = {}
        for number, text in texts.items():
            stepped()
            found[number] = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return found

    return with_tokenizer(first_with_tokenizer([model_dir]), work, text_bytes=sum(map(len, texts.values())))


def _encode(tokenizer: Any, prompts: Sequence[Prompt], folder: Path) -> EncodedPrompts:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UnsupportedError(
            f"{folder}: the tokenizer has no chat template, so that no conversation can be traced; "
            f"measure on text instead"
        )
    with_tools = next((n for n, prompt in enumerate(prompts) if prompt.tools), None)
    in_text = with_tools is not None and not _shows_tools(tokenizer, prompts[with_tools], with_tools)
    ids = []
    for number, prompt in enumerate(prompts):
        stepped()
        asked = _tools_as_text(prompt) if in_text and prompt.tools else prompt
        found = _apply(tokenizer, asked, number, tokenize=True)
        ids.append(tuple(int(token) for token in found))
        if not ids[-1]:
            raise RecompileError(f"prompt {number + 1} ({prompt.kind}): the chat template makes no token of it")
    return EncodedPrompts(
        tuple(ids),
        len(tokenizer),
        getattr(tokenizer, "eos_token_id", None),
        sha256(json.dumps(template, sort_keys=True).encode()).hexdigest(),
        in_text,
        _has_switch(tokenizer, prompts[0]),
    )


def _apply(tokenizer: Any, prompt: Prompt, number: int, *, tokenize: bool, thinking: bool | None = None) -> Any:
    """Tokens, or text, of a prompt. Templates have two names for the switch: enable_thinking and thinking."""
    switch = prompt.thinking if thinking is None else thinking
    more: dict[str, Any] = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    if tokenize:
        more["return_dict"] = False
    messages = [dict(message) for message in prompt.messages]
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=tokenize,
            enable_thinking=switch,
            thinking=switch,
            **more,
        )
    except Exception as error:  # a template's own errors are of any kind
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RecompileError(
            f"prompt {number + 1} ({prompt.kind}): the chat template refuses it: {type(error).__name__}: {reason}; "
            f"give {{prompts}} that it takes"
        ) from error


def _shows_tools(tokenizer: Any, prompt: Prompt, number: int) -> bool:
    without = Prompt(prompt.kind, prompt.messages, (), prompt.thinking)
    shown = _apply(tokenizer, prompt, number, tokenize=False)
    return bool(shown != _apply(tokenizer, without, number, tokenize=False))


def _has_switch(tokenizer: Any, prompt: Prompt) -> bool:
    on, off = (_apply(tokenizer, prompt, 0, tokenize=False, thinking=thinking) for thinking in (True, False))
    return bool(on != off)


def _tools_as_text(prompt: Prompt) -> Prompt:
    """The schemas before the first message's text, for templates that have no place for them."""
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in prompt.tools)
    first: Mapping[str, Any] = prompt.messages[0]
    text = (
        f"You can call these functions; to call one, answer with JSON that has its name and arguments:\n{schemas}\n\n"
        f"{first['content']}"
    )
    return Prompt(prompt.kind, ({**first, "content": text}, *prompt.messages[1:]), (), prompt.thinking)
