"""Traces: what a model writes through its template, in which rows, with which mask and roles; and that a run that was
stopped ends as one that was not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import recompile
from eval.generating import WritingPlan
from eval.trace import prompts as bundle
from eval.trace.generate import Draw, Sampling, end_tokens, generator_of, plan_batches
from eval.trace.run import TraceReport
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_trace import main as model_trace
from recompile.errors import ArgumentError, JournalError, RecompileError, UnsupportedError
from recompile.events import Progress, ignore
from recompile.model.texts import ROLE_SHARES
from recompile.model.trace import METADATA_KEY, read_trace, role_of_prompt
from tests import tiny, traces
from tests.commands import refusal, run

TOKENS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prompts.jsonl, and greedy.safetensors and drawn.safetensors made of it."""
    folder = tmp_path_factory.mktemp("traces")
    traces.write_prompts(folder / "prompts.jsonl")
    traced(folder, "greedy", temperature=0)
    traced(folder, "drawn")
    return folder


def traced(folder: Path, name: str, **options: object) -> TraceReport:
    arguments = {"prompts": folder / "prompts.jsonl", "tokens": TOKENS, "batch_size": 4, **options}
    return recompile.trace(traces.model(), folder / f"{name}.safetensors", **arguments)


# ---- what is written -------------------------------------------------------------------------------------------------


def test_rows_and_mask_are_those_of_the_tokenizers_own_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(traces.model())
    trace = read_trace(folder / "greedy.safetensors")
    assert len(trace.ids) == len(traces.PROMPTS)
    for row, asked in enumerate(traces.PROMPTS):
        how = {"tools": asked.get("tools"), "enable_thinking": asked["kind"] == "reasoning", "return_dict": False}
        prompt = tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, **how)
        ids = trace.ids[row, : trace.lengths[row]].tolist()
        assert ids[: len(prompt)] == prompt
        assert trace.response[row].nonzero().flatten().tolist() == list(range(len(prompt), len(ids)))
        response = ids[len(prompt) :]
        ended = response[-1] == traces.END
        assert trace.about.ended[row] == ended
        assert traces.END not in response[:-1]
        assert ended or len(response) == TOKENS
        if asked["kind"] != "reasoning":  # the template drops a thought that was opened
            reply = {"role": "assistant", "content": tokenizer.decode(response[: len(response) - ended])}
            whole = tokenizer.apply_chat_template([*asked["messages"], reply], **how)
            assert whole == [*ids, *([] if ended else [traces.END])]
        assert not trace.ids[row, trace.lengths[row] :].any()
    assert trace.about.thinking_switch
    assert not trace.about.tools_in_text


def test_greedy_responses_are_those_of_plain_generation(folder: Path) -> None:
    model = tiny.plain_model(traces.model())
    trace = read_trace(folder / "greedy.safetensors")
    for row in range(0, len(trace.ids), 5):
        start = int(trace.response[row].nonzero()[0])
        ids = trace.ids[row : row + 1, :start]
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, eos_token_id=traces.END
        )
        assert torch.equal(made[0], trace.ids[row, : trace.lengths[row]])


