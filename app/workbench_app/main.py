"""What every page has: the navigation, and in the sidebar the run, the part of it that is looked at, and the link."""

from pathlib import Path

import streamlit as st

from workbench_app import link, messages, poll, view

# Section -> file of the page -> title and icon.
PAGES = {
    "See": {
        "overview": ("Overview", ":material/dashboard:"),
        "tokens": ("Tokens", ":material/notes:"),
        "experts": ("Experts", ":material/grid_on:"),
    },
    "Ask": {
        "specialisation": ("Specialisation", ":material/category:"),
        "languages": ("Languages", ":material/translate:"),
        "consistency": ("Consistency and cache", ":material/memory:"),
        "structure": ("Structure", ":material/hub:"),
        "compare": ("Compare", ":material/compare_arrows:"),
        "query": ("Query", ":material/database:"),
    },
    "Act": {"steer": ("Steer", ":material/tune:")},
}

here = Path(__file__).parent
st.set_page_config(page_title="MoE routing workbench", page_icon=here / "icon.svg", layout="wide")
page = st.navigation(
    {
        section: [
            st.Page(here / f"{name}.py", title=title, icon=icon, default=name == "overview")
            for name, (title, icon) in pages.items()
        ]
        for section, pages in PAGES.items()
    }
)
slot = poll.begin()
link.follow()
with messages.guarded():
    view.sidebar()
with messages.guarded():
    page.run()
poll.end(slot)
