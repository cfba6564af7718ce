"""Structure: which experts work together, within a layer, from layer to layer, on devices, and in the weights."""

from collections.abc import Sequence

import streamlit as st

from workbench import questions
from workbench.questions import Question
from workbench_app import messages, view
from workbench_app.topics import Topic, sequences, show


def checkpoint() -> Sequence[Question]:
    """Which other checkpoint the experts are matched with."""
    left, _ = st.columns([1, 1])
    other = left.text_input(
        "Another checkpoint", key="structure_other", bind="query-params", placeholder="demo-early, a path, or a Hub id",
        help="Of the same architecture: an earlier checkpoint, a fine-tuned one, or one trained from another seed.",
    )  # fmt: skip
    if not other.strip():
        st.info(
            "Name another checkpoint of the same architecture, for example `demo-early` beside `demo`.",
            icon=":material/compare_arrows:",
        )
        return []
    return [Question("permutation", {"other": other.strip()}, "Are its experts the same in another order?")]


def removal() -> Sequence[Question]:
    """Starts the measurement only when told to: it runs the model once for each expert."""
    started = st.toggle(
        "Measure it now", key="structure_sensitivity", bind="query-params",
        help="Runs the model once for each expert, over the corpus of the options: minutes for a small model.",
    )  # fmt: skip
    if not started:
        st.info("This runs the model once for each expert, and isn't begun unasked.", icon=":material/hourglass_empty:")
        return []
    return [Question("sensitivity", {}, "What is lost without each expert")]


view.need_trace()
st.title("Structure", anchor=False)
with messages.guarded():
    section = {one["id"]: one for one in questions.sections(view.whole(), sequences())}
    asked = {
        question.name: question for name in ("structure", "load", "tokens") for question in section[name]["questions"]
    }
    importance = [asked["importance"], *([asked["norm_rank"]] if "norm_rank" in asked else [])]
    of = f"of {messages.text(view.model_name() or 'the model')}"
    show(
        "structure",
        [
            Topic("Within a layer", section["structure"]["lead"], [asked["coactivation"], asked["partners"]]),
            Topic(
                "Layer to layer",
                "What do a token's experts tell about its experts further on?",
                [asked["affinity"], asked["layer_links"]],
            ),
            Topic(
                "Routers",
                "How sure are the routers, and does it go with the loss?",
                [asked["uncertainty"]],
            ),
            Topic("Importance", "Which experts does the output depend on?", importance),
            Topic(
                "Devices",
                "What does uneven work cost a server that spreads the experts over devices?",
                [asked["placement"], asked["straggler"], asked["bandwidth"]],
            ),
            Topic(
                "Weights",
                f"Are the experts {of} alike in their weights, and does the router see it? The trace isn't asked.",
                [
                    Question("similarity", {}, "How alike two experts are"),
                    Question("gate_regression", {}, "Do alike experts have alike router rows?"),
                    Question("expert_map", {}, "A map of the experts by their weights"),
                ],
            ),
            Topic(
                "Another checkpoint",
                f"Are the experts {of} those of another checkpoint, in place or in another order?",
                fixed=("other",),
                begin=checkpoint,
            ),
            Topic("Without an expert", f"What does each expert {of} save in loss?", begin=removal),
        ],
    )