def test_draws_are_those_of_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 9.0])  # the last one is beyond the vocabulary
    count, temperature = 6000, 0.7
    draw = Draw(Sampling(temperature), [generator_of(0, str(n)) for n in range(count)], 4, ignore)
    drawn = draw(torch.zeros(0), logits.expand(count, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / count
    wanted = (logits[:4] / temperature).softmax(-1)
    assert shares[4] == 0
    assert (shares[:4] - wanted).abs().max() < 5 * 0.5 / count**0.5


def test_the_seed_decides_and_neighbours_do_not(folder: Path) -> None:
    drawn = read_trace(folder / "drawn.safetensors")
    again = traced(folder, "again")
    assert again.sha256 == drawn.sha256
    assert traced(folder, "other", seed=1).sha256 != drawn.sha256
    traced(folder, "few", rows=5, batch_size=1)
    few = read_trace(folder / "few.safetensors")
    assert torch.equal(few.ids, drawn.first(5).ids[:, : few.ids.shape[1]])
    assert few.about.prompts == drawn.about.prompts[:5]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder: Path) -> None:
    seen: list[Progress] = []

    def stop(event: object) -> None:
        if isinstance(event, Progress):
            seen.append(event)
            if event.done >= 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(folder, "stopped", on_event=stop)
    out, journal = folder / "stopped.safetensors", folder / "stopped.safetensors.journal"
    assert not out.exists()
    *lines, last = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8  # a header, and eight prompts with the last
    journal.write_bytes(b"".join(lines) + last[:-5])  # cut off while it was written: its batch is made again
    others = [
        ({"seed": 3}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"tokens": TOKENS + 1}, "max_new_tokens"),
        ({"batch_size": 3}, "batch"),
        ({"rows": 20}, "prompts"),
        ({"prompts": traces.write_prompts(folder / "more.jsonl", copies=2)}, "prompts"),
    ]
    for changed, key in others:
        with pytest.raises(JournalError, match=rf"another trace \({key}\)"):
            traced(folder, "stopped", **changed)
    seen.clear()
    report = traced(folder, "stopped", on_event=seen.append)
    assert seen[0].done == 4
    assert report.sha256 == read_trace(folder / "drawn.safetensors").sha256
    assert not journal.exists()


def test_batches_hold_prompts_of_about_one_length() -> None:
    lengths = [100, 10, 12, 11, 300, 14, 16, 140, 13]
    batches = plan_batches([[0] * length for length in lengths], 4)
    assert sorted(number for batch in batches for number in batch) == list(range(9))
    assert [[lengths[number] for number in batch] for batch in batches] == [
        [10, 11, 12, 13],
        [14, 16],
        [100, 140],
        [300],
    ]


def test_ends_are_what_all_files_name() -> None:
    found = end_tokens({"eos_token_id": 1, "text_config": {"eos_token_id": [2, 3]}}, {"eos_token_id": [3, 4]}, 5)
    assert found == {1, 2, 3, 4, 5}
    assert end_tokens({"eos_token_id": None}, {}, None) == frozenset()


# ---- roles -----------------------------------------------------------------------------------------------------------


def test_a_prompt_has_one_role_whatever_file_it_stands_in(folder: Path) -> None:
    trace = read_trace(folder / "drawn.safetensors")
    parts = [trace.of_role(role) for role in ROLE_SHARES]
    prompts = [prompt for part in parts for prompt in part.about.prompts]
    assert sorted(prompts) == sorted(trace.about.prompts)
    assert len(set(prompts)) == len(prompts) == len(traces.PROMPTS)
    assert all(part.about.roles == (role,) * len(part.ids) for part, role in zip(parts, ROLE_SHARES, strict=True))
    for part, role in zip(parts, ROLE_SHARES, strict=True):
        assert {role_of_prompt(prompt) for prompt in part.about.prompts} <= {role}
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "turned.jsonl").write_text("".join(reversed(lines)) + lines[3])  # one of them twice
    turned = bundle.prompts_of_file(folder / "turned.jsonl")
    assert {prompt.sha256: prompt.role for prompt in turned} == dict(
        zip(trace.about.prompts, trace.about.roles, strict=True)
    )


