"""The house keeps its order: who may import whom, what starts without torch, what only commands may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = [path for folder in ("recompile", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]
EVERYTHING = [*LIBRARY, *(path for folder in ("tests", "scripts") for path in sorted((ROOT / folder).rglob("*.py")))]

# From the bottom up: a room may import those before it. A new one gets its place here.
ROOMS = (
    "arguments",
    "callable_rooms",
    "errors",
    "events",
    "io",
    "formats",
    "gguf",
    "checkpoint",
    "recipe",
    "costs",
    "model",
    "merge",
    "quantize",
    "optimize",
    "planning",
    "api",
    "auto_stages",
    "auto_minutes",
    "auto_checks",
    "auto",
    "cli",
)

# Recipes, plans, --dry-run and --help start at once.
WITHOUT_TORCH = (
    "recompile.formats",
    "recompile.gguf.container",
    "recompile.checkpoint.checkpoint",
    "recompile.recipe.recipe",
    "recompile.model.texts",
    "recompile.model.tokenizer",
    "recompile.model.tokens",
    "recompile.merge.overlay",
    "recompile.merge.type_recipes",
    "recompile.merge.engine_rules",
    "recompile.formats.schemes",
    "recompile.merge.configs",
    "recompile.merge.plan_safetensors",
    "recompile.merge.write_safetensors",
    "recompile.merge.write_gguf",
    "recompile.costs",
    "recompile.optimize.choose",
    *(f"recompile.cli.{path.stem}" for path in sorted((ROOT / "recompile" / "cli").glob("*.py"))),
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Of the whole file, in the order of ast.walk."""
    return tuple(ast.walk(tree_of(path)))


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Everything below `if TYPE_CHECKING:`, which never runs."""
    return {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import that runs, wherever in the file it stands."""
    tree = tree_of(path)
    skipped = for_types_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            yield node.lineno, str(node.module)
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(path: Path) -> str:
    """recompile/quantize/gptq.py -> "quantize"; "" for recompile/__init__.py."""
    inside = path.relative_to(ROOT / "recompile").with_suffix("").parts[0]
    return "" if inside == "__init__" else inside


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at() -> None:
    assert len(LIBRARY) > 30
    assert {room_of(path) for path in LIBRARY if "recompile" in path.relative_to(ROOT).parts[:1]} == {"", *ROOMS}


@pytest.mark.parametrize("path", [path for path in LIBRARY if name_of(path).startswith("recompile/")], ids=name_of)
def test_rooms_import_lower_ones_only(path: Path) -> None:
    room = room_of(path)
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) if room else set()
    for line, name in imports_of(path):
        first, *rest = name.split(".")
        if first == "recompile" and rest and rest[0] in ROOMS:
            assert rest[0] in allowed, f"{name_of(path)}:{line}: {room} imports {rest[0]}, which stands above it"
        if first == "eval":
            assert room in ("api", "auto_checks", "auto", "cli"), f"{name_of(path)}:{line}: {room} imports eval"


@pytest.mark.parametrize("path", [path for path in LIBRARY if name_of(path).startswith("eval/")], ids=name_of)
def test_eval_knows_nothing_of_commands(path: Path) -> None:
    for line, name in imports_of(path):
        assert not name.startswith("recompile.cli"), f"{name_of(path)}:{line}"


def test_imports_for_types_make_no_circle() -> None:
    """`if TYPE_CHECKING:` hides a circle from Python, not from a reader: these imports count, too."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in LIBRARY}
    edges = {name: {other for other in imports_at_top(path, names) if other != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in names:
        visit(name, ())


def imports_at_top(path: Path, names: Mapping[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports outside of functions, also for types only."""
    nodes: list[ast.stmt] = list(tree_of(path).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.If, ast.ClassDef, ast.Try)):
            nodes += node.body
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found = f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in names else str(node.module)
                if found in names:
                    yield found


