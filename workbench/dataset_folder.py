"""A run as a data set that Hugging Face's library `datasets` loads: a folder of Parquet files with a card.

    FOLDER/README.md            the card: what the columns are, which model, which routers
    FOLDER/data/train-*.parquet a row a text, in the order of `seq`
    FOLDER/layers/*.parquet     a row a router: the configuration `layers`

>>> datasets.load_dataset("FOLDER")["train"]              # doctest: +SKIP
>>> datasets.load_dataset("FOLDER", "layers")["train"]    # doctest: +SKIP
"""

import json
import os

import duckdb

from workbench import connection, schema
from workbench.errors import InputError, RunError
from workbench.output import new_folder
from workbench.schema import quoted
from workbench.tracefile import Trace

PART_TOKEN_LAYERS = 1 << 20
"""Tokens times routers of a file, about: so many are held in memory."""

COLUMNS = {
    "seq": "number of the text in the run",
    "sha256": "digest of the text, where it was known",
    "n_prompt": "tokens of the prompt; those after it were generated",
    "n_tokens": "n, the number of tokens",
    "lang": "language", "domain": "domain", "source": "source", "segment_id": "texts that belong together",
    "metadata": "further columns of the corpus, as JSON text",
    "token_ids": "(n) ids of the tokens, -1 where unknown",
    "tokens": "(n) their texts, null where unknown",
    "nll": "(n) -ln p(token | those before it) in nats, null where unknown",
    "experts": "(routers, n, k) ids of the chosen experts in the router's order; fewer where fewer were chosen",
    "weights": "(routers, n, k) their gate weights",
}  # fmt: skip
"""The columns of a row a text."""


def export_dataset(
    path: str | os.PathLike, out: str | os.PathLike, *, run: str | None = None, overwrite: bool = False
) -> int:
    """Write a run of the trace at `path` as the folder `out`; returns the number of texts.

    A file at a time is held in memory. InputError if the run counts, has no text, or `out` exists without `overwrite`;
    RunError if writing fails. Nothing is left under the name `out` unless all of it was written.
    """
    trace = Trace(path, run)
    if trace.counted:
        raise trace.only_counts("experts of single tokens")
    if not trace.n_sequences:
        raise InputError(f"run {trace.run!r} has no text.")
    ranges = _ranges(trace)
    contents = ("README.md", "data", "layers")
    with (
        new_folder(out, overwrite, marker="layers/train.parquet", contents=contents) as folder,
        connection.copying(path, folder) as con,
    ):
        try:
            (folder / "data").mkdir()
            (folder / "layers").mkdir()
            for number, (first, last) in enumerate(ranges):
                part = folder / "data" / f"train-{number:05}-of-{len(ranges):05}.parquet"
                con.execute(f"COPY ({_texts(trace, first, last)}) TO {quoted(part)} (FORMAT parquet, COMPRESSION zstd)")
            layers = f"SELECT * EXCLUDE (run) FROM layers WHERE run = {quoted(trace.run)} ORDER BY layer"
            con.execute(f"COPY ({layers}) TO {quoted(folder / 'layers' / 'train.parquet')} (FORMAT parquet)")
        except duckdb.Error as error:
            raise RunError(
                f"{out} could not be written: {schema.first_line(error)}. Nothing was left behind."
            ) from error
        (folder / "README.md").write_text(_card(trace), encoding="utf-8")
    return trace.n_sequences


def _ranges(trace: Trace) -> list[tuple[int, int]]:
    """First and last `seq` of each file."""
    lengths = trace.sequences()["n_tokens"].to_numpy() * trace.n_layers
    file = (lengths.cumsum() - lengths) // PART_TOKEN_LAYERS
    starts = [place for place in range(len(file)) if place == 0 or file[place] != file[place - 1]]
    ends = [*starts[1:], len(file)]
    seqs = trace.sequence_ids
    return [(int(seqs[start]), int(seqs[end - 1])) for start, end in zip(starts, ends, strict=True)]


def _texts(trace: Trace, first: int, last: int) -> str:
    """The query for the rows of one file."""
    here = f"run = {quoted(trace.run)} AND seq BETWEEN {first} AND {last}"
    weighted = "weights" in trace.recorded
    weights = "list(list_transform(weights, lambda w: w::FLOAT / 65535::FLOAT * scale) ORDER BY pos) AS weights,"
    return f"""
        WITH token AS (
            SELECT seq, list(token_id ORDER BY pos) AS token_ids, list(text ORDER BY pos) AS tokens,
                list(nll ORDER BY pos) AS nll
            FROM (SELECT * FROM tokens WHERE {here})
            LEFT JOIN (SELECT token_id, any_value(text) AS text FROM vocabulary WHERE run = {quoted(trace.run)}
                       GROUP BY token_id) USING (token_id)
            GROUP BY seq),
        router AS (
            SELECT seq, layer, {weights if weighted else ""} list(experts ORDER BY pos) AS experts
            FROM routing WHERE {here} GROUP BY seq, layer),
        routed AS (
            SELECT seq, {"list(weights ORDER BY layer) AS weights," if weighted else ""}
                list(experts ORDER BY layer) AS experts
            FROM router GROUP BY seq)
        SELECT {", ".join(name for name in COLUMNS if weighted or name != "weights")}
        FROM (SELECT * REPLACE (metadata::VARCHAR AS metadata) FROM sequences WHERE {here})
        LEFT JOIN token USING (seq) LEFT JOIN routed USING (seq)
        ORDER BY seq"""


def _card(trace: Trace) -> str:
    (facts,) = (row for row in trace.runs().to_dict("records") if row["run"] == trace.run)
    about = {name: facts[name] for name in ("run", "model", "revision", "family", "engine", "dtype", "recorded")}
    about |= {"texts": trace.n_sequences, "tokens": trace.n_tokens, "routers": trace.n_layers}
    # Names come from elsewhere: a backtick must not end the block that they stand in.
    told = json.dumps(about, indent=2, default=list, ensure_ascii=True).replace("`", "\\u0060")
    weighted = "weights" in trace.recorded
    rows = [f"| `{name}` | {what} |" for name, what in COLUMNS.items() if weighted or name != "weights"]
    return "\n".join(
        [
            "---",
            "configs:",
            "- config_name: default",
            "  data_files: data/*.parquet",
            "- config_name: layers",
            "  data_files: layers/*.parquet",
            "tags:",
            "- mixture-of-experts",
            "- routing",
            "---",
            "# Expert routing",
            "",
            "Which experts every token of a corpus used, one row a text. Written by `workbench export --format hf`.",
            "",
            "```json",
            told,
            "```",
            "",
            "| column | holds |",
            "|---|---|",
            *rows,
            "",
            "The configuration `layers` has a row a router: name, n_experts, top_k, n_shared, gating, stack.",
            "",
        ]
    )