def test_the_bundled_prompts_fill_every_role_of_every_kind() -> None:
    prompts = bundle.bundled_prompts()
    assert len({prompt.sha256 for prompt in prompts}) == len(prompts) == 320
    counts = Counter((prompt.kind, prompt.role) for prompt in prompts)
    wanted = {"calibrate": 16, "choose": 8, "accept": 6, "report": 10}
    assert counts == {(kind, role): count for kind in bundle.KINDS for role, count in wanted.items()}
    assert len({prompt.role for prompt in prompts[:8]}) > 1
    assert {prompt.kind for prompt in prompts[:8]} == set(bundle.KINDS)
    for prompt in prompts:
        texts = [message["content"] for message in prompt.messages]
        assert not any("{" in text or "}" in text for text in texts), prompt
        assert prompt.messages[-1]["role"] == "user"
        assert bool(prompt.tools) == (prompt.kind == "tools")
        assert prompt.thinking == (prompt.kind == "reasoning")
        assert (len(texts[0].split()) > 400) == (prompt.kind == "summary")
    # pinned: other prompts would be another measurement
    assert bundle.prompts_sha256(prompts) == "b2e342c44dedec3b39ac7bc8f034b8cb0783a09b13c58e56e9759a78788c3f31"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_without_a_template_is_refused_in_one_sentence(tmp_path: Path) -> None:
    said = refusal(model_trace, "-m", tiny.base("llama-2"), "-o", tmp_path / "t.safetensors")
    assert "no chat template" in said
    assert "text" in said
    assert list(tmp_path.iterdir()) == []


def test_a_template_without_tools_gets_them_as_text(tmp_path: Path) -> None:
    plain = "{% for message in messages %}<{{ message.role }}>{{ message.content }}~{% endfor %}"
    model = traces.talking_model(tmp_path / "model", plain)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "tools": [traces.TOOL]}))
    report = recompile.trace(model, tmp_path / "t.safetensors", prompts=prompts, tokens=4)
    assert report.about.tools_in_text
    assert not report.about.thinking_switch
    trace = read_trace(tmp_path / "t.safetensors")
    said = AutoTokenizer.from_pretrained(model).decode(trace.ids[0, : trace.lengths[0]])
    assert '"name": "look"' in said


