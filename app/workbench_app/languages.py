"""Languages: is one text routed alike in two languages, layer by layer, and which languages are near each other?"""

from dataclasses import replace

import streamlit as st

from workbench import questions
from workbench_app import messages, view
from workbench_app.topics import Topic, sequences, show, values

REFERENCE = "en"


def reference(languages: list[str]) -> str:
    """The language that the others are compared with, as chosen."""
    left, _ = st.columns([1, 3])
    return left.selectbox(
        "Reference", languages, languages.index(REFERENCE) if REFERENCE in languages else 0,
        key="languages_reference", bind="query-params",
        help="The other languages are compared with this one, over texts that are translations of each other.",
    )  # fmt: skip


view.need_trace()
st.title("Languages", anchor=False)
with messages.guarded():
    languages = values("lang")
    if len(languages) < 2:
        st.info(
            "This run has no texts in two languages. Trace parallel texts, which have `lang` and the same `segment_id` "
            "for one text in all languages:\n\n"
            "```sh\nworkbench trace MODEL --corpus udhr --out udhr.duckdb\n```",
            icon=":material/translate:",
        )
        st.stop()
    chosen = reference(languages)
    (section,) = (one for one in questions.sections(view.whole(), sequences()) if one["id"] == "translations")
    alignment, u_shape, distance, loss = section["questions"]
    alignment, u_shape, loss = (replace(one, arguments={"reference": chosen}) for one in (alignment, u_shape, loss))
    shared = {"key": chosen, "fixed": ("reference",)}
    show(
        "languages",
        [
            Topic("Layer by layer", section["lead"], [alignment, u_shape], **shared),
            Topic("Map", "Which languages are routed alike? Neighbours in the map share experts.", [distance]),
            Topic("Loss", "Are languages that are routed unlike the reference also predicted worse?", [loss], **shared),
        ],
    )
