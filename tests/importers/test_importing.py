"""What other tools recorded arrives in a trace as it was planted: ids, tokens, phases, losses, labels."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import dumps
import numpy as np
import pandas as pd
import pytest
import torch
from commandline import Command

from workbench import analysis
from workbench.errors import InputError
from workbench.importers import FORMATS, import_routing
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace
from workbench.validate import validate

DATA = dumps.planted()
SIZES = {"n_experts": dumps.N_EXPERTS}
NAMED = {"model": "org/tiny"}
SHAPE = {"top_k": dumps.TOP_K, "n_layers": dumps.N_LAYERS}


def valid(path: Path) -> None:
    """No invariant is broken; ids without a vocabulary may be."""
    problems = validate(path)
    assert set(problems["check"]) <= {"no_vocabulary"}, problems


def experts(trace: Trace) -> np.ndarray:
    return np.stack([trace.experts(layer) for layer in range(trace.n_layers)], axis=1)


def same_routing(trace: Trace, expected: list[np.ndarray]) -> None:
    assert trace.sequences()["n_tokens"].tolist() == [len(ids) for ids in expected]
    assert np.array_equal(experts(trace), np.concatenate(expected))


CASES = {
    "olmoe": ("olmoe", dumps.olmoe, SIZES | NAMED),
    "vllm npz": ("vllm", dumps.vllm_npz, SIZES | NAMED),
    "vllm npy": ("vllm", dumps.vllm_npy, SIZES | NAMED),
    "vllm responses": ("vllm", dumps.vllm_json, SIZES),
    "sglang": ("sglang", dumps.sglang, SIZES | NAMED | SHAPE),
    "sglang v1": ("sglang", dumps.sglang_openai, SIZES | SHAPE),
    "policylang jsonl": ("policylang", dumps.policylang_jsonl, {}),
    "policylang parquet": ("policylang", dumps.policylang_parquet, NAMED),
}
KNOWN = {"olmoe", "vllm responses", "sglang", "policylang jsonl", "policylang parquet"}
"""Cases that bring token ids."""
PROMPT = {"vllm responses", "sglang", "sglang v1", "policylang jsonl", "policylang parquet"}
"""Cases that tell the prompt's length, which is 3."""


@pytest.mark.parametrize("case", CASES)
def test_texts_arrive_as_they_were(case: str, tmp_path: Path):
    form, write, given = CASES[case]
    trace = import_routing(form, write(tmp_path, DATA), tmp_path / "t.duckdb", **given)
    valid(trace.path)
    same_routing(trace, DATA.experts)
    (facts,) = trace.runs().to_dict("records")
    assert facts["engine"] == f"imported from {form}" and facts["status"] == "finished"
    assert facts["corpus"]["imported_from"] == form and facts["model"] in ("tiny", "org/tiny")
    assert trace.layers["n_experts"].tolist() == [16] * 3 and trace.layers["top_k"].tolist() == [4] * 3
    tokens = trace.tokens()
    ids = np.concatenate(DATA.ids)
    assert tokens["token_id"].tolist() == (ids.tolist() if case in KNOWN else [-1] * len(ids))
    prompts = [3] * 3 if case in PROMPT else list(dumps.LENGTHS)
    assert trace.sequences()["n_prompt"].tolist() == prompts
    assert ((tokens["phase"] == "generated") == (tokens["pos"] >= np.repeat(prompts, dumps.LENGTHS))).all()
    load = analysis.load(trace)
    assert load["count"].sum() == np.concatenate(DATA.experts).size


def test_olmoe_has_predictions(tmp_path: Path):
    trace = import_routing("olmoe", dumps.olmoe(tmp_path, DATA), tmp_path / "t.duckdb", **SIZES, **NAMED)
    assert trace.recorded == {"ids", "predictions"}
    assert np.array_equal(trace.predictions(), np.concatenate(DATA.predictions))


def test_a_compressed_dump(tmp_path: Path):
    (path,) = dumps.olmoe(tmp_path, DATA)
    packed = tmp_path / "dump.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    same_routing(import_routing("olmoe", [packed], tmp_path / "t.duckdb", **SIZES, **NAMED), DATA.experts)