def test_prompts_beyond_the_context_are_left_out(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    texts = ("short", "l" * 250)
    prompts.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": text}]}) for text in texts))
    report = recompile.trace(traces.model(), tmp_path / "t.safetensors", prompts=prompts, tokens=4)
    assert (report.rows, report.left_out) == (1, 1)
    prompts.write_text(prompts.read_text().splitlines()[1])
    with pytest.raises(RecompileError, match="no prompt fits its context of 256 tokens"):
        recompile.trace(traces.model(), tmp_path / "t.safetensors", prompts=prompts, tokens=4)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "is a list"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', r'messages\[0\]: wanted an object with "role" and "content"'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last one is the assistant's"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": ["x"]}', "tools: wanted a list of objects"),
        ('{"messages": [{"role": "user", "content": "x"}], "kind": 3}', "kind: wanted a name"),
        ('{"messages": [{"role": "user", "content": "x"}], "thinking": "on"}', "thinking: wanted true or false"),
        ('{"messages": [{"role": "user", "content": "x"}], "mesages": 1}', 'unknown key "mesages"'),
        ('{"messages"', r"p\.jsonl"),
        ("", "holds no prompt"),
    ],
)
def test_bad_prompts(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(RecompileError, match=said):
        bundle.prompts_of_file(tmp_path / "p.jsonl")


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_prompt(tmp_path: Path, inside: str) -> None:
    """JSON may hold other ends of a line as they are (or escaped, for control characters)."""
    text = json.dumps({"messages": [{"role": "user", "content": f"a{inside}b"}]}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_bytes(f"{text}\r\n{text.replace('b', 'c')}\n".encode())
    first, second = bundle.prompts_of_file(tmp_path / "p.jsonl")
    assert first.messages[0]["content"] == f"a{inside}b"
    assert second.messages[0]["content"] == f"a{inside}c"


def test_a_template_that_refuses_is_named_with_the_prompt(tmp_path: Path) -> None:
    model = traces.talking_model(tmp_path / "model", "{{ raise_exception('no system role') }}")
    prompts = traces.write_prompts(tmp_path / "p.jsonl")
    with pytest.raises(RecompileError, match=r"prompt 13 \(tools\): the chat template refuses it: .*no system role"):
        recompile.trace(model, tmp_path / "t.safetensors", prompts=prompts)
    for temperature in (-1.0, float("nan")):
        with pytest.raises(ArgumentError, match="temperature"):
            recompile.trace(model, tmp_path / "t.safetensors", temperature=temperature)


def test_a_trace_does_not_depend_on_where_the_weights_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = read_trace(folder / "drawn.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("eval.trace.run.plan_writing", lambda model, rows, *_: WritingPlan(1, rows, 1))
        traced(folder, "streamed")
    assert read_trace(folder / "streamed.safetensors").sha256 == drawn.sha256
    monkeypatch.setattr("eval.generating.available_bytes", lambda device: 1000)
    with pytest.raises(UnsupportedError, match=r"read layer by layer, .*; write fewer at a time \(batch_size\)"):
        traced(folder, "large")


def test_a_damaged_trace_is_refused(folder: Path, tmp_path: Path) -> None:
    good = folder / "drawn.safetensors"
    tensors = load_file(good)
    with safe_open(good, framework="pt") as stored:
        metadata = {key: value for key, value in stored.metadata().items() if key != "crc32"}
    about = json.loads(metadata[METADATA_KEY])
    bad = tmp_path / "bad.safetensors"

    def refused(said: str, changed: dict[str, object] | None = None, **parts: torch.Tensor) -> None:
        text = json.dumps({**about, **(changed or {})})
        save_file({**tensors, **parts}, bad, {**metadata, METADATA_KEY: text})
        with pytest.raises(RecompileError, match=said):
            read_trace(bad)

    others = [role for role in ROLE_SHARES if role != about["roles"][0]]
    refused("rows of one role must not be used in another", {"roles": [others[0], *about["roles"][1:]]})
    refused("two rows answer the same prompt", {n: [about[n][1], *about[n][1:]] for n in ("prompts", "roles")})
    refused("a trace of version 2", {"version": 2})
    refused("kinds is no list", {"kinds": about["kinds"][1:]})
    for name, value in about.items():  # and every other field of another type
        if name not in ("version", "kinds", "roles", "prompts", "ended"):
            refused(f"bad.safetensors: {METADATA_KEY}: {name}: a list, wanted", {name: [{}]})
            other = 3 if isinstance(value, str) else "3"
            refused(f"bad.safetensors: {METADATA_KEY}: {name}: ", {name: other})
    refused("temperature: nan, wanted a finite number", {"temperature": float("nan")})
    refused("lengths is int32", lengths=tensors["lengths"].to(torch.int32))
    refused("do not fit together", lengths=tensors["lengths"][1:].clone())
    refused("out of range", lengths=tensors["lengths"] + 1000)
    refused("out of range", input_ids=tensors["input_ids"] - 1)
    refused("marks padding or a first token", response=torch.ones_like(tensors["response"]))
    refused("or none of a row", response=torch.zeros_like(tensors["response"]))
    save_file(tensors, bad, {"format": "pt"})
    with pytest.raises(RecompileError, match="is no trace"):
        read_trace(bad)
    bad.write_bytes(b"x")
    with pytest.raises(RecompileError, match="not a whole safetensors file"):
        read_trace(bad)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_in_the_file(folder: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "t.safetensors", tmp_path / "t.json"
    options = ("--prompts", folder / "prompts.jsonl", "--tokens", TOKENS, "-bsz", 4, "--json", report, "--quiet")
    said = run(model_trace, "-m", traces.model(), "-o", out, *options)
    assert "temperature 1, seed 0, at most 10 tokens a response" in said
    found = json.loads(report.read_text())
    assert found["rows"] == len(traces.PROMPTS)
    assert [kind["kind"] for kind in found["kinds"]] == ["prose", "tools", "reasoning"]
    assert sum(found["roles"].values()) == found["rows"]
    assert found["sha256"] == read_trace(folder / "drawn.safetensors").sha256
    run(model_trace, "-m", traces.model(), "-o", out, *options)  # its own file may be replaced
    said = refusal(model_diff, "-ma", traces.model(), "-mb", traces.model(), "--input-ids", out)
    assert "is a trace, whose rows are padded and have roles; give it with --trace" in said