def test_tests_import_helpers_in_one_way() -> None:
    """`import tiny` and `from tests import tiny` would be two modules, with caches of their own."""
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py") if not path.stem.startswith("test_")}
    for path in (ROOT / "tests").rglob("*.py"):
        for line, name in imports_of(path):
            where = f"{name_of(path)}:{line}"
            assert name.split(".")[0] not in helpers, f"{where}: write from tests import {name}"


def test_only_whole_packages_are_skipped() -> None:
    """So that a module that upstream moved fails a test, where it would skip it."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in nodes_of(path):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr
            if named == "importorskip":
                package = ast.literal_eval(node.args[0])
                assert "." not in package, f"{name_of(path)}:{node.lineno}: skip on {package.split('.')[0]}"


# [out, in], "any shape", or a docstring that has it: "As `dequantize`", "As Checkpoint.load".
SHAPE = re.compile(r"\[[^\]]*\]|any shape|\bAs `?[A-Za-z]")


def public_tensor_functions(path: Path) -> Iterator[tuple[ast.FunctionDef, str, str]]:
    """(function, its docstring, that of its class) of all that take or return a Tensor."""
    tree = tree_of(path)
    for holder in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        if isinstance(holder, ast.ClassDef) and holder.name.startswith("_"):
            continue
        about = ast.get_docstring(holder) or "" if isinstance(holder, ast.ClassDef) else ""
        for node in holder.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                types = [*(one.annotation for one in taken), node.returns]
                if any(re.search(r"\bTensor\b", ast.unparse(one)) for one in types if one is not None):
                    yield node, ast.get_docstring(node) or "", about


def test_public_tensor_functions_say_their_shapes() -> None:
    """In their docstring or that of their class. A method without one implements a protocol's, which has it."""
    found = [(path, *entry) for path in LIBRARY for entry in public_tensor_functions(path)]
    documented = {node.name for _, node, text, _ in found if SHAPE.search(text)}
    for path, node, text, about in found:
        said = SHAPE.search(text + about) or (not text and node.name in documented)
        assert said, f"{name_of(path)}:{node.lineno}: {node.name}: say [rows, columns], or any shape"


def test_what_others_import_has_a_public_name() -> None:
    for path in EVERYTHING:
        for line, name in imports_of(path):
            first, last = name.split(".")[0], name.split(".")[-1]
            ours = first in ("recompile", "eval", "tests", "scripts")
            private = last.startswith("_") and not last.startswith("__")
            assert not (ours and private), f"{name_of(path)}:{line}: {name}; name it publicly"


COMMANDS = {path.stem for path in (ROOT / "recompile" / "cli").glob("*.py")} & {"recompile"} | {
    path.stem for path in (ROOT / "recompile" / "cli").glob("model_*.py")
}


def test_scripts_and_tests_only_run_commands() -> None:
    """What else they need is in the library; tests/cli looks at what is printed, too."""
    for path in EVERYTHING:
        if path in LIBRARY or path.parent.name == "cli":
            continue
        for line, name in imports_of(path):
            if name.startswith("recompile.cli."):
                command, _, function = name.removeprefix("recompile.cli.").partition(".")
                assert command in COMMANDS, f"{name_of(path)}:{line}: {name}"
                assert function in ("", "main"), f"{name_of(path)}:{line}: {name}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_only_commands_talk_to_people(path: Path) -> None:
    if name_of(path).startswith("recompile/cli/"):
        return
    for line, name in imports_of(path):
        assert name.split(".")[0] not in ("click", "rich"), f"{name_of(path)}:{line}: {name}"
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "exit", "quit"), f"{name_of(path)}:{node.lineno}"


