"""What goes into the page, the pictures and the card; hostile names; override files written and read by the page."""

from __future__ import annotations

import base64
import functools
import gzip
import itertools
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from eval.metrics import kl_histogram, paired_difference
from eval.report.card import card, paired_interval
from eval.report.data import choice_of, gather
from eval.report.page import page_data, render
from eval.report.pictures import pictures, write_pictures
from recompile.cli.model_report import main
from recompile.costs import load_profile
from recompile.errors import MismatchError, NotFiniteError, RecompileError
from recompile.optimize.choose import predict
from recompile.recipe.recipe import Override, Recipe, Source, dump_recipe, load_recipe, parse_recipe
from tests.report.made import details, write_diff, write_profile

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "</script><script>window.hacked = 1</script><b a=\"1\" c='2'>&amp;${window.hacked=2}`%{x}`"
    "\u202e\u2028\U0001f600é" + "x" * 3000
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("report") / "profile.jsonl")


def test_histogram_of_known_values() -> None:
    found = kl_histogram(torch.tensor([0.0, 1e-9, 1.5e-8, 0.5, 0.5, 150.0, -1e-9]))
    assert (found.below, found.above, len(found.counts)) == (3, 1, 50)
    assert found.counts[0] == 1  # 1.5e-8: the first fifth of the decade above 1e-8
    assert found.counts[38] == 2  # log10(0.5) = -0.301: bin floor((8 - 0.301) * 5)
    assert sum(found.counts) + found.below + found.above == 7
    with pytest.raises(NotFiniteError):
        kl_histogram(torch.tensor([0.5, float("nan")]))


def test_page_holds_every_number_of_the_profile(profile: Path) -> None:
    data = gather(profile)
    page = render(data)
    packed = re.search(r'id="data">([^<]+)</script>', page)
    assert packed
    found = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    assert found == json.loads(json.dumps(page_data(data)))
    costs = np.frombuffer(base64.b64decode(found["cost"]), "<f8")
    loaded = load_profile(profile)
    wanted = [loaded.cost(g.name, label) for g in loaded.header.groups for label in g.bits]
    assert costs.tolist() == [cost.kl_nats for cost in wanted if cost is not None]
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page.split('id="plotly"')[0]), "nothing is loaded"
    assert "default-src 'none'" in page


def test_measured_builds_are_matched_with_their_prediction(profile: Path, tmp_path: Path) -> None:
    recipe = 'sources: [{id: 6, model_dir: 6bpw}]\noverrides: [{key: "*.o_proj.*", source: 6}]\n'
    reports = [
        write_diff(tmp_path / "a.json", "3bpw", 0.5),
        write_diff(tmp_path / "b.json", "./3bpw", 0.4, recipe),
        write_diff(tmp_path / "c.json", "/elsewhere/awq", 0.3, size=None),
    ]
    data = gather(profile, reports)
    uniform, mix, other = data.measured
    loaded = load_profile(profile)
    assert (uniform.name, uniform.uniform) == ("uniform 3", "3")
    assert uniform.predicted_kl_nats == predict(loaded, dict.fromkeys((g.name for g in loaded.header.groups), "3"))[0]
    assert mix.uniform is None
    assert mix.choice is not None
    assert {name for name, label in mix.choice.items() if label == "6"} == {
        group.name for group in loaded.header.groups if group.name.endswith("o_proj")
    }
    assert data.start_bits == data.bits_of(mix.choice)
    assert other.predicted_kl_nats is None
    assert "none of the profile's sources" in other.note
    assert other.bpw is None


