"""Compare: two runs over the same texts, of two checkpoints, two precisions, or steered and plain."""

import shlex

import streamlit as st

from workbench import questions, runs, tracefile
from workbench.analysis.matching import other_run
from workbench.questions import Question
from workbench_app import messages, panel, view
from workbench_app.topics import Topic, show

ANOTHER = "a run of another file …"


def chosen() -> str | None:
    """The other run, as `other` of the analyses wants it; None if none was named."""
    others = [name for name in view.runs() if name != view.run()]
    left, right, _ = st.columns([1, 2, 1])
    picked = left.selectbox(
        f"Compare {messages.text(view.run())} with", [*others, ANOTHER], key="compare_other", bind="query-params",
        help="The run itself is chosen in the sidebar.",
    )  # fmt: skip
    if picked != ANOTHER:
        return picked
    named = right.text_input(
        "File", key="compare_file", bind="query-params", placeholder="other.duckdb, or other.duckdb#run",
        help="The path of a trace file on the machine that this page runs on; `#` names a run of it.",
    )  # fmt: skip
    return named.strip() or None


def nothing_yet() -> None:
    """What to do to have something to compare with."""
    facts = view.runs()[view.run()]
    corpus = runs.corpus_of(facts)
    model = str(facts["model"] or "-")
    parts = ["workbench", "trace", "MODEL" if model.startswith("-") else model]  # it would be taken for an option
    for name in runs.strings(corpus.get("names")) or ["…"]:
        parts += ["--corpus", name]
    for key, option in (("max_length", "--max-length"), ("long_texts", "--long")):
        parts += [option, str(corpus[key])] if corpus.get(key) else []
    same = shlex.join(parts)
    into = shlex.join(["--out", view.whole().path.name, "--append"])
    st.info(
        "Two runs over the same texts are compared here, and there is no other yet. Record one into the same file, of "
        "another checkpoint, another precision, or with a recipe that steers the model:",
        icon=":material/compare_arrows:",
    )
    st.code(
        f"{same} --run steered --recipe recipe.json {into}\n{same} --run half --dtype float16 {into}",
        "sh",
        wrap_lines=True,
    )
    st.caption("Or name a run of another file above. The texts, the tokenizer and `--max-length` have to be the same.")


def both(other: str) -> None:
    """What the two runs are."""
    there = other_run(view.whole(), other)
    facts = [
        view.runs()[view.run()],
        next(run for run in tracefile.info(there.path)["runs"] if run["run"] == there.run),
    ]
    with st.expander(f"What the two runs are: {messages.text(view.run())} and {messages.text(there.run)}"):
        panel.table(runs.table(facts), "compared-runs")


def by_label() -> list[Question]:
    """The column that the agreement is shown by."""
    columns = panel.groupings()
    left, _ = st.columns([1, 3])
    by = left.selectbox(
        "By", columns, columns.index("lang") if "lang" in columns else 0, key="compare_by", bind="query-params"
    )
    heading = f"Agreement by {messages.text(by)}"
    return [Question("agreement", {"other": other, "by": by}, heading, questions.least_alike,
                     ", all layers together, least alike first")]  # fmt: skip


view.need_trace()
st.title("Compare", anchor=False)
with messages.guarded():
    other = chosen()
    if other is None:
        nothing_yet()
        st.stop()
    both(other)
    key = other.replace("/", "-")
    shared = {"key": key, "fixed": ("other",)}
    arguments = {"other": other}
    show(
        "compare",
        [
            Topic(
                "Layers",
                "Do the two runs choose the same experts for the same tokens, and in which layers least?",
                [Question("agreement", arguments, "Layer by layer")],
                **shared,
            ),
            Topic(
                "Languages and domains",
                "For which texts do the choices change most?",
                key=key,
                fixed=("other", "by"),
                begin=by_label,
            ),
            Topic(
                "Experts",
                "Which experts do more work in the other run, which less, and which serve other tokens?",
                [
                    Question(
                        "expert_changes", arguments, "Every expert", questions.most_changed, ", what surely changed"
                    )
                ],
                **shared,
            ),
            Topic(
                "Token ids",
                "Which token ids change their experts?",
                [Question("token_changes", arguments, "Token ids that changed most")],
                **shared,
            ),
            Topic(
                "Texts",
                "Which texts change their experts?",
                [Question("token_changes", arguments | {"per": "text"}, "Texts that changed most")],
                key=f"{key}-texts",
                fixed=("other", "per"),
            ),
        ],
    )
