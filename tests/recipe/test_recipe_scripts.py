"""Commands and shell scripts of llama-quantize as recipes of types; nothing of them is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from recompile.cli.recompile import main as recompile
from recompile.errors import RecipeError
from recompile.gguf.container import open_gguf
from recompile.merge.type_recipes import TypeRecipe, load_type_recipe, looks_like_type_recipe, parse_type_recipe
from recompile.recipe.shell_words import LONGEST_LINE, Script, read_script
from tests import tiny
from tests.gguf_models import write_model

HEAD, EMBEDDING = r"^output\.weight$", r"^token_embd\.weight$"


def rules(found: TypeRecipe) -> list[tuple[int, str, str]]:
    return [(rule.line, rule.pattern, rule.type) for rule in found.rules]


READ = {
    "a command over lines": (
        "#!/bin/sh\n"
        "set -e; echo 'starts at --tensor-type'\n"
        "CUDA_VISIBLE_DEVICES= nohup ~/bin/llama-quantize --imatrix a.gguf --output-tensor-type Q8_0 \\\n"
        '    --tensor-type "BLK\\.(0|1)\\.ffn_down=q6_K" \\\n'
        "    --tensor-type 'attn_v=Q5_K' in.gguf out.gguf q4_k_m 8 2>&1 | tee log.txt\n",
        "llama-quantize",
        [(3, HEAD, "Q8_0"), (4, r"blk\.(0|1)\.ffn_down", "Q6_K"), (5, "attn_v", "Q5_K")],
        "q4_k_m",
    ),
    "one type and no output": (
        "llama-quantize --tensor-type attn_q=q8_0 in.gguf Q5_K_S",
        "llama-quantize",
        [(1, "attn_q", "Q8_0")],
        "Q5_K_S",
    ),
    "an array that a command names": (
        'RULES=(\n  --tensor-type ffn_up=q3_K # the widest\n  "--tensor-type" "attn_k=q8_0"\n)\n'
        'RULES+=(--token-embedding-type q4_0)\nllama-quantize "${RULES[@]}" in out COPY\n',
        "llama-quantize",
        [(5, EMBEDDING, "Q4_0"), (2, "ffn_up", "Q3_K"), (3, "attn_k", "Q8_0")],
        None,
    ),
    "a variable of flags": (
        "FLAGS='--tensor-type attn_k=q8_0\n--tensor-type attn_q=q6_K'\nllama-quantize $FLAGS a.gguf b.gguf F16\n",
        "llama-quantize",
        [(1, "attn_k", "Q8_0"), (2, "attn_q", "Q6_K")],
        "F16",
    ),
    "a variable in a rule": (
        "LAST=27\nT=q6_K\nllama-quantize --tensor-type blk.${LAST}.ffn_down=$T in out Q4_0",
        "llama-quantize",
        [(3, "blk.27.ffn_down", "Q6_K")],
        "Q4_0",
    ),
    "custom-q by way of sed": (
        'rules="\n# routed\nblk\\..*\\.ffn_up_exps=iq2_k\n\nattn_q=iq5_k,attn_k=q8_0\n"\n'
        "rules=$(\n  echo \"$rules\" | grep -v '^#' | \\\n  sed -Ez 's:\\n+:,:g;s:,$::;s:^,::'\n)\n"
        'numactl -N 0 ./quantize --attn-v-type q6_0 --custom-q "$rules" in.gguf out.gguf IQ2_K 24\n',
        "ik-custom-q",
        [
            (3, r"blk\..*\.ffn_up_exps", "IQ2_K"),
            (5, "attn_q", "IQ5_K"),
            (5, "attn_k", "Q8_0"),
            (11, r"attn_v\.weight", "Q6_0"),
        ],
        "IQ2_K",
    ),
    "a list in a variable alone": (
        "custom='\n# all\nattn_.*=iq4_k\n'",
        "ik-custom-q",
        [(3, "attn_.*", "IQ4_K")],
        None,
    ),
    "the same rules at several types": (
        "R='attn_q=q8_0'\nllama-quantize --tensor-type $R in a.gguf Q4_K_M\n"
        "llama-quantize --tensor-type $R in b.gguf Q5_K_M\n",
        "llama-quantize",
        [(1, "attn_q", "Q8_0")],
        None,
    ),
    "a type that a loop sets": (
        "for q in Q4_K_M Q5_K_M; do\n  llama-quantize --tensor-type attn_q=q8_0 in out-$q.gguf $q\ndone",
        "llama-quantize",
        [(2, "attn_q", "Q8_0")],
        None,
    ),
    "a here-document beside it": (
        "cat > note <<'END'\nit's --tensor-type that \"matters\nEND\n"
        "llama-quantize --tensor-type attn_q=q8_0 in out F16",
        "llama-quantize",
        [(4, "attn_q", "Q8_0")],
        "F16",
    ),
    "Windows line ends": (
        "llama-quantize --tensor-type a=q8_0 \\\r\n  in out Q4_0\r\n",
        "llama-quantize",
        [(1, "a", "Q8_0")],
        "Q4_0",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_the_rules_of_a_script(case: str, tmp_path: Path) -> None:
    text, dialect, wanted, base = READ[case]
    path = tmp_path / "make.sh"
    path.write_bytes(text.encode())
    assert looks_like_type_recipe(path)
    found = load_type_recipe(path)
    assert (found.dialect, rules(found), found.base) == (dialect, wanted, base)
    assert bool(found.notes) == (case in ("the same rules at several types", "a type that a loop sets"))


REFUSED = {
    "a quote": (
        'llama-quantize --tensor-type "attn_q=q8_0 in out Q4_0\n',
        r'^m\.sh:1: shell script: a " is not closed',
    ),
    "the other quote": ("x=1\nllama-quantize --tensor-type 'attn_q=q8_0", r"^m\.sh:2: shell script: a ' is not closed"),
    "an array": ("A=(\n--tensor-type attn_q=q8_0\n", r"^m\.sh:1: shell script: a bracket is not closed"),
    "a substitution": ('llama-quantize --custom-q "$(cat rules" in', r"^m\.sh:1: .* is not closed"),
    "a here-document": (
        "cat <<EOF\nllama-quantize --tensor-type a=q8_0\n",
        r"^m\.sh:2: .*not closed; wanted a line EOF",
    ),
    "a control character": ("x\nllama-quantize --tensor-type a\x1b=q8_0", r"^m\.sh:2: the control character U\+001B"),
    "a long line": ("llama-quantize --tensor-type " + "a" * 10_000_000, r"^m\.sh:1: has 10000029 characters; a line"),
    "growing variables": (
        "a=" + "x" * 4096 + "\n" + "a=$a$a\n" * 9 + "llama-quantize --tensor-type $a=q8_0\n",
        r"^m\.sh:\d+: .*expands to more than",
    ),
    "a text that is run": (
        'llama-quantize --custom-q "$(cat rules.txt)" in out Q4_0',
        r"^m\.sh:1: llama-quantize: --custom-q .*only when the script runs",
    ),
    "another filter": (
        "c='attn_q=q8_0'\nc=$(echo \"$c\" | sed 's/q8_0/q4_0/')\nllama-quantize --custom-q \"$c\" in out Q4_0",
        r"^m\.sh:3: llama-quantize: --custom-q .*only when the script runs",
    ),
    "a loop's variable": (
        "for i in 1 2; do\nllama-quantize --tensor-type blk.$i.ffn=q8_0 in out Q4_0\ndone",
        r"^m\.sh:2: .*\$i is known only when",
    ),
    "an array that is not there": (
        'llama-quantize "${MORE[@]}" --tensor-type a=q8_0 in F16',
        r"MORE\[@\]\} is not set",
    ),
    "arguments": ('llama-quantize --tensor-type a=q8_0 "$@"', r"^m\.sh:1: .*\$@ is not set in the file"),
    "two commands": (
        "llama-quantize --tensor-type a=q8_0 in F16\nllama-quantize --tensor-type b=q8_0 in F16",
        r"^m\.sh:2: llama-quantize: a second command, with other rules",
    ),
    "two arrays": (
        "A=(--tensor-type a=q8_0)\nB=(--tensor-type b=q8_0)\n",
        r"^m\.sh: shell script: rules in A, B, and no",
    ),
    "layers taken out": (
        "llama-quantize --prune-layers 1,2 --tensor-type a=q8_0 in F16",
        r"--prune-layers takes layers",
    ),
    "one type for all": (
        "llama-quantize --pure --tensor-type a=q8_0 in F16",
        r"^m\.sh:1: llama-quantize: --pure gives",
    ),
    "both tools": ("llama-quantize --custom-q a=q8_0 --tensor-type a=q8_0 in F16", r"^m\.sh:1: .*no tool has both"),
    "no value": ("llama-quantize --tensor-type --imatrix x in F16", r"^m\.sh:1: .*--tensor-type has no value"),
    "a type": ("llama-quantize --tensor-type \\\n  attn_q=q4_Kx in F16", r"^m\.sh:2: .*did you mean Q4_K"),
    "a type of a flag": ("llama-quantize --output-tensor-type big in F16", r"^m\.sh:1: .*big"),
    "no rule": ("llama-quantize in.gguf out.gguf Q4_K_M", r"^m\.sh: llama-quantize: no rule in it"),
    "a file": ("llama-quantize --tensor-type-file none.txt in F16", r'^m\.sh:1: .*"none.txt" does not exist'),
    "dollar quotes": ("llama-quantize --tensor-type $'a=q8_0' in F16", r"^m\.sh:1: .*plain quotes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_recipe_cannot_say(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message) as refused:
        parse_type_recipe(text, "m.sh")
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_nothing_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    text = f"x=$(touch {marker}) y=`touch {marker}`\ntouch {marker}\nllama-quantize --tensor-type a=q8_0 $x in F16\n"
    assert rules(parse_type_recipe(text)) == [(3, "a", "Q8_0")]
    assert not marker.exists()


def test_a_file_of_rules_lies_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "types.txt").write_text("attn_q=q8_0\nattn_z=q6_K\n")
    script = tmp_path / "m.sh"
    script.write_text("llama-quantize --tensor-type-file types.txt --tensor-type attn_k=q4_0 in out Q4_0\n")
    found = load_type_recipe(script)
    assert rules(found) == [(1, "attn_q", "Q8_0"), (2, "attn_z", "Q6_K"), (1, "attn_k", "Q4_0")]
    stray = found.stray(["blk.0.attn_q.weight", "blk.0.attn_k.weight"])
    assert stray == f'{tmp_path / "types.txt"}:2: "attn_z" is found in no tensor name'


def test_the_head_flag_in_a_model_with_a_tied_head() -> None:
    """The embedding is the head there: its own flag decides first, rules next, the head's flag last."""
    tied, own = ["token_embd.weight", "blk.0.attn_q.weight"], ["token_embd.weight", "output.weight"]
    for flags, embedding, with_head in (
        ("--output-tensor-type q8_0 --tensor-type attn_q=q5_K", "Q8_0", None),
        ("--output-tensor-type q8_0 --tensor-type token_embd=q5_K", "Q5_K", "Q5_K"),
        ("--output-tensor-type q8_0 --token-embedding-type q4_K", "Q4_K", "Q4_K"),
    ):
        found = parse_type_recipe(f"llama-quantize {flags} in out F16")
        assert found.of(tied).resolve(tied)["token_embd.weight"] == embedding
        assert found.of(own).resolve(own).get("token_embd.weight") == with_head
        assert found.of(own).resolve(own)["output.weight"] == "Q8_0"
        assert all(rule.pattern != HEAD for rule in found.of(tied).unmatched(tied))


