"""Dumps that can't be what a router chose are refused with what is wrong, and nothing is left."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dumps
import numpy as np
import pytest
import torch
from commandline import Command, refused

from workbench.errors import InputError
from workbench.importers import import_routing

DATA = dumps.planted((6, 4))
NAMED = {"model": "org/tiny", "n_experts": 16}
SHAPE = {"top_k": 4, "n_layers": 3}


def fails(folder: Path, form: str, files: list[Path], *parts: str, **given: Any) -> None:
    """InputError with these parts, and the folder holds what it held."""
    before = {path.name for path in folder.iterdir()} - {".t.duckdb.lock"}
    with pytest.raises(InputError) as raised:
        import_routing(form, files, folder / "t.duckdb", **(NAMED | given))
    for part in parts:
        assert part in str(raised.value), raised.value
    assert {path.name for path in folder.iterdir()} - {".t.duckdb.lock"} == before


def saved(folder: Path, array: np.ndarray) -> list[Path]:
    np.save(folder / "a.npy", array)
    return [folder / "a.npy"]


def changed(change: Callable[[np.ndarray], None], kind: Any = np.int64) -> np.ndarray:
    array = DATA.experts[0].astype(kind)
    change(array)
    return array


def repeat(array: np.ndarray) -> None:
    array[2, 1, 3] = array[2, 1, 0]


def beyond(array: np.ndarray) -> None:
    array[5, 2, 0] = 16


def negative(array: np.ndarray) -> None:
    array[1, 0, 0] = -56


def nothing(array: np.ndarray) -> None:
    array[:, 1] = 0


@pytest.mark.parametrize(
    ("change", "n_experts", "parts"),
    [
        (repeat, 16, ["token 2, layer 1", "chosen at most once"]),
        (repeat, 512, ["token 2, layer 1", "int8 or uint8", "differ by 128 or 256"]),
        (beyond, 16, ["token 5, layer 2", "the id 16", "16 experts", "--n-experts"]),
        (negative, 16, ["token 1, layer 0", "the id -56"]),
        (negative, 256, ["the id -56", "saved as int8", "128 becomes -128"]),
        (nothing, 16, ["layer 1 is all zeros", "--dense-layers 1"]),
    ],
)
def test_ids_that_no_router_chose(tmp_path: Path, change, n_experts: int, parts: list[str]):
    fails(tmp_path, "vllm", saved(tmp_path, changed(change)), "a.npy", *parts, n_experts=n_experts)


@pytest.mark.parametrize(("kind", "n_experts"), [(np.int8, 129), (np.uint8, 257)])
def test_types_that_are_too_small(tmp_path: Path, kind: Any, n_experts: int):
    array = changed(lambda _: None, kind)
    fails(tmp_path, "vllm", saved(tmp_path, array), "saved as", "wider type", n_experts=n_experts)


def test_the_largest_id_that_fits_is_taken(tmp_path: Path):
    array = changed(lambda _: None, np.uint8)
    array[0, 0] = [255, 0, 1, 2]
    trace = import_routing("vllm", saved(tmp_path, array), tmp_path / "t.duckdb", model="m", n_experts=256)
    assert trace.experts(0)[0].tolist() == [255, 0, 1, 2]


def test_top_1_of_nothing_but_zeros(tmp_path: Path):
    array = np.zeros((20, 2, 1), np.uint8)
    array[:, 1, 0] = np.arange(20) % 16
    fails(tmp_path, "vllm", saved(tmp_path, array), "layer 0 is 0 for all 20 tokens", "--dense-layers 0")


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.zeros((3, 2)), "expected whole numbers in 3 dimensions"),
        (np.zeros((3, 2, 2)), "float64"),
        (np.zeros((0, 2, 2), int), "no token has routing"),
        (np.zeros((2, 2, 0), int), "0 experts a token"),
        (np.zeros((2, 0, 2), int), "no layer"),
    ],
)
def test_arrays_of_another_shape(tmp_path: Path, array: np.ndarray, part: str):
    fails(tmp_path, "vllm", saved(tmp_path, array), part)


def test_no_pickle_is_loaded(tmp_path: Path):
    class Bad:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    np.save(tmp_path / "a.npy", np.array([Bad()], object), allow_pickle=True)
    fails(tmp_path, "vllm", [tmp_path / "a.npy"], "not a whole NumPy array")
    np.savez(tmp_path / "a.npz", np.array([Bad()], object))
    fails(tmp_path, "vllm", [tmp_path / "a.npz"], "unpickled")
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"logical_count": Bad()}))
    fails(tmp_path, "sglang-recorder", [tmp_path / "a.pt"], "not a whole .pt file", top_k=4)
    torch.save({"logical_count": Bad()}, tmp_path / "b.pt")
    fails(tmp_path, "sglang-recorder", [tmp_path / "b.pt"], "not a whole .pt file", top_k=4)
    assert not (tmp_path / "touched").exists()


def test_texts_of_different_models(tmp_path: Path):
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(paths[0], DATA.experts[0])
    np.save(paths[1], DATA.experts[1][:, :2])
    fails(tmp_path, "vllm", paths, "b.npy: 2 layers of top-4; the first text has 3")
    fails(tmp_path, "vllm", paths[:1], "--n-layers is 5; the file has 3", n_layers=5)
    fails(tmp_path, "vllm", paths[:1], "--top-k is 8; the file has 4", top_k=8)


def test_options_that_are_missing_are_named(tmp_path: Path):
    (path,) = dumps.olmoe(tmp_path, DATA)
    fails(tmp_path, "olmoe", [path], "--model-name", model=None)
    fails(tmp_path, "olmoe", [path], "--n-experts", n_experts=None)
    files = dumps.sglang(tmp_path, DATA)
    fails(tmp_path, "sglang", files, "--top-k")
    fails(tmp_path, "sglang", files, "--n-layers", top_k=4)
    fails(tmp_path, "sglang-recorder", dumps.recorder(tmp_path, DATA), "--top-k")
    files = dumps.llama_cpp(tmp_path, DATA, header=False)
    fails(tmp_path, "llama.cpp", files, "--top-k")
    fails(tmp_path, "llama.cpp", files, "--n-experts", n_experts=None, top_k=4)


def test_truncated_base64(tmp_path: Path):
    for form, write, shape in (("vllm", dumps.vllm_json, {}), ("sglang", dumps.sglang_openai, SHAPE)):
        (path,) = write(tmp_path, DATA)
        row = json.loads(path.read_text().splitlines()[0])
        choice = row["choices"][0]
        holder = choice["sgl_ext"] if form == "sglang" else choice
        whole = holder["routed_experts"]
        for cut, part in ((1, "not whole base64"), (8, "")):
            holder["routed_experts"] = whole[:-cut]
            path.write_text(json.dumps(row))
            fails(tmp_path, form, [path], path.name, part, **shape)
        holder["routed_experts"] = None
        path.write_text(json.dumps(row))
        fails(tmp_path, form, [path], "no routed_experts", **shape)


def test_tokens_without_routing(tmp_path: Path):
    """A prompt that was cut, or an aborted request: fewer rows than tokens."""
    row = dumps.vllm_response(DATA.experts[0], DATA.ids[0], 3)
    row["choices"][0]["routed_experts"] = dumps.as_npy(DATA.experts[0][2:].astype(np.uint8))
    (tmp_path / "a.json").write_text(json.dumps(row))
    fails(tmp_path, "vllm", [tmp_path / "a.json"], "4 tokens with routing", "routed_experts_prompt_start")
    row = dumps.sglang_response(DATA.experts[0][2:], DATA.ids[0], 3)
    (tmp_path / "a.json").write_text(json.dumps(row))
    fails(tmp_path, "sglang", [tmp_path / "a.json"], "routed_experts_start_len", **SHAPE)
    fails(tmp_path, "sglang", [tmp_path / "a.json"], "whole tokens", top_k=4, n_layers=5)
    row = {"input_ids": [1, 2, 3], "exp_ids": DATA.experts[1].transpose(0, 2, 1).tolist()}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    fails(tmp_path, "olmoe", [tmp_path / "a.jsonl"], "a.jsonl:1", "3 token ids for 4 tokens")


BAD_LINES = [
    [],
    {},
    {"exp_ids": 3, "input_ids": []},
    {"exp_ids": [[[1], [1, 2]]], "input_ids": [1]},
    {"exp_ids": [[[True]]], "input_ids": [1]},
    {"exp_ids": [[[1.5]]], "input_ids": [1]},
    {"exp_ids": [[["a"]]], "input_ids": [1]},
    {"exp_ids": [[[2**70]]], "input_ids": [1]},
    {"exp_ids": [[[1]]], "input_ids": [2**40]},
    {"exp_ids": [[[1]]], "input_ids": None},
]


@pytest.mark.parametrize("row", BAD_LINES)
def test_lines_that_are_no_dump(tmp_path: Path, row: Any):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    fails(tmp_path, "olmoe", [tmp_path / "a.jsonl"], "a.jsonl:1")


def test_a_bad_line_after_good_ones(tmp_path: Path):
    (path,) = dumps.olmoe(tmp_path, DATA)
    path.write_text(path.read_text() + "{oops\n")
    fails(tmp_path, "olmoe", [path], "c4_results.jsonl:3", "not JSON")
    fails(tmp_path, "olmoe", [path], "not JSON")
    with pytest.raises(InputError) as raised:
        import_routing("olmoe", [path], tmp_path / "t.duckdb", **NAMED)
    assert "--bad-rows" not in str(raised.value)


def test_a_file_of_the_user_is_kept(tmp_path: Path):
    (path,) = dumps.olmoe(tmp_path, DATA)
    out = tmp_path / "t.duckdb"
    import_routing("olmoe", [path], out, **NAMED)
    before = out.read_bytes()
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(InputError, match="not JSON"):
        import_routing("olmoe", [path], out, **NAMED, overwrite=True)
    with pytest.raises(InputError, match="exists"):
        import_routing("olmoe", [path], out, **NAMED)
    assert out.read_bytes() == before


def test_llama_cpp_with_the_wrong_stride(tmp_path: Path):
    data = dumps.planted((30,), n_layers=8)
    files = dumps.llama_cpp(tmp_path, data, header=False, micro=14, stride=False)
    fails(tmp_path, "llama.cpp", files, "wrong stride", "-ub 1", top_k=4)
    files = dumps.llama_cpp(tmp_path, data, header=False, micro=14)
    import_routing("llama.cpp", files, tmp_path / "t.duckdb", **NAMED, top_k=4)


def test_llama_cpp_cut_short(tmp_path: Path):
    (path,) = dumps.llama_cpp(tmp_path, DATA)
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[:-1]) + "\n")
    fails(tmp_path, "llama.cpp", [path], "cut short")
    path.write_text("\n".join([*rows[:-1], rows[-1][: rows[-1].rindex(",")]]) + "\n")
    fails(tmp_path, "llama.cpp", [path], "not a CSV file")
    path.write_text("a,b\n1,2\n")
    fails(tmp_path, "llama.cpp", [path], "the columns are 'a,b'")
    path.write_text("")
    fails(tmp_path, "llama.cpp", [path], "moe_trace.csv", top_k=4)
    files = dumps.llama_cpp(tmp_path, DATA, header=False)
    fails(tmp_path, "llama.cpp", files, "Check --top-k", top_k=3)


def test_llama_cpp_of_no_rank_and_of_many_experts(tmp_path: Path):
    (path,) = dumps.llama_cpp(tmp_path, DATA)
    path.write_text("phase,token,layer,rank,expert\nprefill,0,0,-1,3\n")
    fails(tmp_path, "llama.cpp", [path], "largest rank is -1")
    # chances so small that a float holds their logarithm only
    experts = np.stack([np.random.default_rng(token).permutation(2048)[:512] for token in range(4)])
    rows = [f"{layer},{expert}" for layer in range(2) for token in experts for expert in token]
    path.write_text("\n".join(["layer,expert", *rows]) + "\n")
    given = NAMED | {"n_experts": 2048, "top_k": 512}
    assert import_routing("llama.cpp", [path], tmp_path / "t.duckdb", **given).n_tokens == 4


def test_policylang_with_another_header(tmp_path: Path):
    (path,) = dumps.policylang_jsonl(tmp_path, DATA)
    first, *rows = path.read_text().splitlines()
    for change, part in (({"top_k": 2}, "top_k 2, the rows have 4"), ({"num_layers": 2}, "num_layers 2")):
        path.write_text("\n".join([json.dumps(json.loads(first) | change), *rows]) + "\n")
        fails(tmp_path, "policylang", [path], part)


def test_vllm_of_several_prompts(tmp_path: Path):
    """`usage` tells the lengths of prompts only where there is one."""
    responses = [dumps.vllm_response(e, ids, n) for e, ids, n in zip(DATA.experts, DATA.ids, (3, 2), strict=True)]
    choices = [response["choices"][0] for response in responses]
    for choice in choices:
        del choice["prompt_token_ids"], choice["token_ids"]
    usage = {"prompt_tokens": 3, "completion_tokens": sum(r["usage"]["completion_tokens"] for r in responses)}
    (tmp_path / "two.json").write_text(json.dumps(responses[0] | {"choices": choices, "usage": usage}))
    fails(tmp_path, "vllm", [tmp_path / "two.json"], "2 choices of several prompts", "return_token_ids")


def test_policylang_cut_short(tmp_path: Path):
    (path,) = dumps.policylang_jsonl(tmp_path, DATA)
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[:-1]) + "\n")
    fails(tmp_path, "policylang", [path], "prompt 1", "cut short")
    path.write_text("\n".join([rows[0], *rows[3:], *rows[1:3]]) + "\n")
    fails(tmp_path, "policylang", [path], "cut short")
    path.write_text("\n".join(rows[1:]) + "\n")
    fails(tmp_path, "policylang", [path], "trace.jsonl:1", "num_experts")


def test_moe_lrc_of_logits_and_ranks(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "olmoe_00.safetensors"
    scores = np.random.default_rng(0).random((2, 5, 16))
    save_file({"c4": scores.astype(np.float32)}, path)
    fails(tmp_path, "moe-lrc", [path], "router logits", "40_topk.py")
    save_file({"c4": scores.argsort(axis=2).argsort(axis=2).astype(np.int8)}, path)
    fails(tmp_path, "moe-lrc", [path], "ranks", "40_topk.py")
    files = dumps.moe_lrc(tmp_path, dumps.planted())
    fails(tmp_path, "moe-lrc", files, "saved as int8", n_experts=160)
    fails(tmp_path, "moe-lrc", files[-1:], "NAME_00.safetensors")
    held = load_file(files[1])
    save_file(held | {"more": held["c4"]}, files[1])
    fails(tmp_path, "moe-lrc", files, "no data set 'more'")


@pytest.mark.parametrize(
    ("counts", "part"),
    [
        (np.ones((2, 3)), "no logical_count"),
        (np.full((2, 3, 16), -1), "below 0"),
        (np.zeros((2, 3, 16), int), "nothing was recorded"),
        (np.eye(16, dtype=int)[None, :3] * 8, "chosen 8 times by 2 tokens"),
        (np.ones((1, 3, 16), int) + np.eye(16, dtype=int)[None, 2:5] * [[[0], [0], [4]]], "not 4 for each token"),
        (np.ones((1, 3, 16), int) * [[[1], [0], [1]]], "--dense-layers 1"),
    ],
)
def test_counts_that_no_router_made(tmp_path: Path, counts: np.ndarray, part: str):
    torch.save({"logical_count": torch.from_numpy(counts)}, tmp_path / "a.pt")
    fails(tmp_path, "sglang-recorder", [tmp_path / "a.pt"], "a.pt", part, top_k=4)


def test_tables_that_do_not_fit(tmp_path: Path):
    files = dumps.vllm_npz(tmp_path, DATA)
    table = tmp_path / "texts.csv"
    for rows, part in (("en\n", "1 rows"), ("en\nde\nfr\n", "only 2 texts")):
        table.write_text("lang\n" + rows)
        fails(tmp_path, "vllm", files, part, sequences=table)
    table.write_text("n_prompt\n9\n1\n")
    fails(tmp_path, "vllm", files, "n_prompt is 9", sequences=table)
    table.write_text("n_prompt\nmany\n1\n")
    fails(tmp_path, "vllm", files, "n_prompt is 'many'", sequences=table)
    fails(tmp_path, "vllm", files, "no such file", sequences=tmp_path / "none.csv")


def test_a_dense_layer_with_routing(tmp_path: Path):
    fails(tmp_path, "vllm", saved(tmp_path, DATA.experts[0]), "take it out of --dense-layers", dense_layers=[1])
    fails(tmp_path, "vllm", saved(tmp_path, DATA.experts[0]), "--dense-layers 7", dense_layers=[7])


def test_the_command_refuses(workbench: Command, tmp_path: Path):
    (path,) = dumps.olmoe(tmp_path, DATA)
    out = ["--out", tmp_path / "t.duckdb"]
    refused(workbench("import", "olmoe", path, *out), "--model-name")
    refused(workbench("import", "olmoe", path, *out, "--model-name", "m", "--n-experts", 0), "--n-experts is 0")
    refused(workbench("import", "olmoe", path, *out, "--dense-layers", "a"), "'a' is not the number of a layer")
    refused(workbench("import", "vllm", path, *out, "--model-name", "m", "--n-experts", 16), "no `choices`")
    refused(workbench("import", "olmoe", path, "--out", tmp_path / "none" / "t.duckdb"), "is not a folder")
    assert not (tmp_path / "t.duckdb").exists()
