"""Whatever bytes a dump consists of, an importer writes a trace or raises InputError, and leaves nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import dumps
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.importers import import_routing

DATA = dumps.planted((5, 4, 4), n_layers=2)
CASES = {
    "olmoe": ("olmoe", dumps.olmoe),
    "vllm npz": ("vllm", dumps.vllm_npz),
    "vllm npy": ("vllm", dumps.vllm_npy),
    "vllm responses": ("vllm", dumps.vllm_json),
    "sglang": ("sglang", dumps.sglang),
    "sglang v1": ("sglang", dumps.sglang_openai),
    "recorder": ("sglang-recorder", dumps.recorder),
    "llama.cpp": ("llama.cpp", dumps.llama_cpp),
    "policylang jsonl": ("policylang", dumps.policylang_jsonl),
    "policylang parquet": ("policylang", dumps.policylang_parquet),
    "moe-lrc": ("moe-lrc", dumps.moe_lrc),
}

# Parts of JSON, CSV and base64 that mean something, and single bytes.
PIECES = [b"null", b"-1", b"1e999", b"[", b"]", b"{}", b'""', b"99999999999999999999", b",", b"\n", b"true", b"NaN"]
EDIT = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "cut"]),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from(PIECES)),
)


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, piece in edits:
        at = int(place * len(data))
        match kind:
            case "replace":
                data = data[:at] + piece + data[at + len(piece) :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "delete":
                data = data[:at] + data[at + len(piece) :]
            case _:
                data = data[:at]
    return data


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(edits=st.lists(EDIT, min_size=1, max_size=3), which=st.integers(0, 9))
def test_any_bytes(case: str, edits: list[tuple[str, float, bytes]], which: int):
    form, write = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write(folder, DATA)
        broken = files[which % len(files)]
        broken.write_bytes(edited(broken.read_bytes(), edits))
        before = {path.relative_to(folder) for path in folder.rglob("*")}
        out = folder / "t.duckdb"
        try:
            import_routing(form, files, out, model="m", n_experts=16, top_k=4, n_layers=2)
            before.add(out.relative_to(folder))
        except InputError as error:
            assert str(error) and "Traceback" not in str(error)
        after = {path.relative_to(folder) for path in folder.rglob("*")}
        assert after - {Path(".t.duckdb.lock")} == before
