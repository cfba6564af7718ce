"""One self-contained HTML file about a run: what it is, what stands out, the figures, and how each number is defined.

It opens offline: Plotly is inlined once, and a content security policy forbids every request and every script but the
two that are hashed here. Text from data is escaped, on the page by Jinja and in figures by `figures.plain`.
"""

import base64
import hashlib
import html
import json
import os
import re
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import workbench
from workbench import analysis, figures
from workbench.errors import InputError
from workbench.export import harmless, quoting
from workbench.output import new_file
from workbench.questions import Question, sections
from workbench.runs import corpus_of, strings, versions_of
from workbench.tracefile import Trace
from workbench.validate import validate

MOST_ROWS = 40
"""Rows of a table on the page; the whole table can be downloaded."""
MOST_EMBEDDED = 10_000
"""Rows of a table that can be downloaded from the page; larger ones would swell it, and are a command away."""

DRAW = """
const {figures, config} = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures)) Plotly.newPlot(id, figure.data, figure.layout, config);
const each = (layout) => { for (const id of Object.keys(figures)) Plotly.relayout(id, layout); };
addEventListener("beforeprint", () => each({width: 680, autosize: false}));
addEventListener("afterprint", () => each({width: null, autosize: true}));
"""


def report(
    trace: Trace | str | os.PathLike, out: str | os.PathLike, *, run: str | None = None, overwrite: bool = False
) -> Path:
    """Write the report of a run to the HTML file `out`; returns its path.

    An analysis that the trace can't answer (no languages, no parallel texts) is named in the report with the reason.
    InputError if `out` exists and `overwrite` isn't given.
    """
    trace = trace if isinstance(trace, Trace) else Trace(trace, run)
    out = Path(out)
    with new_file(out, overwrite) as partial:
        partial.write_text(page(trace, out), encoding="utf-8")
    return out


def page(trace: Trace, out: Path) -> str:
    """The whole HTML text."""
    sequences = trace.sequences()
    drawn: dict[str, Any] = {}
    parts, headlines = [], []
    for section in sections(trace, sequences):
        questions = section.pop("questions")
        answers = [answer(trace, question, drawn) for question in questions]
        headlines += [
            (found["findings"][0], section["id"])
            for question, found in zip(questions, answers, strict=True)
            if question.headline and found.get("findings")
        ]
        parts.append({**section, "answers": answers})
    found = validate(trace.path, trace.run)
    facts = next(row for row in trace.runs().to_dict("records") if row["run"] == trace.run)
    plotly = get_plotlyjs()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    return environment.get_template("report.html.j2").render(
        policy=policy(plotly, DRAW),
        title=model_name(facts, trace),
        subtitle=subtitle(trace),
        facts=headline_facts(trace, sequences),
        headlines=headlines,
        problems=found["message"].tolist(),
        broken=bool((found["severity"] == "error").any()),
        sections=parts,
        run=run_facts(trace, facts, sequences),
        layers={"columns": list(trace.layers.columns), "rows": trace.layers.astype(object).values.tolist()},
        commands=commands(trace, facts, out),
        calls=Markup(", ").join(Markup("<code>wb.analysis.{}(trace)</code>").format(name) for name in analysis.NAMES),
        version=workbench.__version__,
        figures=Markup(in_script(json.dumps({"figures": drawn, "config": figures.CONFIG}, ensure_ascii=False))),
        plotly=Markup(plotly),
        draw=Markup(DRAW),
    )


def answer(trace: Trace, question: Question, drawn: dict[str, Any]) -> dict[str, Any]:
    """Ask one question; its figure goes to `drawn`. What the template needs."""
    module = analysis.file(question.name)
    ask, draw = analysis.find(question.name)
    heading = question.heading
    try:
        frame = ask(trace, **question.arguments)
    except InputError as error:
        return {"heading": heading, "missing": str(error)}
    figure = draw(frame)
    name = "-".join([question.name, *([question.arguments["by"]] if "by" in question.arguments else [])])
    csv = ""
    if len(frame) <= MOST_EMBEDDED:
        text = harmless(frame).to_csv(index=False, float_format="%.6g", quoting=quoting(frame))
        csv = "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()
    drawn[f"plot-{name}"] = json.loads(figure.to_json() or "")
    rows = question.pick(frame) if question.pick else frame
    rows = rows.loc[:, rows.nunique(dropna=False) > 1] if len(rows) > 1 else rows
    return {
        "heading": heading,
        "missing": "",
        "findings": module.findings(frame),
        "plot": f"plot-{name}",
        "height": figure.layout["height"] or 420,
        "columns": [str(column).replace("_", " ") for column in rows.columns],
        "text_columns": [at for at, kind in enumerate(rows.dtypes) if not pd.api.types.is_numeric_dtype(kind)],
        "shown": [[cell(value) for value in row] for row in rows.head(MOST_ROWS).itertuples(index=False)],
        "choice": question.choice,
        "n_rows": f"{len(frame):,}",
        "file": f"{trace.run}-{name}.csv",
        "csv": csv,
        "command": command(trace, question, f"{name}.csv"),
        "definition": definition(module.__doc__ or ""),
    }


def command(trace: Trace, question: Question, out: str) -> str:
    """The command line that writes the whole table."""
    options = [f"--set {shlex.quote(f'{name}={value}')}" for name, value in question.arguments.items() if value]
    path, run = shlex.quote(file_argument(trace)), shlex.quote(trace.run)
    return " ".join(["workbench analyze", question.name, path, "--run", run, *options, "--out", shlex.quote(out)])


