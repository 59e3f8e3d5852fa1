"""Texts that name arguments of the Python API as {name}, or as {name=False} what turns one off.

In Python they read as they are spelled there, `max_memory` or `probe=False`; the commands put their flags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Every argument that a message may name: parameters of recompile.api and recompile.auto. Any other {word} is text.
_ARGUMENTS = """
    activations active_bpw allow_unmatched asym attribute ban base base_logits batch_size batch_tokens bits cache_bits
    cache_quant cache_sweep candidates card check chunks compensate context dataset dense device divergence dry_run
    dtype embedding engine engine_top_k engines_dir feedback force format free_experts gen_prompt grid group_size head
    head_bits imatrix importance importance_rows independent input_ids iso keep keep_b learning_rate length level
    library match max_kl max_memory max_ppl_increase max_step maximum method minimum minutes mode modifiers mtp out
    pairs pin png pool positions probe prompts quantize_also ray recipe reencode reference rounding rows rtol samples
    save_base_logits save_imatrix save_input_ids save_logits_a save_logits_b scheme shard_size size skip solver sources
    start stats svg temperature text tie tokenizer_from tokens total_bpw tower trace type_sources url variants verify
"""
ARGUMENTS = frozenset(re.findall(r"\w+", _ARGUMENTS))

_NAMED = re.compile(r"\{([a-z_]+)(=False)?\}")


def spell(template: str, names: Mapping[str, str]) -> str:
    """A text with the names of arguments as `names` has them; as Python spells them where it has none.

    names: "max_memory" -> "--max-memory", "probe=False" -> "--no-probe"
    """

    def spelled(found: re.Match[str]) -> str:
        if found[1] not in ARGUMENTS:
            return found[0]
        name = found[1] + (found[2] or "")
        return names.get(name, name)

    return _NAMED.sub(spelled, template)


class Worded(str):
    """A text for a report or an event that names arguments: reads as Python, and can be spelled otherwise."""

    __slots__ = ("template",)
    template: str

    def __new__(cls, template: str) -> Worded:
        made = super().__new__(cls, spell(template, {}))
        made.template = template
        return made

    def __reduce__(self) -> tuple[type[Worded], tuple[str]]:
        return Worded, (self.template,)


def respell(text: str, names: Mapping[str, str]) -> str:
    """A text with other names for the arguments that it was worded with; any plain text as it is."""
    return spell(text.template, names) if isinstance(text, Worded) else text