# Flags that are not ours, or that stand in whole command lines in files that another version wrote.
FLAGS_OF_OTHERS = {
    "recompile/auto.py": ("-b", "--total-bpw", "--size"),  # settings of runs that were begun before, compared as text
    "recompile/gguf/imatrix.py": ("--in-file", "-o"),  # llama-imatrix
    "recompile/merge/type_recipes.py": ("--tensor-type", "--custom-q"),  # llama-quantize, ik
    "recompile/merge/type_scripts.py": None,  # llama-quantize, grep and sed
    "recompile/quantize/external_converters.py": None,  # exllamav2, exllamav3
    "recompile/quantize/gguf_convert.py": None,  # Python's venv and pip, llama.cpp's converter
    "recompile/quantize/modifiers.py": ("-a",),  # w8a8-int-a, a scheme
    "eval/engines/builds.py": ("--no-deps",),  # pip
    "eval/engines/environments.py": None,  # Python and pip
    "eval/engines/base_logits.py": ("--save-all-logits",),  # llama-perplexity
    "recompile/formats/cache_types.py": ("-cq", "-ctk", "-ctv", "-fa"),  # exllamav3, llama.cpp
    "eval/engines/process.py": ("-c",),  # python
    "eval/search/refine_journal.py": ("--max-step", "--pool", "--active-bpw"),  # in keys of journals begun before
}
# A command line that can be run as it stands is no flag out of place: "recompile -i BASE -o OUT -or overrides.yaml".
COMMAND_LINE = re.compile(r"\b(?:recompile|model_[a-z]+)(?: (?:--?[a-z-]+|[A-Z]+(?:\.gguf)?(?![a-z])|\.\.\.))+")
FLAG = re.compile(r"(?<![\w!-])(?:--[a-zA-Z][\w-]*|-[a-z]{1,2}(?=$|[\s,;:.)=\"']))")


