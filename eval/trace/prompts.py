"""What a reference is asked for its trace: a bundled set of short instructions, or a file of the user's.

The bundled set is made of the templates and word lists in prompts.json, which were written for this project. Hashes
pick the words, so that the same prompts come out of every version of Python. Every kind has the same number of prompts,
and every kind is split into roles by the same shares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from recompile.errors import RecompileError
from recompile.io.files import parse_json, read_text
from recompile.io.schema import describe
from recompile.model.texts import ROLE_SHARES
from recompile.model.trace import role_of_prompt

KINDS = ("prose", "code", "mathematics", "tools", "multilingual", "summary", "multi-turn", "reasoning")
PER_KIND = 40
QUOTAS = {role: round(share * PER_KIND) for role, share in ROLE_SHARES.items()}
BUNDLED = "bundled prompts, version 1"
MOST_TRIES = 5000  # at numbers of a kind, to fill its quotas


@dataclass(frozen=True)
class Prompt:
    """One conversation that ends where the model has to answer.

    messages: {"role", "content"} each, as chat templates take them; tools: JSON schemas of functions
    thinking: whether templates with a switch for it are told to let the model think
    """

    kind: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False

    @property
    def sha256(self) -> str:
        """Of what is asked, whatever kind it is called; decides the role."""
        asked = {"messages": self.messages, "tools": self.tools}
        return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def role(self) -> str:
        return role_of_prompt(self.sha256)


def bundled_prompts() -> tuple[Prompt, ...]:
    """`PER_KIND` prompts of every kind of `KINDS`, kinds in turn, so that the first n hold as many of each.

    Within a kind roles take turns in proportion to their shares; kinds begin at different roles.
    """
    by_kind = [_of_kind(kind) for kind in KINDS]
    step = PER_KIND // len(KINDS)
    by_kind = [found[step * n :] + found[: step * n] for n, found in enumerate(by_kind)]
    return tuple(prompt for turn in zip(*by_kind, strict=True) for prompt in turn)


def prompts_of_file(path: Path) -> tuple[Prompt, ...]:
    """Read JSON lines: {"kind": ..., "messages": [...], "tools": [...], "thinking": true}; only messages are needed.

    kind: "prompt" where none is given; thinking: true by default for the kind "reasoning". Of equal prompts one is
    taken. Raises RecompileError, with the line, for anything else.
    """
    found: dict[str, Prompt] = {}
    text = read_text(path, kind="text", error=RecompileError, bom=True)
    for number, line in enumerate(text.split("\n"), start=1):  # no other end of a line is one in JSON lines
        if line.strip():
            value = parse_json(line, str(path), error=RecompileError, line=number)
            prompt = _prompt_of(value, f"{path}:{number}")
            found.setdefault(prompt.sha256, prompt)
    if not found:
        raise RecompileError(f'{path}: holds no prompt; wanted a line {{"messages": [...]}} each')
    return tuple(found.values())


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Of all prompts, their kinds and switches, in order."""
    lines = [f"{prompt.sha256} {prompt.kind} {prompt.thinking}" for prompt in prompts]
    return sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _prompt_of(value: Any, where: str) -> Prompt:
    if not isinstance(value, dict):
        raise RecompileError(f'{where}: is {describe(value)}, wanted an object {{"messages": [...]}}')
    unknown = sorted(value.keys() - {"kind", "messages", "tools", "thinking"})
    if unknown:
        raise RecompileError(f'{where}: unknown key "{unknown[0]}"; known: kind, messages, tools, thinking')
    messages, tools = value.get("messages"), value.get("tools") or []
    if not isinstance(messages, list) or not messages:
        raise RecompileError(f"{where}.messages: wanted a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RecompileError(f'{where}.messages[{number}]: wanted an object with "role" and "content"')
    if messages[-1]["role"] == "assistant":
        raise RecompileError(f"{where}.messages: the last one is the assistant's, and the model is to answer")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecompileError(f"{where}.tools: wanted a list of objects, schemas of functions")
    kind, thinking = value.get("kind", "prompt"), value.get("thinking")
    if not isinstance(kind, str) or not kind:
        raise RecompileError(f"{where}.kind: wanted a name")
    if thinking is not None and not isinstance(thinking, bool):
        raise RecompileError(f"{where}.thinking: wanted true or false")
    return Prompt(kind, tuple(messages), tuple(tools), kind == "reasoning" if thinking is None else thinking)


# ---- the bundled set -------------------------------------------------------------------------------------------------


@cache
def _data() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    return loaded


def _of_kind(kind: str) -> list[Prompt]:
    """`QUOTAS` prompts of each role, no two alike."""
    by_role: dict[str, list[Prompt]] = {role: [] for role in QUOTAS}
    seen: set[str] = set()
    for number in range(MOST_TRIES):
        prompt = _MAKERS[kind](kind, number)
        wanted = by_role[prompt.role]
        if prompt.sha256 not in seen and len(wanted) < QUOTAS[prompt.role]:
            seen.add(prompt.sha256)
            wanted.append(prompt)
            if len(seen) == PER_KIND:
                break
    assert all(len(by_role[role]) == count for role, count in QUOTAS.items()), f"too few different prompts of {kind}"
    # the k-th of n of a role stands at (k + 1/2) / n of the way, so that every beginning has all roles
    placed = [((k + 0.5) / len(ps), role, p) for role, ps in by_role.items() for k, p in enumerate(ps)]
    return [prompt for _, _, prompt in sorted(placed, key=lambda at: at[:2])]


def _number(key: str) -> int:
    return int(sha256(key.encode()).hexdigest()[:12], 16)


def _pick(items: Sequence[Any], key: str) -> Any:
    return items[_number(key) % len(items)]


_SLOT = re.compile(r"\{([a-z]+)([0-9]*)(?::(\d+)-(\d+))?\}")


def _fill(template: str, words: Mapping[str, Sequence[str]], key: str, fixed: Mapping[str, str] | None = None) -> str:
    """{word} is one of a list, {word2} another one of it; {n:3-7} a number. Equal slots get equal values.

    fixed: slots that have their value already
    """

    def value(found: re.Match[str]) -> str:
        name, place, low, high = found.groups()
        if fixed is not None and name + place in fixed:
            return fixed[name + place]
        at = _number(f"{key} {name}")
        if low is not None:
            return str(int(low) + at % (int(high) - int(low) + 1))
        return str(words[name][(at + int(place or 1) - 1) % len(words[name])])

    return _SLOT.sub(value, template)


def _user(kind: str, text: str, **more: Any) -> Prompt:
    return Prompt(kind, ({"role": "user", "content": text},), **more)


def _plain(kind: str, number: int) -> Prompt:
    data, key = _data()[kind], f"{kind} {number}"
    return _user(kind, _fill(_pick(data["templates"], key), data["words"], key), thinking=kind == "reasoning")


def _with_tools(kind: str, number: int) -> Prompt:
    """The function that is needed, among up to two others."""
    data, key = _data()[kind], f"{kind} {number}"
    needed, template = _pick(data["requests"], key)
    tools = {tool["function"]["name"]: tool for tool in data["tools"]}
    others = sorted(tools.keys() - {needed}, key=lambda name: _number(f"{key} {name}"))[: number % 3]
    offered = sorted([needed, *others], key=lambda name: _number(f"{key} order {name}"))
    return _user(kind, _fill(template, data["words"], key), tools=tuple(tools[name] for name in offered))


def _multilingual(kind: str, number: int) -> Prompt:
    languages = _data()[kind]["languages"]
    name = sorted(languages)[number % len(languages)]
    key = f"{kind} {name} {number}"
    return _user(kind, _fill(_pick(languages[name]["templates"], key), languages[name]["words"], key))


def _summary(kind: str, number: int) -> Prompt:
    data, key = _data()[kind], f"{kind} {number}"
    document, words = _pick(data["documents"], key), data["words"]
    ask = _fill(_pick(data["asks"], f"{key} ask"), words, key)
    return _user(kind, "\n\n".join([ask, *_document(document, words, key, int(data["parts"]))]))


def _document(document: Mapping[str, Any], words: Mapping[str, Sequence[str]], key: str, parts: int) -> Iterator[str]:
    yield "# " + _fill(document["title"], words, key)
    first = _number(f"{key} season")
    for part in range(parts):
        fixed = {"part": str(part + 1), "season": words["season"][(first + part) % len(words["season"])]}
        yield "## " + _fill(document["head"], words, key, fixed)
        yield " ".join(
            _fill(sentence, words, f"{key} {part} {place}", fixed)
            for place, sentence in enumerate(document["sentences"])
        )


def _multi_turn(kind: str, number: int) -> Prompt:
    data, key = _data()[kind], f"{kind} {number}"
    turns = [_fill(turn, data["words"], key) for turn in _pick(data["dialogues"], key)]
    roles = ("user", "assistant")
    return Prompt(kind, tuple({"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)))


_MAKERS = {
    "prose": _plain,
    "code": _plain,
    "mathematics": _plain,
    "tools": _with_tools,
    "multilingual": _multilingual,
    "summary": _summary,
    "multi-turn": _multi_turn,
    "reasoning": _plain,
}