TEXTS = st.text(st.sampled_from(" \t\n'\"\\$`(){}<>;&|#=,-aX9[@]"), max_size=60)


def _script_or_message(text: str) -> Script | str:
    try:
        return read_script(text, "m.sh")
    except RecipeError as error:
        return str(error)


@given(TEXTS)
def test_any_text_is_words_or_one_sentence(text: str) -> None:
    script = _script_or_message(text)
    if isinstance(script, str):
        assert script.startswith("m.sh:")
        return
    lines = text.count("\n") + 1
    assert all(1 <= word.line <= lines for command in script.commands for word in command)


@given(st.lists(st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=8), min_size=1, max_size=6))
def test_words_as_the_shell_quotes_them(words: list[str]) -> None:
    import shlex

    (command,) = read_script(" ".join(["x", *map(shlex.quote, words)]), "m.sh").commands
    assert [word.text for word in command] == ["x", *words]


def test_a_long_word_is_read_in_time() -> None:
    script = read_script('x="' + "ab,c d\n" * (LONGEST_LINE // 16) + '"', "m.sh")
    assert len(list(script.texts["x"].lines())) == LONGEST_LINE // 16 + 1


# ---- by the commands -------------------------------------------------------------------------------------------------


def run(command, *arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def types_in(path: Path) -> dict[str, str]:
    return {name: tensor.type.name for name, tensor in open_gguf(path).tensors.items()}


def test_a_script_over_files(tmp_path: Path) -> None:
    low, high = write_model(tmp_path / "low.gguf", kind="Q4_0"), write_model(tmp_path / "high.gguf", kind="Q8_0")
    script = tmp_path / "make.sh"
    script.write_text(
        "llama-quantize --output-tensor-type q8_0 --tensor-type attn_q=q8_0 --tensor-type 'blk.0.attn_q=q4_0' in Q4_0\n"
    )
    out = tmp_path / "mix.gguf"
    said = run(recompile, "-i", low, "-o", out, "-or", script, "--no-probe", "--type-sources", f"Q8_0={high}")
    assert {name for name, kind in types_in(out).items() if kind == "Q8_0"} == {
        name for name in types_in(low) if "attn_q.weight" in name or name == "output.weight"
    }
    said = " ".join(said.split())
    assert 'make.sh:1: "blk.0.attn_q" never decides' in said
    assert "llama-quantize: Q4_0 is not used" in said


def test_a_script_over_a_dense_base(tmp_path: Path) -> None:
    """What model_quantize would make of it, said as a recipe again."""
    base, script = tiny.base("llama-2"), tmp_path / "make.sh"
    text = "llama-quantize --tensor-type ffn_down=q8_0 --tensor-type 'blk.0.ffn_down=q5_0' in.gguf {}\n"
    script.write_text(text.format("Q4_0"))
    out = tmp_path / "types.txt"
    said = run(recompile, "-i", base, "-or", script, "--emit", "thireus", "-o", out)
    found = load_type_recipe(out).resolve([f"blk.{n}.{kind}.weight" for n in (0, 1) for kind in ("ffn_down", "attn_q")])
    assert found == {
        f"blk.{n}.{kind}.weight": t for n in (0, 1) for kind, t in (("ffn_down", "Q8_0"), ("attn_q", "Q4_0"))
    }
    assert "never decides" in said
    script.write_text(text.format("IQ3_M"))
    said = run(recompile, "-i", base, "-or", script, "--emit", "thireus", code=1)
    assert "make.sh:1: llama-quantize: " in " ".join(said.split())
