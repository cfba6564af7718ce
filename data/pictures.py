"""The pictures of the page in README.md and docs/page.md: `make screenshot`.

python data/pictures.py demo.duckdb docs
"""

import json
import sys
from pathlib import Path
from urllib.parse import urlencode

from workbench.bench.browsing import chromium, finished, serving

RECIPE = [{"kind": "Ablate", "layer": [1, 2], "experts": [1, 2, 3, 4, 5]}]
VIEWS = {
    "page-tokens": ("tokens", {"tokens_seq": 3905, "tokens_layer": 4}, 1100),
    "page-experts": ("experts", {"experts_layer": 5, "experts_expert": 18}, 1300),
    "page-consistency": ("consistency", {}, 1000),
    "page-steer": (
        "steer",
        {"steer_recipe": json.dumps(RECIPE), "steer_max": 24, "steer_control": "true", "steer_generated": 1},
        1400,
    ),
}
"""File -> page, what its address says, and the height of the window."""


def main(trace: Path, folder: Path) -> None:
    """Write a PNG of each view of a trace of the bundled model."""
    with serving(trace, "--model", "demo") as server, chromium() as browser:
        for name, (page, parameters, height) in VIEWS.items():
            view = browser.new_page(viewport={"width": 1280, "height": height})
            view.goto(f"{server.url}/{page}?{urlencode(parameters)}")
            finished(view)
            if page == "steer":
                view.get_by_role("button", name="Save the result").wait_for()
            view.wait_for_timeout(3000)  # figures fade in
            finished(view)
            view.screenshot(path=folder / f"{name}.png", animations="disabled")
            view.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