@pytest.mark.parametrize("case", ["policylang jsonl", "policylang parquet"])
def test_policylang_brings_all_it_has(case: str, tmp_path: Path):
    form, write, given = CASES[case]
    trace = import_routing(form, write(tmp_path, DATA), tmp_path / "t.duckdb", **given)
    assert trace.recorded == {"ids", "weights", "logits"}
    assert trace.layers["name"].tolist() == ["layers.1", "layers.2", "layers.3"]
    weights = np.concatenate(DATA.weights)
    for layer in range(3):
        assert np.allclose(trace.weights(layer), weights[:, layer], atol=1 / 65535)
        best = np.argsort(-trace.logits(layer), axis=1)[:, :4]
        assert np.array_equal(best, trace.experts(layer))
    assert trace.sequences()["lang"].tolist() == ["en", "de", "en"]
    assert set(trace.sequences()["domain"]) == {"chat"}
    nll = trace.tokens()["nll"].to_numpy(float)
    pos = trace.tokens()["pos"].to_numpy()
    assert np.array_equal(nll, np.where(pos > 0, 0.5 * pos, np.nan), equal_nan=True)


def test_sglang_brings_losses_and_words(tmp_path: Path):
    given = SIZES | NAMED | SHAPE
    trace = import_routing("sglang", dumps.sglang(tmp_path, DATA), tmp_path / "t.duckdb", **given)
    assert validate(trace.path).empty
    words = trace.vocabulary().set_index("token_id")["text"].to_dict()
    assert words == {int(i): f"w{i}" for i in np.concatenate(DATA.ids)}
    nll, pos = trace.tokens()["nll"].to_numpy(float), trace.tokens()["pos"].to_numpy()
    assert np.array_equal(nll, np.where(pos > 0, 0.5, np.nan), equal_nan=True)


def test_sglang_names_the_tokens_of_one_answer_only(tmp_path: Path):
    """Ids that no answer names have an empty text: a vocabulary has all ids or none."""
    (path,) = dumps.sglang(tmp_path, DATA)
    rows = json.loads(path.read_text())
    for row in rows[1:]:
        for name in ("input_token_logprobs", "output_token_logprobs"):
            row["meta_info"][name] = [[*token[:2], None] for token in row["meta_info"][name]]
    path.write_text(json.dumps(rows))
    trace = import_routing("sglang", [path], tmp_path / "t.duckdb", **SIZES | NAMED | SHAPE)
    assert validate(trace.path).empty
    words = trace.vocabulary().set_index("token_id")["text"].to_dict()
    named = set(DATA.ids[0].tolist())
    assert words == {int(i): f"w{i}" if i in named else "" for i in np.concatenate(DATA.ids)}
    assert "" in words.values()


def test_sglang_without_numbers_of_tokens(tmp_path: Path):
    (path,) = dumps.sglang(tmp_path, DATA)
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{"meta_info": {"routed_experts": row["meta_info"]["routed_experts"]}} for row in rows]))
    given = SIZES | NAMED | SHAPE
    same_routing(import_routing("sglang", [path], tmp_path / "t.duckdb", **given), DATA.experts)


def test_recorder_counts(tmp_path: Path):
    files = dumps.recorder(tmp_path, DATA)
    trace = import_routing("sglang-recorder", files, tmp_path / "t.duckdb", top_k=4, **NAMED)
    assert validate(trace.path).empty
    assert trace.counted and trace.sequences()["n_tokens"].tolist() == list(dumps.LENGTHS)
    expected = dumps.recorded_counts(DATA).sum(axis=0)
    load = analysis.load(trace)
    found = load.dropna(subset="layer").pivot(index="layer", columns="expert", values="count").to_numpy()
    assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="no pairs of experts"):
        analysis.coactivation(trace)


def test_recorder_steps_keep_their_numbers(tmp_path: Path):
    (path,) = dumps.recorder(tmp_path, DATA)
    counts = np.insert(dumps.recorded_counts(DATA), 1, 0, axis=0)  # a step that saw no token
    torch.save({"logical_count": torch.from_numpy(counts)}, path)
    trace = import_routing("sglang-recorder", [path], tmp_path / "t.duckdb", top_k=4, **NAMED)
    assert trace.sequences()["step"].tolist() == [0, *range(2, len(counts))]
    counts[3, 1, 0] += 1
    torch.save({"logical_count": torch.from_numpy(counts)}, path)
    with pytest.raises(InputError, match="step 3, layer 1"):
        import_routing("sglang-recorder", [path], tmp_path / "u.duckdb", top_k=4, **NAMED)


