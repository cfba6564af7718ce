"""How fast the page is: `workbench bench app`.

A trace of 1 million tokens × 16 layers × top-8 of 64 experts is made up (or one is given), `workbench app` serves it,
and a real headless Chromium looks at it. For every page:

- **first**: the first view that the server is asked for, its caches cold: seconds from the start of the navigation, in
  a session of its own, until the script has run and all that it sent is drawn, and a figure, table or text is visible.
  What is computed in the background meanwhile (shown with its progress) doesn't count.
- **again**: the same in further sessions, with the server's caches warm.
- **interactions**: seconds from a click until the page shows its effect or the progress of what computes it; and, as
  `answered`, until nothing is computed any more.

The browser's cache of the page's own code is warm in all of them. Peaks of memory (resident set) are sampled while it
runs, of the server alone and of all processes it started. `steering` says how often the model was loaded, and how
often while interventions were toggled on the Steer page between generations.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from rich.console import Console
from rich.table import Table

from workbench.bench.browsing import PATIENCE, Server, chromium, finished, serving, settled
from workbench.bench.made_up_trace import made_up_trace
from workbench.errors import InputError, RunError
from workbench.interventions import Ablate
from workbench.recipe import brief

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

PAGES = (
    "overview", "tokens", "experts", "specialisation", "languages", "consistency", "structure", "compare", "query",
    "steer",
)  # fmt: skip
TARGETS = {"first view": 2.0, "interaction": 0.5, "bytes": 2 * 2**30}
"""Seconds, seconds at the median, and memory of the server: what the page aims at on two cores."""

# A figure, table, drawn text or message of the page that can be seen, and when it was seen first.
_VISIBLE = """
() => {
    const main = document.querySelector('[data-testid="stMain"]');
    if (!main) return false;
    const kinds = '.js-plotly-plot .main-svg, [data-testid="stDataFrame"] canvas, [data-testid="stTable"], textarea, '
        + '[data-testid^="stBidiComponent"], [data-testid="stAlert"]';
    const seen = [...main.querySelectorAll(kinds)].some((one) => one.getBoundingClientRect().height > 40);
    return seen && {at: performance.now()};
}
"""
# Counts how often the server loads a model, in a file.
_COUNTING = """
import sys, workbench.models as models
load = models.load
def counted(*arguments, **options):
    with open(sys.argv[1], "a") as log:
        log.write("loaded\\n")
    return load(*arguments, **options)