def file_argument(trace: Trace) -> str:
    """The trace's file as an argument of a command line: never an option."""
    name = trace.path.name
    return f"./{name}" if name.startswith("-") else name


def cell(value: Any) -> str:
    """A value of a table as text."""
    if value is pd.NA:
        return ""
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.4g}"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return "" if value is None else str(value)


def definition(text: str) -> Markup:
    """A docstring (paragraphs, `- ` lists, **bold**, `code`) as HTML."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        first, *items = re.split(r"(?:^|\n)- ", paragraph)
        if first.strip():
            blocks.append(f"<p>{marked(first)}</p>")
        if items:
            blocks.append("<ul>" + "".join(f"<li>{marked(item)}</li>" for item in items) + "</ul>")
    return Markup("\n".join(blocks))


def marked(text: str) -> str:
    """Bold and code of one paragraph."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", escaped))


def model_name(facts: dict[Any, Any], trace: Trace) -> str:
    """What to call the model: its Hub id or name, the last part of a path, or the run where there is no model."""
    if not present(facts["model"]):
        return trace.run
    name = str(facts["model"])
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def subtitle(trace: Trace) -> str:
    """The architecture in a line."""
    experts = "/".join(str(count) for count in sorted(set(trace.layers["n_experts"])))
    top_k = "/".join(str(count) for count in sorted(set(trace.layers["top_k"])))
    gating = "; ".join(sorted(set(trace.layers["gating"].dropna().astype(str))))
    return f"{trace.n_layers} MoE layers × {experts} experts, top-{top_k}" + (f" · {gating}" if gating else "")


def headline_facts(trace: Trace, sequences: pd.DataFrame) -> list[tuple[str, str]]:
    """Numbers for the top of the page."""
    facts = [(f"{trace.n_tokens:,}", "tokens"), (f"{trace.n_sequences:,}", "texts")]
    for column, name in (("lang", "languages"), ("domain", "domains"), ("source", "sources")):
        if column in sequences and sequences[column].notna().any():
            facts.append((f"{sequences[column].nunique():,}", name))
    selections = int(trace.layers["top_k"].sum()) * trace.n_tokens
    return [*facts, (compact(selections), "expert choices")]


def compact(number: int) -> str:
    """1234567 -> "1.2 M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{number:,}"


def run_facts(trace: Trace, facts: dict[Any, Any], sequences: pd.DataFrame) -> list[tuple[str, str]]:
    """Everything the trace says about the run."""
    corpus, versions = corpus_of(facts), versions_of(facts)
    rows = [
        ("run", trace.run),
        ("model", facts["model"]),
        ("revision", facts["revision"]),
        ("family", facts["family"]),
        ("engine", " ".join(str(part) for part in (facts["engine"], facts["dtype"]) if present(part))),
        ("recorded", ", ".join(sorted(trace.recorded))),
        ("experts", {"fused": "fused code", "model": "the model's own code"}.get(str(corpus.get("experts")))),
        ("corpora", ", ".join(strings(corpus.get("names")))),
        ("corpus fingerprint", corpus.get("fingerprint")),
        ("languages", counted(sequences, "lang")),
        ("domains", counted(sequences, "domain")),
        ("started", moment(facts["started"])),
        ("finished", moment(facts["finished"])),
        ("status", facts["status"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("file", trace.path.name),
    ]
    return [(name, str(value)) for name, value in rows if present(value)]


def counted(sequences: pd.DataFrame, column: str) -> str:
    """Labels of a column with the number of texts of each, most frequent first."""
    if column not in sequences:
        return ""
    return ", ".join(f"{label} {number:,}" for label, number in sequences[column].value_counts().items())


def moment(value: Any) -> str:
    """A time stamp to the second."""
    return value.strftime("%Y-%m-%d %H:%M:%S") if isinstance(value, datetime) and not pd.isna(value) else ""


def present(value: Any) -> bool:
    """Whether there is anything to show."""
    return value is not None and not (isinstance(value, float) and np.isnan(value)) and str(value) not in ("", "NaT")


def commands(trace: Trace, facts: dict[Any, Any], out: Path) -> str:
    """The command lines that give this report again, as far as the trace tells: a model that begins with a dash would
    be an option, and makes no line.
    """
    corpus = corpus_of(facts)
    names = strings(corpus.get("names"))
    lines = []
    if names and present(facts["model"]) and not str(facts["model"]).startswith("-"):
        parts = ["workbench", "trace", str(facts["model"])]
        for name in names:
            parts += ["--corpus", name]
        if present(facts["dtype"]):
            parts += ["--dtype", str(facts["dtype"])]
        if trace.counted:
            parts += ["--counts-by", ",".join(strings(corpus.get("group")) or ["seq"])]
        else:
            parts += ["--record", ",".join(sorted(trace.recorded))]
        parts += ["--run", trace.run, "--out", trace.path.name]
        for key, option in {
            "max_length": "--max-length",
            "long_texts": "--long",
            "batch_tokens": "--batch-tokens",
        }.items():
            if present(corpus.get(key)):
                parts += [option, str(corpus[key])]
        if corpus.get("generate"):
            parts += ["--generate", str(corpus["generate"])]
        lines.append(shlex.join(parts))
    lines.append(shlex.join(["workbench", "report", file_argument(trace), "--run", trace.run, "--out", out.name]))
    # A terminal takes a pasted control character for a key, in quotes too: ^C ends the line that it stands in.
    return "\n".join(line for line in lines if line.isprintable())


def in_script(text: str) -> str:
    """JSON that can't end the script element it stands in."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def policy(*scripts: str) -> str:
    """A content security policy: no network at all, and only these scripts."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