def test_what_reports_hold_beside_a_kl(profile: Path, tmp_path: Path) -> None:
    cache = {"name": "q4_0"}
    reports = [
        write_diff(tmp_path / "a.json", "3bpw", 0.5, **details(0.5)),
        write_diff(tmp_path / "b.json", "3bpw", 0.6, cache=cache),
        write_diff(tmp_path / "c.json", "3bpw", 0.5),
    ]
    with_all, through, plain = gather(profile, reports).measured
    assert [slice["name"] for slice in with_all.by_origin] == ["wiki", "code", "tool calls"]
    assert with_all.divergence is not None
    assert with_all.divergence["median"] is None
    assert [(point.name, point.bits, point.bytes_per_token) for point in with_all.cache_sweep] == [
        ("q8_0", 8.5, 544.0), ("q4_0", 4.5, 288.0), ("f16", 16.0, 1024.0),
    ]  # fmt: skip
    assert with_all.cache_sweep[1].difference == 1 / 2**4.5
    assert with_all.attribution is not None
    assert with_all.attribution["groups"][0]["noise"] == 0.5
    assert with_all.attribution["total_noise"] == 1.5
    assert (through.name, through.predicted_kl_nats) == ("uniform 3, cache q4_0", None)
    assert "of weights alone" in through.note
    assert (plain.by_origin, plain.divergence, plain.cache_sweep, plain.attribution) == ((), None, (), None)
    broken = details(0.5)
    del broken["cache_sweep"][0]["cache"]
    with pytest.raises(RecompileError, match="an incomplete report, at 'cache'"):
        gather(profile, [write_diff(tmp_path / "d.json", "3bpw", 0.5, **broken)])


def test_builds_of_two_references_are_not_set_side_by_side(profile: Path, tmp_path: Path) -> None:
    def report(name: str, perplexity: float, **more: Any) -> Path:
        return write_diff(tmp_path / name, "3bpw", 0.5, score_reference={"perplexity": perplexity}, **more)

    one, near, far = report("a.json", 12.0), report("b.json", 12.03), report("c.json", 13.0)
    assert len(gather(profile, [one, near]).measured) == 2, "another type of arithmetic"
    with pytest.raises(
        MismatchError, match=r"two references: .* perplexity of 12, the other of 13; give reports of one"
    ):
        gather(profile, [one, near, far])
    assert len(gather(profile, [one, report("d.json", 13.0, rows_sha256="ee" * 32)]).measured) == 2, "other rows"
    assert len(gather(profile, [one, write_diff(tmp_path / "e.json", "3bpw", 0.5)]).measured) == 2, "not said"