def test_a_name_that_is_no_utf_8(tmp_path: Path):
    """Linux gives bytes of a name that aren't UTF-8 as lone surrogates, which a database can't hold."""
    (path,) = dumps.vllm_npz(tmp_path, DATA)
    path = path.rename(tmp_path / "d\udcff.npz")
    assert import_routing("vllm", [path], tmp_path / "t.duckdb", **SIZES | NAMED).run == "vllm.d?.npz"
    assert import_routing("vllm", [path], tmp_path / "u.duckdb", run="r\udcff", **SIZES | NAMED).run == "r?"


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_llama_cpp(tmp_path: Path, header: bool, micro: int):
    data = dumps.planted(n_layers=3)
    files = dumps.llama_cpp(tmp_path, data, header=header, micro=micro)
    trace = import_routing("llama.cpp", files, tmp_path / "t.duckdb", **SIZES, **NAMED, top_k=4)
    valid(trace.path)
    found, expected = experts(trace), data.experts[0].astype(np.uint16)
    assert np.array_equal(found[:, :2], expected[:, :2])
    n = len(expected)
    ends = {*(min(start + micro, n - 2) - 1 for start in range(0, n - 2, micro)), n - 2, n - 1}
    for token in range(n):
        last = expected[token, 2] if token in ends else [NO_EXPERT] * 4
        assert found[token, 2].tolist() == list(last)
    # without phases only micro-batches of several tokens are known to be of the prompt
    known = n - 2 if header or (n - 2) % micro != 1 else n - 3
    assert trace.sequences()["n_prompt"].tolist() == [n if not header and micro == 1 else known]


def test_llama_cpp_reads_in_pieces(tmp_path: Path, monkeypatch):
    """However the reader cuts the file, the micro-batches are the same."""
    from workbench.importers import llama_cpp

    (path,) = dumps.llama_cpp(tmp_path, DATA)
    whole = list(llama_cpp._rows(path))

    def pieces(_: Path):
        for rows in whole:
            for start in range(0, len(rows["layer"]), 5):
                yield {name: values[start : start + 5] for name, values in rows.items()}

    (one,) = llama_cpp.texts([path], None, 16)
    monkeypatch.setattr(llama_cpp, "_rows", pieces)
    (other,) = llama_cpp.texts([path], None, 16)
    assert np.array_equal(one.experts, other.experts)


def test_moe_lrc(tmp_path: Path):
    trace = import_routing("moe-lrc", dumps.moe_lrc(tmp_path, DATA), tmp_path / "t.duckdb", **SIZES)
    valid(trace.path)
    same_routing(trace, [ids[:5] for ids in DATA.experts])
    assert trace.sequences()["domain"].tolist() == ["c4", "c4", "github"]
    assert trace.tokens()["token_id"].tolist() == np.concatenate([ids[:5] for ids in DATA.ids]).tolist()
    assert trace.predictions().tolist() == np.concatenate([ids[:5] for ids in DATA.predictions]).tolist()
    assert trace.runs()["model"].tolist() == ["olmoe"]


def test_dense_layers_are_left_out(tmp_path: Path):
    with_dense = [np.insert(e, 0, 0, axis=1) for e in DATA.experts]
    paths = dumps.vllm_npy(tmp_path, dumps.Planted(with_dense, [], [], []))
    trace = import_routing("vllm", paths, tmp_path / "t.duckdb", **SIZES, **NAMED, dense_layers=[0])
    same_routing(trace, DATA.experts)
    assert trace.layers["name"].tolist() == ["layers.1", "layers.2", "layers.3"]


def test_dense_layers_are_left_out_of_weights_too(tmp_path: Path):
    """Whatever is given by layer keeps to the layers that are left."""
    from workbench.importers.text import Text
    from workbench.importers.writing import write

    ids, weights = (np.insert(of[0], 0, 0, axis=1) for of in (DATA.experts, DATA.weights))
    text = Text("planted", ids, weights=weights)
    write(tmp_path / "t.duckdb", iter([(text, {})]), text, 16, {"run": "r"}, [0], None)
    trace = Trace(tmp_path / "t.duckdb")
    for layer in range(3):
        assert np.allclose(trace.weights(layer), DATA.weights[0][:, layer], atol=1 / 65535)


