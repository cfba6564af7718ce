"""Write the card of a demonstration model: README.md and loss.svg beside its weights.

    python data/model_card.py demo demo-early

Loss curve and held-out losses are those of `training.json`, which `train_demo.py` wrote. What the routers know of
language and domain is measured here, by the workbench, over the bundled corpora, so that everybody can repeat it.
"""

import json
import tempfile
from typing import Annotated

import pandas as pd
import typer
from jinja2 import Environment, StrictUndefined
from plotly.graph_objects import Figure, Scatter

import workbench as wb
from workbench import bundled, figures

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [moe, olmoe, routing]
---
# {{ name }}: a small mixture of experts to try the workbench on

{{ what }} It was trained from random weights with `data/train_demo.py` so that every number of the quick start is that
of a real model. It is no useful language model: it writes plausible fragments at best.

| | |
|---|---|
| architecture | OLMoE: hidden {{ c.hidden_size }}, {{ c.num_hidden_layers }} layers, {{ c.num_experts }} experts of \
size {{ c.intermediate_size }}, top-{{ c.num_experts_per_tok }} |
| parameters | {{ "{:,}".format(t.parameters) }}, in bfloat16 here; trained with float32 weights and bfloat16 products |
| context | {{ t.settings.context }} tokens, of one language, domain and source; the loss rises beyond, so trace with \
`--max-length {{ t.settings.context }}` |
| seen in training | {{ "{:,}".format(t.tokens_seen) }} tokens in {{ "{:,}".format(t.step) }} steps, \
{{ "%.0f"|format(t.minutes) }} minutes on 2 CPU cores |
| held out | **{{ "%.3f"|format(t.heldout.all.nats_per_token) }} nats a token, \
{{ "%.3f"|format(t.heldout.all.bits_per_byte) }} bits a byte** over \
{{ "{:,}".format(t.heldout.all.tokens) }} tokens of passages that training never saw |

```sh
{{ t.command }}
```
`train.jsonl.xz` holds rows `{text, lang, domain, source, segment_id, license}` made from packages of the Python, Debian
and npm indexes under permissive licences and the MPL-2.0; it does not ship with the workbench. What is held out are
passages of up to eight rows, at least 1% of each group of language, domain and source: other passages of the same
document may have been seen.{% if t.note %} {{ t.note }}{% endif %}

## Loss
![training and held-out loss by tokens seen](loss.svg)

## Held-out loss
{{ losses }}

## What the routers know
Mutual information of one expert choice and the text's language, and its domain, over the bundled corpus `demo`.
Nats; the interval is a bootstrap over texts; the null is the 95% bound over permutations of the texts' labels, of
languages within each source and of domains within each language, since most domains exist in English only.

{{ information }}

Above the null's bound: language in {{ above.lang }} of {{ c.num_hidden_layers }} layers, domain in {{ above.domain }}.

## Balance
{{ balance }}

Over the same texts; dead: below a tenth of an even share.

This card was written by `python data/model_card.py {{ name }}`.
"""

WHAT = {
    "demo": "The demonstration model of the MoE routing workbench.",
    "demo-early": "The demonstration model of the MoE routing workbench, early in its training: with `demo` beside it, "
    "one can see routing saturate and drift.",
}


def main(names: Annotated[list[str], typer.Argument(help="demo, demo-early")]) -> None:
    """Measure, and write the card of each model."""
    for name in names:
        folder = bundled.path(f"models/{name}")
        training = json.loads((folder / "training.json").read_text())
        information, balance, above = measure(name)
        card = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(CARD)
        text = card.render(
            name=name,
            what=WHAT[name],
            t=training,
            c=json.loads((folder / "config.json").read_text()),
            losses=markdown(losses(training["heldout"])),
            information=markdown(information),
            balance=markdown(balance),
            above=above,
        )
        figures.save(loss_curve(training["curve"]), folder / "loss.svg", overwrite=True)
        (folder / "README.md").write_text(text)


def measure(name: str) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Mutual information by layer, balance by layer, and in how many layers each label beats its null."""
    model = wb.load(name)
    with tempfile.TemporaryDirectory() as folder:
        trace = wb.trace(model, "demo", f"{folder}/trace.duckdb", max_length=256, long_texts="split")
        asked = {
            "lang": wb.analysis.mutual_information(trace, by="lang", within="source"),
            "domain": wb.analysis.mutual_information(trace, by="domain", within="lang"),
        }
        measures = wb.analysis.balance(trace)
    load = measures.pivot(index="layer", columns="measure", values="value").round(3).reset_index()
    table = pd.DataFrame({"layer": asked["lang"]["layer"]})
    for label, found in asked.items():
        table[label] = [f"{row.mutual_information:.3f} ({row.low:.3f}–{row.high:.3f})" for row in found.itertuples()]
        table[f"share of H({label})"] = [f"{value:.1%}" for value in found["normalised"]]
        table[f"null, {label}"] = [f"{value:.4f}" for value in found["null_high"]]
    above = {label: int((found["low"] > found["null_high"]).sum()) for label, found in asked.items()}
    return table, load, above


def losses(heldout: dict) -> pd.DataFrame:
    """One row a language or domain."""
    rows = [
        {"by": by, "value": value, "tokens": f"{one['tokens']:,}"}
        | {"nats a token": f"{one['nats_per_token']:.3f}", "bits a byte": f"{one['bits_per_byte']:.3f}"}
        for by, groups in (("language", heldout["by_lang"]), ("domain", heldout["by_domain"]))
        for value, one in groups.items()
    ]
    return pd.DataFrame(rows)


def loss_curve(curve: list[dict]) -> Figure:
    """Training loss (smoothed over 20 points) and held-out loss by million tokens seen."""
    frame = pd.DataFrame(curve, columns=["tokens", "loss", "heldout"])
    millions = frame["tokens"] / 1e6
    heldout = frame["heldout"].dropna()
    result = Figure(layout={"template": figures.template(), "height": 320, "width": 720})
    result.add_trace(Scatter(x=millions, y=frame["loss"].rolling(20, min_periods=1).mean(), name="training"))
    result.add_trace(Scatter(x=millions[heldout.index], y=heldout, name="held out", mode="lines+markers"))
    result.update_xaxes(title="million tokens seen").update_yaxes(title="loss (nats a token)")
    return result


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of cells that are already text."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