def texts_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is no docstring; what an f-string puts in is X."""
    docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs | parts:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_names_arguments_not_flags(path: Path) -> None:
    """Messages name arguments as {name} (recompile/arguments.py), for which the commands put their flags."""
    if name_of(path).startswith("recompile/cli/"):
        return
    allowed = FLAGS_OF_OTHERS.get(name_of(path), ())
    for line, text in texts_of(tree_of(path)):
        found = [] if allowed is None else FLAG.findall(COMMAND_LINE.sub("", text))
        assert set(found) <= set(allowed or ()), f"{name_of(path)}:{line}: {text!r}"


def test_arguments_that_messages_name_are_arguments_of_the_api() -> None:
    import inspect

    import recompile.auto
    from recompile import api
    from recompile.arguments import ARGUMENTS

    verbs = [verb for name, verb in vars(api).items() if inspect.isfunction(verb) and not name.startswith("_")]
    known = {name for verb in (*verbs, recompile.auto.auto) for name in inspect.signature(verb).parameters}
    assert known >= ARGUMENTS
    named = re.compile(r"\{([a-z_]+)(?:=False)?\}")
    used = {
        name for path in LIBRARY for _, text in texts_of(tree_of(path)) for name in named.findall(text) if name in known
    }
    assert used - {"path"} <= ARGUMENTS, "add it to recompile/arguments.py"
    assert ARGUMENTS - used == {"pin", "minimum", "maximum", "ban"}, "no message names it"


def test_import_eval_is_never_written() -> None:
    """It would hide the builtin."""
    for path in EVERYTHING:
        for node in nodes_of(path):
            if isinstance(node, ast.Import):
                names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
                assert "eval" not in names, f"{name_of(path)}:{node.lineno}: write from eval.metrics import ..."


MOST_PARAMETERS = 9


def test_functions_take_options_not_long_lists() -> None:
    """Many settings are one frozen dataclass. The verbs of the Python API alone take them one by one."""
    for path in LIBRARY:
        for node in nodes_of(path):
            is_verb = name_of(path).startswith("recompile/api/") or getattr(node, "name", "") == "auto"
            if isinstance(node, ast.FunctionDef) and not is_verb:
                taken = node.args
                named = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
                count = sum(one.arg not in ("self", "cls") for one in named)
                assert count <= MOST_PARAMETERS, f"{name_of(path)}:{node.lineno}: {node.name} takes {count}"


MOST_LINES = 75


def test_functions_fit_on_a_screen() -> None:
    """Docstring included. The verbs of the Python API, most of which is their arguments, may be longer."""
    for path in LIBRARY:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef) and not name_of(path).startswith("recompile/api/"):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MOST_LINES, f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines"


def test_public_names_have_a_docstring() -> None:
    for path in LIBRARY:
        for node in tree_of(path).body:
            named = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
            if named and node.name != "main":
                assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno}: {node.name}"


def test_no_error_is_caught_without_a_name() -> None:
    for path in EVERYTHING:
        for node in nodes_of(path):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{name_of(path)}:{node.lineno}"


def test_light_rooms_import_no_torch() -> None:
    code = "import sys\n" + "".join(
        f"import {name}\nassert not {{'torch', 'transformers', 'numba'}} & sys.modules.keys(), {name!r}\n"
        for name in WITHOUT_TORCH
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr


# Where formats may be called by name. A merge's config and files, padding, shards, runs and plans ask the row instead.
# The list may only get shorter.
CALLED_BY_NAME = {
    "recompile/merge/check_formats.py",  # reads tensors and indexes, which the room of the rows lies below
    "recompile/merge/convert.py",  # from one format to another: of neither row alone
    "recompile/merge/engine_rules.py",  # what engines run, engine by engine, with the place in their source beside it
    "recompile/quantize/movable.py",  # which parts of a module healing moves, by the modules that do arithmetic on them
}


def test_formats_are_called_by_name_in_few_places() -> None:
    from recompile.formats import FORMATS
    from recompile.formats.compressed_tensors import QUANT_METHOD

    names = {QUANT_METHOD, *FORMATS} - {"dense", "gguf", "gptq", "awq"}  # the last two are methods as well
    found = {
        name_of(path)
        for path in LIBRARY
        if not name_of(path).startswith("recompile/formats/")
        for node in nodes_of(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert found - CALLED_BY_NAME == set(), "ask the format's row in recompile/formats"
    assert CALLED_BY_NAME - found == set(), "well done; take it off the list"


def scripts_of_the_package() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^\[project\.scripts\]\n((?:.+\n)*)", text, re.MULTILINE)
    assert section
    return dict(re.findall(r'^(\w+) = "([\w.:]+)"$', section[1], re.MULTILINE))


def test_every_command_is_documented() -> None:
    commands = scripts_of_the_package()
    assert set(commands) >= {"recompile", "model_quantize", "model_diff", "model_profile", "model_optimize"}
    readme = (ROOT / "README.md").read_text()
    for command, target in commands.items():
        assert re.search(rf"^ *{command} [-\w]", readme, re.MULTILINE), f"README.md shows no use of {command}"
        module, _, function = target.partition(":")
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        assert any(isinstance(n, ast.FunctionDef) and n.name == function for n in tree_of(path).body), target


def test_every_commands_help_has_an_example() -> None:
    for command, target in scripts_of_the_package().items():
        module, _, function = target.partition(":")
        code = f"import sys; sys.argv = [{command!r}, '--help']; from {module} import {function}; {function}()"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert found.returncode == 0, found.stderr
        assert re.search(rf"^ +{command} [-\w]", found.stdout, re.MULTILINE), f"{command} --help shows no example"


def test_what_the_guide_to_the_code_names_is_there() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text()
    named = re.findall(r"`((?:recompile|eval|tests)/[\w/.]+)`(?: `(\w+)`)?", text)
    assert len(named) > 12
    for path, name in named:
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"^(?:def |class )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path}: {name}"
    for target in re.findall(r"\]\((\w[\w-]*\.md)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_modules_that_texts_name_are_there() -> None:
    """In docstrings and comments, which no import checks."""
    import recompile

    modules = {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in LIBRARY}
    files = {path.name for path in EVERYTHING}
    for path in LIBRARY:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"`((?:recompile|eval)\.[a-z_]+)[.`]", text))
        assert named <= modules | {f"recompile.{verb}" for verb in recompile.API}, name_of(path)
        assert set(re.findall(r"\(?see (\w+\.py)", text)) <= files, name_of(path)


def test_commands_are_thin() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in LIBRARY if path.parent.name == "cli")
    assert lines < 3000, "what computes belongs in the library"
