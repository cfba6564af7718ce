"""The command `patch`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import transformers
from commandline import Command, refused

transformers.logging.disable_progress_bar()

PROMPTS = ["--source", "The dog and the", "--target", "The dog und der"]
ANSWERS = ["--answers", " and, und"]


def test_prints_findings_and_the_largest_effects(workbench: Command) -> None:
    result = workbench("patch", *PROMPTS, *ANSWERS, "--dtype", "float32")
    assert result.code == 0
    assert "The first answer's logit is" in result.out and "correlates with the exact effect" in result.out
    assert len(result.out.strip().split("\n\n")[1].splitlines()) == 1 + 10


def test_writes_a_table_and_a_figure(workbench: Command, tmp_path: Path) -> None:
    out, figure = tmp_path / "t.csv", tmp_path / "f.html"
    arguments = ["patch", *PROMPTS, *ANSWERS, "--dtype", "float32", "--out", out, "--figure", figure]
    assert workbench(*arguments).code == 0
    frame = pd.read_csv(out)
    assert len(frame) == 6 * 32 and figure.stat().st_size > 1000
    refused(workbench(*arguments), "t.csv exists")
    assert workbench(*arguments, "--overwrite", "--estimate", "--layer", 3, "--layer", 4).code == 0
    fast = pd.read_csv(out)
    assert set(fast["layer"]) == {3, 4} and fast["effect"].isna().all()


def test_pairs_from_a_file_as_json(workbench: Command, tmp_path: Path) -> None:
    row = {"source": "The dog and the", "target": "The dog und der", "answers": [" and", " und"]}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 2)
    result = workbench("patch", "demo", "--pairs", tmp_path / "pairs.jsonl", "--what", "routers", "--json")
    rows = json.loads(result.out)
    assert len(rows) == 2 * 6 and {row["pair"] for row in rows} == {0, 1} and rows[0]["expert"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --source, --target and --answers, or --pairs FILE"),
        (PROMPTS, "expected --source, --target and --answers"),
        ([*PROMPTS, *ANSWERS, "--pairs", "x.jsonl"], "--pairs goes without --source"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([*PROMPTS, "--answers", " and"], "expected two texts with a comma between"),
        ([*PROMPTS, "--answers", " and,"], "expected two texts with a comma between"),
        ([*PROMPTS, "--answers", " and, Paris"], "' Paris' is 2 tokens"),
        ([*PROMPTS, *ANSWERS, "--layer", "6"], "layer 6: demo has the layers 0 to 5"),
        ([*PROMPTS, *ANSWERS, "--out", "x.xlsx"], "can't tell the format from '.xlsx'"),
        ([*PROMPTS[:2], "--target", "The dog", *ANSWERS], "expected equally many"),
    ],
)
def test_refusals(workbench: Command, arguments: list[str], message: str) -> None:
    refused(workbench("patch", *arguments), message)


def test_remote_without_a_key(workbench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    refused(workbench("patch", *PROMPTS, *ANSWERS, "--remote"), "set NDIF_API_KEY")
    refused(workbench("patch", *PROMPTS, *ANSWERS, "--remote", "--revision", "main"), "Leave out --revision")
