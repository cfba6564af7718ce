"""What the tables of a trace and their columns mean: the words beside the SQL editor and in the documentation."""

import os

import pandas as pd

from workbench import connection, schema

TABLES = {
    "runs": "One pass of one model over corpora.",
    "layers": "One MoE router of a run.",
    "sequences": "One text of a run, or one piece of a text that was too long.",
    "tokens": "One token position.",
    "vocabulary": "One token id that occurs in a run, as text.",
    "routing": "One token at one router: whom it chose, as lists. The largest table: name the layer or the sequence.",
    "profiles": "Mean router probabilities over the tokens of one sequence at one router, where they were recorded.",
    "loads": "How often the tokens of one text (or of a group of texts) chose each expert at one router, in a run that "
    "counts (`--counts-by`).",
    "pairs": "How many tokens of one block of texts chose an expert and each expert of the same or the next router, in "
    "a run that counts.",
    "selections": "One selected expert of one token at one router: `routing` with its lists unrolled (a view).",
}
"""Table -> what one row is."""

_RUN = "name of the run"
_SEQ = "number of the sequence in its run, from 0"
_POS = "position of the token in its sequence, from 0"
_LAYER = "number of the router, from 0 in the order of the model"

COLUMNS = {
    "runs": {
        "run": "name of the run, unique in the file",
        "model": "Hub id, folder or name of the checkpoint",
        "revision": "commit of the Hub that the weights are from",
        "family": "architecture, as transformers calls it",
        "engine": "what ran the model, with its version",
        "dtype": "number format of the weights",
        "recipe": "interventions in force, as JSON; null for the plain model",
        "recorded": "what was written down: ids, weights, entropy, …",
        "corpus": "names, fingerprint, limits and settings of the texts, as JSON",
        "versions": "software that made the run, as JSON",
        "started": "when, in UTC",
        "finished": "when, in UTC; null until it is",
        "status": "running, finished, interrupted or failed",
    },
    "layers": {
        "run": _RUN,
        "layer": _LAYER,
        "name": "the router's module in the checkpoint",
        "n_experts": "routed experts to choose from",
        "top_k": "experts that a token chooses, at most",
        "n_shared": "shared experts, which every token uses",
        "gating": "how scores become weights",
        "stack": "encoder or decoder",
    },
    "sequences": {
        "run": _RUN,
        "seq": _SEQ,
        "sha256": "fingerprint of the text",
        "n_prompt": "tokens that were given",
        "n_tokens": "tokens in all, with those that were generated",
        "lang": "language of the text",
        "domain": "kind of text",
        "source": "where the text is from",
        "segment_id": "the same for translations of one text",
        "metadata": "everything else the corpus says, as JSON: `metadata->>'key'`",
    },
    "tokens": {
        "run": _RUN,
        "seq": _SEQ,
        "pos": _POS,
        "token_id": "id in the vocabulary; -1 where unknown",
        "phase": "template (of a chat), prompt or generated",
        "nll": "−ln p(token | those before it), in nats; null for the first",
        "predicted": "id that the model itself would put next, if recorded; -1 where unknown",
    },
    "vocabulary": {"run": _RUN, "token_id": "id of the token", "text": "the token as text, with its space"},
    "routing": {
        "run": _RUN,
        "seq": _SEQ,
        "pos": _POS,
        "layer": _LAYER,
        "scale": "what `weights / 65535` are multiplied with",
        "experts": "ids of the chosen experts, in the router's order; empty where the token was dropped",
        "weights": "gate weights beside `experts`, as whole numbers: `weights / 65535 * scale`",
        "entropy": "of the router's whole distribution, in nats",
        "margin": "k-th minus (k+1)-th score: how close the choice was",
        "logits": "of every expert before gating, if recorded",
        "norms": "L2 norm of each chosen expert's output, if recorded",
        "shift": "1 − cos of the residual stream before and after the experts, 0 to 2, if recorded",
        "lookahead": "experts the next router would choose given this one's input, if recorded",
    },
    "profiles": {"run": _RUN, "seq": _SEQ, "layer": _LAYER, "probs": "mean probability of each expert; they sum to 1"},
    "loads": {
        "run": _RUN,
        "seq": "number of the text; of a group of texts: of its first",
        "phase": "of the tokens: template, prompt or generated; null where groups of texts are counted",
        "block": "number of the block of texts, as in `pairs`",
        "layer": _LAYER,
        "counts": "tokens that chose each expert, by its id from 0",
        "tokens": "tokens that chose 0, 1, 2, … experts",
    },
    "pairs": {
        "run": _RUN,
        "block": "number of the block: texts are put into blocks at random, to say how sure the numbers are",
        "layer": _LAYER,
        "other": "the same router, or the next",
        "expert": "id of an expert of `layer`; null is any expert",
        "tokens": "tokens that chose the expert, and any expert of `other`",
        "counts": "those of them that chose each expert of `other`, by its id from 0",
    },
    "selections": {
        "run": _RUN,
        "seq": _SEQ,
        "pos": _POS,
        "layer": _LAYER,
        "rank": "place in the router's order, from 0",
        "expert": "id of the chosen expert",
        "weight": "gate weight",
    },
}
"""Table -> column -> what it holds."""


def columns(path: str | os.PathLike) -> pd.DataFrame:
    """table, column, type, meaning: what can be queried in the trace at `path`, in the order of the file's tables.

    InputError if the file is not a readable trace.
    """
    with connection.reading(path) as con:
        found = con.execute(
            "SELECT table_name AS table, column_name AS column, data_type AS type FROM duckdb_columns() "
            "WHERE NOT internal ORDER BY column_index"
        ).df()
    order = {name: number for number, name in enumerate(schema.TABLES)}
    found = found[found["table"].isin(schema.TABLES)]
    found = found.sort_values("table", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    enum = found["type"].str.startswith("ENUM")
    found.loc[enum, "type"] = "ENUM"
    meanings = [COLUMNS[table].get(column, "") for table, column in found[["table", "column"]].to_numpy().tolist()]
    return found.assign(meaning=meanings)