def test_tokens_that_a_router_did_not_see(tmp_path: Path):
    some = DATA.experts[0].copy()
    some[2] = -1
    np.save(tmp_path / "a.npy", some)
    trace = import_routing("vllm", [tmp_path / "a.npy"], tmp_path / "t.duckdb", **SIZES, **NAMED)
    valid(trace.path)
    assert (experts(trace)[2] == NO_EXPERT).all() and np.array_equal(experts(trace)[3], some[3])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_of_sequences(tmp_path: Path, kind: str):
    table = tmp_path / f"texts.{kind}"
    frame = pd.DataFrame(
        {"lang": ["en", "", "de"], "n_prompt": [1, 2, 3], "note": ["a", "b", "c"], "text": list("xyz")}
    )
    if kind != "csv":
        frame["token_ids"] = [[*ids.tolist(), 7] for ids in DATA.ids]
    match kind:
        case "csv":
            frame.to_csv(table, index=False)
        case "jsonl":
            table.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
        case _:
            frame.to_parquet(table)
    files = dumps.vllm_npz(tmp_path, DATA)
    trace = import_routing("vllm", files, tmp_path / "t.duckdb", **SIZES, **NAMED, sequences=table)
    valid(trace.path)
    sequences = trace.sequences()
    assert sequences["lang"].fillna("").tolist() == ["en", "", "de"] and sequences["n_prompt"].tolist() == [1, 2, 3]
    assert sequences["note"].tolist() == ["a", "b", "c"] and sequences["sha256"].notna().all()
    assert "text" not in sequences
    assert (kind == "csv") or trace.tokens()["token_id"].tolist() == np.concatenate(DATA.ids).tolist()


def test_a_tokenizer_names_the_tokens(tmp_path: Path):
    files = dumps.olmoe(tmp_path, DATA)
    trace = import_routing("olmoe", files, tmp_path / "t.duckdb", **SIZES, **NAMED, tokenizer="demo")
    assert validate(trace.path).empty
    assert set(trace.vocabulary()["token_id"]) == {int(i) for i in np.concatenate(DATA.ids)}


def test_large_dumps_are_written_in_blocks(tmp_path: Path, monkeypatch):
    """Whatever the size of a block, the trace is the same."""
    from workbench.importers import writing

    files = dumps.olmoe(tmp_path, DATA)
    monkeypatch.setattr(writing, "BLOCK_TOKENS", 8)
    same_routing(import_routing("olmoe", files, tmp_path / "t.duckdb", **SIZES, **NAMED), DATA.experts)


def test_an_import_agrees_with_the_run_it_came_from(demo_trace: Path, tmp_path: Path):
    """The routing of a real run, through vLLM's arrays and a table, is that run again."""
    run = Trace(demo_trace)
    every, frame = experts(run), run.sequences().head(20)
    ends = frame["n_tokens"].cumsum()
    paths = []
    for seq, (end, n) in enumerate(zip(ends, frame["n_tokens"], strict=True)):
        paths.append(tmp_path / f"{seq:03}.npy")
        np.save(paths[-1], every[end - n : end])
    ids = run.tokens()["token_id"].to_numpy()
    columns = ["sha256", "n_prompt", "lang", "domain", "segment_id"]
    rows = frame[columns].astype(object).where(frame[columns].notna(), None).to_dict("records")
    table = tmp_path / "texts.jsonl"
    for row, end, n in zip(rows, ends, frame["n_tokens"], strict=True):
        row["token_ids"] = ids[end - n : end].tolist()
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = import_routing("vllm", paths, tmp_path / "t.duckdb", model="demo", n_experts=32, sequences=table)
    valid(made.path)
    found = analysis.agreement(made, other=run, n_resamples=10)
    assert (found.loc[found["measure"] == "exact_match", "value"] == 1).all()
    assert analysis.specialization(made, by="lang", n_resamples=10)["group"].nunique() > 1


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_knows_every_format(workbench: Command, form: str, tmp_path: Path):
    result = workbench("import", form, tmp_path / "none.jsonl", "--out", tmp_path / "t.duckdb")
    assert result.code == 2 and "no such file" in result.err


def test_the_command(workbench: Command, tmp_path: Path):
    (path,) = dumps.olmoe(tmp_path, DATA)
    out = tmp_path / "t.duckdb"
    result = workbench("import", "olmoe", path, "--out", out, "--model-name", "m", "--n-experts", 16)
    assert result.code == 0 and f"{out}: 24 tokens of 3 texts at 3 routers" in result.out
    assert workbench("validate", out).code == 0
    again = workbench("import", "olmoe", path, "--out", out, "--model-name", "m", "--n-experts", 16)
    assert again.code == 2 and "--overwrite" in again.err
    given = ["--n-experts", 16, "--overwrite", "--run", "mine"]
    assert workbench("import", "olmoe", path, "--out", out, "--model-name", "n", *given).code == 0
    assert Trace(out).run == "mine" and Trace(out).runs()["model"].tolist() == ["n"]
    assert sorted(one.name for one in tmp_path.iterdir()) == [".t.duckdb.lock", path.name, out.name]
