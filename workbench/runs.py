"""The runs of a trace in words: as a table, and as the sentence that a paper cites one with."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import pandas as pd

from workbench.errors import InputError
from workbench.recipe import described, from_json

PLAIN = "–"
"""In place of a recipe where the model ran as it is."""


def table(runs: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a run: run, status, model, recipe (in words), dtype, corpora, layers, experts, top-k, texts, tokens,
    recorded, started, finished (UTC).

    runs  as `workbench.tracefile.info` gives them
    """
    rows = [
        {
            "run": one["run"],
            "status": one["status"],
            "model": one["model"],
            "recipe": in_words(one["recipe"]),
            "dtype": one["dtype"],
            "corpora": ", ".join(strings(corpus_of(one).get("names"))),
            "layers": one["layers"],
            "experts": "/".join(map(str, one["experts"] or [])),
            "top-k": "/".join(map(str, one["top_k"] or [])),
            "texts": one["sequences"],
            "tokens": one["tokens"],
            "recorded": ", ".join(one["recorded"] or []),
            "started": one["started"],
            "finished": one["finished"],
        }
        for one in runs
    ]
    return pd.DataFrame(rows)


def in_words(recipe: Any) -> str:
    """The interventions of a run's column `recipe`, one after the other; PLAIN where there are none."""
    if not recipe:
        return PLAIN
    try:
        return "; ".join(map(described, from_json(recipe).interventions)) or PLAIN
    except InputError:  # of a later version
        return "a recipe that this version doesn't know"


def citation(file: str, facts: Mapping[str, Any]) -> str:
    """A sentence that names a run: model, texts with their fingerprint, software and date.

    file   name of the trace
    facts  of one run, as `workbench.tracefile.info` gives them
    """
    corpus, versions = corpus_of(facts), versions_of(facts)
    revision = f" at revision {facts['revision']}" if facts["revision"] else ""
    model = f"{facts['model']}{revision}" if facts["model"] else "a model that the trace doesn't name"
    precision = f" in {facts['dtype']}" if facts["dtype"] else ""
    names = ", ".join(strings(corpus.get("names"))) or "texts that the trace doesn't name"
    fingerprint = f" (fingerprint {corpus['fingerprint']})" if corpus.get("fingerprint") else ""
    edited = f" with {in_words(facts['recipe'])}" if facts["recipe"] else ""
    software = ", ".join(f"{name} {number}" for name, number in versions.items())
    when = f" on {facts['started']:%Y-%m-%d}" if isinstance(facts["started"], datetime) else ""
    return (
        f"Routing of {model}{precision}{edited} over {names}{fingerprint}: {facts['tokens']:,} tokens in "
        f"{facts['sequences']:,} texts. Run {facts['run']} of {file}, recorded{when}"
        f"{f' with {software}' if software else ''}."
    )


def corpus_of(facts: Mapping[Any, Any]) -> dict[str, Any]:
    """What a run says of its texts; nothing where the column holds other JSON."""
    return facts["corpus"] if isinstance(facts["corpus"], dict) else {}


def versions_of(facts: Mapping[Any, Any]) -> dict[str, Any]:
    """Software -> version; nothing where the column holds other JSON."""
    return facts["versions"] if isinstance(facts["versions"], dict) else {}


def strings(value: Any) -> list[str]:
    """The entries of a list from JSON; none where it is no list."""
    return list(map(str, value)) if isinstance(value, list) else []
