"""A tiny model with a chat template, and prompts for it, as the tests of traces use them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests import tiny

END = 93  # "~", the last printable ASCII character, ends a turn of the template below
TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}~{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}(think){% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}


def talking_model(directory: Path, template: str = TEMPLATE) -> Path:
    """A llama of two layers that greedily writes printable ASCII alone, so that what it writes can be put into words
    and back: the other rows of its head are zero, and the largest of 94 logits is not below that."""
    model = tiny.copy_of(tiny.base("llama-2"), directory)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][END + 1 :] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "chat_template.jinja").write_text(template)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return model


@cache
def model() -> Path:
    """Read only."""
    return talking_model(tiny._root() / "talking")


PROMPTS = [
    *({"kind": "prose", "messages": [{"role": "user", "content": f"say {'a' * n}{n}"}]} for n in range(12)),
    *({"kind": "tools", "messages": [{"role": "user", "content": f"see{n}"}], "tools": [TOOL]} for n in range(4)),
    *({"kind": "reasoning", "messages": [{"role": "user", "content": f"why {n}?"}]} for n in range(8)),
]


def write_prompts(path: Path, copies: int = 1) -> Path:
    """Each of `PROMPTS`, and again with other words at its end."""
    lines = []
    for copy in range(copies):
        for prompt in PROMPTS:
            said = [{**message, "content": message["content"] + "!" * copy} for message in prompt["messages"]]
            lines.append(json.dumps({**prompt, "messages": said}) + "\n")
    path.write_text("".join(lines))
    return path