def places_of(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of a value within JSON, and of everything in it; of a list its first two items."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places_of(item, (*place, key))


def test_a_value_of_another_type_is_refused_or_not_shown(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every place of a report, by its file; the card and the data of the page hold what is left."""
    monkeypatch.setattr("eval.report.data.load_profile", functools.cache(load_profile))  # hundreds of times the same
    path = write_diff(tmp_path / "a.json", "3bpw", 0.5, **details(0.5))
    whole, refused = json.loads(path.read_text()), set()
    for place in itertools.islice(places_of(whole), 1, None):
        for value in ("x", [1], {"a": [1]}, math.nan, True):
            changed = json.loads(json.dumps(whole))
            inside = changed
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = value
            path.write_text(json.dumps(changed))
            said = f"{path}: "
            try:
                data = gather(profile, [path])
                if value == "x":  # which takes longer
                    json.dumps(page_data(data), allow_nan=False)
                card(data)
            except RecompileError as error:
                said = str(error)
                refused.add(place)
            assert said.startswith(f"{path}: ")
    assert {("kl", "std_error"), ("kl_quantiles", "p99"), ("by_origin", 0, "kl", "mean")} <= refused


def test_a_recipe_that_cannot_be_predicted_says_why(profile: Path) -> None:
    loaded = load_profile(profile)
    for text, message in (
        ('sources: [{id: a, model_dir: ./8bpw}]\noverrides: [{key: "*.o_proj.*", source: a}]', "8bpw is none of"),
        ('sources: [{id: 6, model_dir: 6bpw}]\noverrides: [{key: "*.q_proj.*", source: 6}]', "from several sources"),
    ):
        with pytest.raises(RecompileError, match=message):
            choice_of(parse_recipe(text), loaded, "3")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"kl_by_confidence": []}', '{"choice": {}, "budget_bits": 1, "measured": {}}']
)
def test_other_json_is_refused_with_its_name(profile: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(content)
    found = CliRunner().invoke(main, [str(profile), str(path), "-o", str(tmp_path / "r.html")])
    assert found.exit_code == 1
    assert "odd.json" in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "r.html").exists()


def test_an_unfinished_profile_is_refused(profile: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(profile.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(RecompileError, match="unfinished: 3 swaps"):
        gather(cut)


# ---- hostile names -----------------------------------------------------------------------------------------------


def test_hostile_names_are_no_markup(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.jsonl", 2, ids=(3, HOSTILE[:200]), prefix=f"{HOSTILE}.layers")
    data = gather(path, [write_diff(tmp_path / "d.json", HOSTILE[:150], 0.3)], title=HOSTILE)
    page = render(data)
    assert "window.hacked" not in page.replace("window.hacked = 1&lt;/script&gt;", "").replace(
        "${window.hacked=2}", ""
    ), "only the escaped title names it"
    assert "<b a=" not in page
    text = card(data)
    assert "<script>" not in text.split("### Recipe")[0].replace("\\<script\\>", "")
    recipe = text[text.index("yaml\n") + 5 :]
    recipe = recipe[: re.search(r"^`{3,}$", recipe, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert yaml.safe_load(recipe)["sources"][0]["id"] == HOSTILE[:200]


# ---- the recipe module of the page against recompile.recipe ----------------------------------------------------------


def test_the_page_writes_what_python_reads(node: Callable[[str, Any], Any]) -> None:
    names = [
        *(f"model.layers.{layer}.mlp.experts.{n}.up_proj" for layer in (0, 1) for n in range(12)),
        'a.0."quoted\\".x',
        "b.1.it's # no comment",
        "c.2.{x: 1}, [y]",
        "d.3.\u2028\u0085\ufefftab\there",
        "e.4.\U0001f600é",
        "model.layers.1.mlp.experts.gate",
    ]
    sources = ["b" if name.startswith("model.layers.0") or n % 3 == 0 else "a" for n, name in enumerate(names)]
    ids: list[Any] = [
        "a",
        'x" y: {',
    ]
    lines = dump_recipe(Recipe(tuple(Source(one, f"dir {one}") for one in ids), ())).splitlines()
    text = node(
        "return load('recipe.js').write(input).join('\\n');",
        {
            "groups": [
                {"modules": [name], "layer": n % 4, "source": "ab".index(source), "comment": f"KL\n: {name}"}
                for n, (name, source) in enumerate(zip(names, sources, strict=True))
            ],
            "candidates": [
                {"source_line": line, "id_yaml": json.dumps(one)} for line, one in zip(lines[1:], ids, strict=False)
            ],
            "base": 0,
            "header": ["what\nfor: \u0085"],
            "tail": ['base: "dir a"'],
        },
    )
    recipe = parse_recipe(text)
    assert recipe.base == "dir a"
    assert 'experts.*.up_proj.*"' in text
    assert len(recipe.overrides) < sources.count("b")
    for name, source in zip(names, sources, strict=True):
        assert recipe.source_dir(f"{name}.weight_packed") == (f"dir {ids[1]}" if source == "b" else None), name


RESOLVE = """
    const recipes = load('recipe.js');
    return input.map(([text, names]) => {
      try { return names.map(recipes.resolver(recipes.parse(text))); } catch (error) { return String(error.message); }
    });
"""


def test_the_page_resolves_recipes_as_python_does(node: Callable[[str, Any], Any]) -> None:
    names = [
        f"model.layers.{layer}.{part}.weight_packed"
        for layer in (0, 1, 2, 10, 11)
        for part in (
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.down_proj",
            "mlp.experts.3.up_proj",
            "mlp.shared_expert.up_proj",
        )
    ]
    texts = [path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    assert len(texts) >= 5
    rng = random.Random(3)
    pieces = [
        "*",
        "model.",
        "layers.",
        "1",
        "0",
        "self_attn",
        "mlp",
        ".q_proj",
        ".o_proj",
        ".weight_packed",
        "*.",
        ".*",
        "experts.",
    ]
    for _ in range(150):
        ids: list[Any] = rng.sample([4, "4", 4.5, True, "yes", None, "x y", "it's", "a#b"], 4)
        sources = tuple(Source(one, f"./d{rng.randint(0, 2)}") for one in ids)
        keys = ("*" + "".join(rng.choices(pieces, k=rng.randint(1, 3))) + "*" for _ in range(rng.randint(1, 8)))
        overrides = tuple(Override(key, rng.choice(ids)) for key in keys)
        texts.append(dump_recipe(Recipe(sources, overrides, base="./b"), {line.key: "why # not" for line in overrides}))
    answers = node(RESOLVE, [[text, names] for text in texts])
    assert sum(any(found for found in answer) for answer in answers) > 40
    for text, answer in zip(texts, answers, strict=True):
        recipe = parse_recipe(text)
        assert answer == [recipe.source_dir(name) for name in names], text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "overrides"),
        ("just words", "is not read here"),
        ("overrides: &a []\n", "not read here"),
        ("sources: [{id: 4, model_dir: x}]\noverrides: [{key: a, source: 5}]", "unknown source id 5"),
        ('sources: []\noverrides:\n  - {key: "a, source: 4}', "quote that is not closed"),
        ("sources: []\noverrides:\n  - {key: a", "not closed"),
        ("sources: []\noverrides:\n  - {source: 4}", 'without "key"'),
    ],
)
def test_the_page_refuses_what_it_cannot_read(node: Callable[[str, Any], Any], text: str, message: str) -> None:
    (answer,) = node(RESOLVE, [[text, ["a"]]])
    assert isinstance(answer, str)
    assert message in answer


# ---- pictures and card -------------------------------------------------------------------------------------------


def test_pictures_and_card(profile: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib (extra: report)")
    diff = write_diff(tmp_path / "d.json", "3bpw", 0.5)
    call = [
        str(profile),
        str(diff),
        "--png",
        str(tmp_path / "png"),
        "--svg",
        str(tmp_path / "svg"),
        "--card",
        "-",
        "-b",
        "3.5",
    ]
    found = CliRunner().invoke(main, call)
    assert found.exit_code == 0, found.output
    names = {path.stem for path in (tmp_path / "svg").iterdir()}
    assert names == {"frontier", "bit-map", "heat-map", "predicted-measured", "token-kl", "confidence", "drift"}
    assert {path.stem for path in (tmp_path / "png").glob("*.png")} == names
    svg = (tmp_path / "svg" / "frontier.svg").read_text()
    assert "bits per weight over quantized modules" in svg
    assert "uniform, measured" in svg
    png, as_svg = [*call[:4], *call[-2:]], [*call[:2], *call[4:6], *call[-2:]]
    assert CliRunner().invoke(main, as_svg).exit_code == 0  # known as this tool's, and drawn again
    mine = tmp_path / "png" / "drift.png"
    mine.write_bytes(b"of the user")
    (tmp_path / "svg" / "frontier.svg").unlink()
    refused = CliRunner().invoke(main, call)
    assert (refused.exit_code, f"{mine}: exists, and this tool did not make it" in refused.output) == (1, True)
    assert mine.read_bytes() == b"of the user"
    assert not (tmp_path / "svg" / "frontier.svg").exists()  # nothing is written before
    assert CliRunner().invoke(main, [*png, "--force"]).exit_code == 0
    assert mine.read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(main, [*call[:2], "--svg", str(tmp_path / "again"), "-b", "3.5"])
    assert again.exit_code == 0
    assert (tmp_path / "again" / "frontier.svg").read_text() == svg
    assert "| uniform 3 | 3.25 | 8.6 MiB | 0.5000 ± 0.0250 | 0.167 | 3.000 | 13.500 | 80.0 % |" in found.stdout
    assert "| this recipe (predicted) | 3.4" in found.stdout or "| this recipe (predicted) | 3.5" in found.stdout
    recipe = parse_recipe(found.stdout.split("```yaml\n")[1].split("```")[0])
    data = gather(profile, [diff], start_bpw=3.5)
    choice = choice_of(recipe, data.profile, "3")
    assert data.bpw(data.bits_of(choice)) <= 3.5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--card", "mine/card.md"), "--card mine/card.md: cannot be written: Not a directory"),
        (("--card", "."), "--card .: cannot be written: is a directory"),
        (("--card", "c" * 250), "cannot be written: File name too long"),
        (("--png", "mine"), "--png mine/frontier.png: cannot be written: Not a directory"),
        (("--svg", "mine/deep"), "--svg mine/deep/frontier.svg: cannot be written: Not a directory"),
        (("--svg", "page.html"), "would be a file and a directory at once"),
        (("--card", "locked/card.md"), "no permission to write in .*locked"),
        (("--png", "locked/png"), "no permission to write in .*locked"),
    ],
)
def test_all_outputs_are_looked_at_before_any_is_written(
    more: tuple[str, ...], says: str, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib (extra: report)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and allowed(path, mode))
    found = CliRunner().invoke(main, [str(profile), "-o", "page.html", *more])
    assert found.exit_code == 1
    assert re.search(says, " ".join(found.output.split())), found.output
    assert sorted(os.listdir()) == ["locked", "mine"]
    assert os.listdir("locked") == []
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_card_pairs_builds_and_shows_what_reports_have(profile: Path, tmp_path: Path) -> None:
    rows = {"uniform": [0.5, 0.6, 0.4], "mix": [0.3, 0.45, 0.2]}
    more = {
        "delta_p": {"mean": {"mean": -0.01, "std_error": 0.001}, "rms": {"mean": 0.0625, "std_error": 0.002}},
        "sure_flips": {"above": 0.9, "tokens": 40, "share": {"mean": 0.025, "std_error": 0.01}},
        "divergence": {"median": 41.0},
    }
    uniform = write_diff(tmp_path / "u.json", "3bpw", 0.5, kl_rows=rows["uniform"], **more)
    recipe = "sources: [{id: 4, model_dir: ./4bpw}]\noverrides: [{key: '*down_proj.*', source: 4}]\n"
    mix = write_diff(tmp_path / "m.json", "3bpw", 0.3, recipe, kl_rows=rows["mix"])
    found = card(gather(profile, [uniform, mix], start_bpw=3.5))
    header = found.splitlines()[2]
    assert header.endswith("| same top token | RMS Δp | flips where sure | greedy runs part |")
    assert "| 80.0 % | 6.25 % | 2.50 % | after 41 tokens |" in found
    assert "| 80.0 % | – | – | – |" in found
    mean, low, high = paired_interval(rows["mix"], rows["uniform"])
    wanted, (low_wanted, high_wanted) = paired_difference(torch.tensor(rows["mix"]), torch.tensor(rows["uniform"]))
    assert (mean, low, high) == pytest.approx((wanted.mean, low_wanted, high_wanted), abs=1e-6)
    assert f"mix less uniform 3: {mean:+.4f} nats per token" in found
    assert re.search(r"Recipe sha256: `[0-9a-f]{64}`", found)


def test_card_and_pictures_show_slices_caches_and_attribution(profile: Path, tmp_path: Path) -> None:
    size = {"bpw": 3.25, "total_bytes": 9_000_000, "head_bpw": 6.5, "embedding_bpw": 16.0}
    plain = write_diff(tmp_path / "p.json", "4bpw", 0.2)
    full = write_diff(tmp_path / "f.json", "3bpw", 0.3, noise_floor=2.5e-7, **details(0.3) | {"size": size})
    data = gather(profile, [full, plain], start_bpw=3.5)
    text = card(data)
    assert "| same top token | head, bits | embedding, bits |" in text
    assert "| 80.0 % | 6.50 | 16.00 |" in text
    assert "Noise floor 2.5e-07 nats." in text
    for title in ("by kind of text", "by length of context", "with a quantized KV cache", "where the error comes from"):
        assert text.count(f", {title}:") == 1, "the plain report has none of these"
    cache = next(line for line in text.splitlines() if line.startswith("| q4\\_0"))
    assert f"| 4.50 | {data.measured[0].cache_sweep[1].bytes_per_token:.0f} |" in cache
    drawn = {path.stem for path in write_pictures(data, tmp_path / "svg", "svg")}
    assert drawn >= {"by-kind", "by-position", "kv-cache", "attribution"}
    without = {picture.name for picture in pictures(gather(profile, [plain]))}
    assert not without & {"by-kind", "by-position", "kv-cache", "attribution"}


def test_one_file_of_several_candidates(profile: Path, tmp_path: Path) -> None:
    parts = [json.loads(write_diff(tmp_path / f"{n}.json", f"{n}bpw", 1 / n).read_text()) for n in (3, 4)]
    (tmp_path / "many.json").write_text(json.dumps({"names": ["3bpw", "4bpw"], "candidates": parts, "pairs": []}))
    assert [one.name for one in gather(profile, [tmp_path / "many.json"]).measured] == ["uniform 3", "uniform 4"]


def test_candidates_that_are_made_on_the_fly(tmp_path: Path, node: Callable[[str, Any], Any]) -> None:
    """Sources are written as model_optimize writes them, and what is to be run is model_quantize."""
    data = gather(write_profile(tmp_path / "made.jsonl", specs=True), start_bpw=3.5)
    found = card(data)
    assert "model_quantize -i ./base -o OUT -or overrides.yaml" in found
    recipe = parse_recipe(found.split("```yaml\n")[1].split("```")[0])
    assert recipe.sources
    assert all(source.spec == {"bits": source.id} for source in recipe.sources)
    first, *_ = page_data(data)["candidates"]
    assert (first["made"], first["source_line"]) == (True, "  - {id: 3, bits: 3}")
    assert first["base_lines"] == ["base:", "  bits: 3"]
    text = "sources:\n  - {id: 4, bits: 4}\noverrides:\n  - {key: '*', source: 4}\nbase:\n  bits: 3\n"
    parsed = node("return load('recipe.js').parse(input);", text)
    assert parsed["sources"][0]["model_dir"] == "bits: 4"
    assert parsed["base"] == "bits: 3"


def test_nothing_asked_for_is_an_error(profile: Path) -> None:
    found = CliRunner().invoke(main, [str(profile)])
    assert found.exit_code == 1
    assert "nothing to write" in found.output
    found = CliRunner().invoke(main, [str(profile), "-b", "30", "--card", "-"])
    assert found.exit_code == 1
    assert "out of reach" in found.output


def test_a_recipe_file_becomes_a_point(profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "peer.yaml"
    path.write_text('sources: [{id: 6, model_dir: ./6bpw}]\noverrides: [{key: "*.down_proj.*", source: 6}]\n')
    (preset,) = gather(profile, recipes=[path]).presets
    loaded = load_profile(profile)
    assert preset.choice == choice_of(load_recipe(path), loaded, "3")
    assert (preset.predicted_kl_nats, preset.predicted_std_error) == predict(loaded, preset.choice)
    assert replace(preset, name="x").bits == gather(profile).bits_of(preset.choice)
    assert len(set(itertools.chain(preset.choice.values()))) == 2