models.load = counted
from workbench.__main__ import main
sys.argv = ["workbench", *sys.argv[2:]]
main()
"""

Act = Callable[["Page", int], None]
"""What a user does, the i-th time; each time it changes something."""


def run(quick: bool = False, trace: Path | None = None, model: str = "demo") -> dict[str, Any]:
    """What `workbench bench app` prints; the table goes to stderr.

    trace  measure with this one instead of making one up
    model  for the Steer page
    """
    with tempfile.TemporaryDirectory() as folder:
        if trace is not None and not trace.exists():
            raise InputError(f"{trace}: no such file; leave --trace out to have one made.")
        if trace is None:
            size: dict[str, int] = {"n_tokens": 20_000, "n_layers": 4} if quick else {}
            trace = Path(str(made_up_trace(Path(folder) / "trace.duckdb", **size).path))
        return measure(trace, model, Path(folder) / "loads", repeats=1 if quick else 5, pages=PAGES)


def measure(trace: Path, model: str, loads: Path, *, repeats: int, pages: tuple[str, ...]) -> dict[str, Any]:
    """Views, interactions and memory."""
    loads.touch()
    counting = (sys.executable, "-c", _COUNTING, str(loads), "app")
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    with (
        chromium() as browser,
        serving(trace.resolve(), "--model", model, command=counting, environment=environment) as server,
        watching(server) as memory,
    ):
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        context.set_default_timeout(10_000)  # of a click: a widget that is not there
        with opened(context, server, "query"):  # so that the browser knows the page's code
            pass
        found = {name: measure_page(context, server, name, repeats) for name in pages}
        steering = steer(context, server, loads, repeats) if "steer" in pages else None
    result = {
        "bench": "app",
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "trace_bytes": trace.stat().st_size,
        "pages": found,
        "steering": steering,
        "server_peak_bytes": memory.server,
        "processes_peak_bytes": memory.all,
    }
    Console(stderr=True).print(as_table(result))
    return result


@contextmanager
def opened(context: Any, server: Server, name: str, query: str = "") -> Iterator[tuple[Page, float]]:
    """A page in a session of its own, and the seconds until its first view was there."""
    page = context.new_page()
    try:
        page.goto(f"{server.url}/{'' if name == 'overview' else name}{query}")
        shown = page.wait_for_function(_VISIBLE, timeout=PATIENCE * 1000).json_value()["at"]
        yield page, max(shown, settled(page)) / 1000
    finally:
        page.close()


def measure_page(context: Any, server: Server, name: str, repeats: int) -> dict[str, Any]:
    """First views and interactions of one page."""
    views = []
    for _ in range(1 + repeats):
        with opened(context, server, name) as (page, seconds):
            views.append(seconds)
            computed(page)
    result: dict[str, Any] = {"first": rounded(views[0]), "again": summary(views[1:]), "interactions": {}}
    print(f"  {name}: first view {result['first']} s, again {result['again']}", file=sys.stderr, flush=True)
    with opened(context, server, name) as (page, _):
        computed(page)
        for what, act in INTERACTIONS.get(name, {}).items():
            found = result["interactions"][what] = measure_interaction(page, act, repeats)
            print(f"  {name}, {what}: {found}", file=sys.stderr, flush=True)
    return result


def computed(page: Page) -> float | None:
    """Wait until nothing is computed in the background; since when, None if that takes longer than PATIENCE."""
    from playwright.sync_api import TimeoutError

    try:
        return finished(page)
    except (TimeoutError, RunError):
        return None


def measure_interaction(page: Page, act: Act, repeats: int) -> dict[str, Any]:
    """Seconds until the page shows what was done, and until nothing is computed any more."""
    from playwright.sync_api import Error

    shown, answered = [], []
    try:
        for number in range(repeats):
            started = page.evaluate("performance.now()")
            act(page, number)
            shown.append((settled(page) - started) / 1000)
            done = computed(page)
            answered.append(PATIENCE if done is None else (done - started) / 1000)
    except (Error, RunError) as error:  # the widget isn't there for this trace, or it takes too long
        return {"failed": str(error).splitlines()[0]}
    return {**summary(shown), "answered": rounded(statistics.median(answered))}


def steer(context: Any, server: Server, loads: Path, repeats: int) -> dict[str, Any]:
    """Toggle an intervention and generate, again and again: seconds of toggling, and how often the model was loaded."""
    draft = json.dumps([brief(Ablate(layer=0, experts=[0]))])
    with opened(context, server, "steer", "?" + urlencode({"steer_recipe": draft, "steer_max": 64})) as (page, _):
        generate(page)
        before, seconds = count(loads), []
        for _ in range(repeats):
            started = page.evaluate("performance.now()")
            part(page, "steer_on_1").locator("label").first.click()
            seconds.append((settled(page) - started) / 1000)
            generate(page)
        return {"loads": before, "loads_while_toggling": count(loads) - before, "toggle": summary(seconds)}


def generate(page: Page) -> None:
    """Generate a few tokens, plain and steered, and wait for them."""
    prompt = part(page, "steer_text").locator("textarea")
    if not prompt.input_value():
        prompt.fill("The law is")
        prompt.press("Control+Enter")
        settled(page)
    part(page, "steer_go").get_by_role("button").click()
    page.locator(".st-key-steer_stop button:enabled").wait_for(timeout=PATIENCE * 1000)
    page.locator(".st-key-steer_go button:enabled").wait_for(timeout=PATIENCE * 1000)
    settled(page)


def count(loads: Path) -> int:
    """Lines of a file."""
    return len(loads.read_text().splitlines())


# --- what users do


def part(page: Page, key: str) -> Locator:
    """The widget of that key."""
    return page.locator(f".st-key-{key}").first


def pick(key: str) -> Act:
    """Take the next option of a select box."""

    def act(page: Page, number: int) -> None:
        part(page, key).get_by_role("combobox").click()
        options = page.get_by_role("option")
        options.first.wait_for()
        options.nth((number + 1) % options.count()).click()

    return act


def segment(key: str) -> Act:
    """Take the next part of a segmented control."""

    def act(page: Page, number: int) -> None:
        buttons = part(page, key).get_by_role("radio")
        buttons.nth((number + 1) % buttons.count()).click()

    return act


def number_in(key: str, first: int = 1) -> Act:
    """Type the next number."""

    def act(page: Page, number: int) -> None:
        field = part(page, key).locator("input")
        field.fill(str(first + number))
        field.press("Enter")

    return act


def type_in(key: str, *texts: str) -> Act:
    """Type one text after the other."""

    def act(page: Page, number: int) -> None:
        field = part(page, key).locator("input, textarea").first
        field.fill(texts[number % len(texts)])
        field.press("Enter")

    return act


def switch(key: str) -> Act:
    """Toggle it."""
    return lambda page, number: part(page, key).locator("label").first.click()


def press(key: str) -> Act:
    """Click the button."""
    return lambda page, number: part(page, key).get_by_role("button").click()


def press_each(key: str) -> Act:
    """Click one button after the other, of those whose keys end in a number."""
    return lambda page, number: part(page, f"{key}{number}").get_by_role("button").click()


def slide(key: str) -> Act:
    """Move a slider by one."""
    return lambda page, number: part(page, key).get_by_role("slider").press("ArrowLeft")


FILTER = {"filter the texts": type_in("where", "lang=de", "lang=en", "domain=code", "domain=fiction", "")}
INTERACTIONS: dict[str, dict[str, Act]] = {
    "overview": {"count the texts by": segment("overview_by"), **FILTER},
    "tokens": {
        "colour by": pick("tokens_colour"),
        "another layer": pick("tokens_layer"),
        "pin a token": number_in("tokens_pin", 5),
        "open another text": number_in("tokens_seq", 7),
        "search": type_in("tokens_search", "la", "the", "die", "konda", "law"),
    },
    "experts": {
        "another metric": pick("experts_metric"),
        "another layer": number_in("experts_layer"),
        "another expert": number_in("experts_expert"),
    },
    "specialisation": {"compare by": pick("specialisation_by"), **FILTER},
    "languages": {"filter the texts": FILTER["filter the texts"]},
    "consistency": {
        "capacity": slide("consistency_capacity"),
        "policy": pick("consistency_policy"),
        "bandwidth": number_in("consistency_bandwidth", 20),
    },
    "structure": FILTER,
    "compare": FILTER,
    "query": {"run an example": press_each("query_example_")},
    "steer": {"temperature": number_in("steer_temperature"), "chat": switch("steer_chat")},
}
"""Page -> what is done there -> how."""


# --- memory


@dataclass
class Peak:
    """Bytes: of the server's own process, and of all processes it started together."""

    server: int = 0
    all: int = 0


@contextmanager
def watching(server: Server) -> Iterator[Peak]:
    """Sample the resident memory ten times a second until the end of the block."""
    import psutil

    peak, over = Peak(), threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            total = 0
            for one in (server.process, *server.process.children(recursive=True)):
                try:
                    used = one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                total += used
                if one.pid == server.process.pid:
                    peak.server = max(peak.server, used)
            peak.all = max(peak.all, total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


# --- what is told


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and worst."""
    return {"median": rounded(statistics.median(seconds)), "worst": rounded(max(seconds))} if seconds else {}


def rounded(seconds: float) -> float:
    return round(seconds, 3)


def as_table(result: dict[str, Any]) -> Table:
    """A row a view and interaction; what misses its target is marked."""
    megabytes = [round(result[name] / 2**20) for name in ("server_peak_bytes", "processes_peak_bytes")]
    table = Table(
        "page", "what", "median s", "worst s", "answered s",
        title=f"trace of {result['trace_bytes'] / 2**20:.0f} MB; server {megabytes[0]} MB, all processes "
        f"{megabytes[1]} MB at most",
    )  # fmt: skip
    for name, page in result["pages"].items():
        table.add_row(name, "first view", marked(page["first"], "first view"), "", "")
        if page["again"]:
            again = page["again"]
            table.add_row("", "view again", marked(again["median"], "first view"), f"{again['worst']:.2f}", "")
        for what, found in page["interactions"].items():
            if "failed" in found:
                table.add_row("", what, "–", "–", "not there")
                continue
            shown = marked(found["median"], "interaction")
            table.add_row("", what, shown, f"{found['worst']:.2f}", f"{found['answered']:.2f}")
    if result["steering"]:
        toggle = result["steering"]["toggle"]
        table.add_row("steer", "toggle", marked(toggle["median"], "interaction"), f"{toggle['worst']:.2f}", "")
    return table


def marked(seconds: float, target: str) -> str:
    return f"{seconds:.2f}{' !' if seconds > TARGETS[target] else ''}"
