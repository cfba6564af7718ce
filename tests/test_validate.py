"""Each invariant of a trace, broken on purpose: validate names it and the row."""

import shutil

import duckdb
import numpy as np
import pytest
from test_store import LAYERS, RUN, VOCABULARY, make_block

from workbench import schema
from workbench.errors import InputError
from workbench.routing import NO_EXPERT, Routing
from workbench.store import Block, Writer
from workbench.validate import CHECKS, validate


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Sequences 0 and 4 of 5 and 6 tokens, the last two generated; everything recorded; one token dropped."""
    path = tmp_path_factory.mktemp("validate") / "good.duckdb"
    block = make_block([0, 4], [5, 6])
    block.sequences[1]["n_prompt"] = 4
    block.tokens["phase"][-2:] = schema.PHASES.index("generated")
    n, random = 11, np.random.default_rng(0)
    block.routing[0].experts[8] = NO_EXPERT
    routing = [
        Routing(
            one.experts,
            one.weights,
            entropy=random.random(n, dtype=np.float32),
            margin=random.random(n, dtype=np.float32),
            logits=random.standard_normal((n, 16), dtype=np.float32),
            norms=random.random((n, 4), dtype=np.float32),
            shift=random.random(n, dtype=np.float32),
            lookahead=one.experts if layer == 0 else None,
        )
        for layer, one in enumerate(block.routing)
    ]
    block.tokens["predicted"] = np.where(np.arange(n) == 3, -1, block.tokens["token_id"][::-1])
    profiles = [np.full((2, 16), 1 / 16, dtype=np.float32) for _ in LAYERS]
    with Writer(path, RUN | {"recorded": schema.RECORDABLE}, LAYERS) as writer:
        writer.add_vocabulary(VOCABULARY)
        writer.append(Block(block.sequences, block.tokens, routing, profiles))
    return path


ROW = "seq = 4 AND pos = 2"
BREAKS = [
    # what is done, the check that finds it, its layer, seq and pos, how many rows
    ("INSERT INTO runs SELECT * FROM runs", "run_unique", None, None, None, 2),
    ("UPDATE runs SET status = 'odd'", "status", None, None, None, 1),
    ("UPDATE runs SET status = 'running'", "finished", None, None, None, 1),
    ("UPDATE runs SET recorded = ['ids', 'odd']", "recorded", None, None, None, 1),
    ("UPDATE layers SET layer = 2 WHERE layer = 1", "layer_numbers", 2, None, None, 1),
    ("DELETE FROM layers", "layer_numbers", None, None, None, 1),
    ("UPDATE layers SET top_k = 17 WHERE layer = 1", "layer_sizes", 1, None, None, 1),
    ("INSERT INTO sequences SELECT * FROM sequences WHERE seq = 4", "sequence_unique", None, 4, None, 2),
    ("UPDATE sequences SET n_prompt = 7 WHERE seq = 4", "sequence_lengths", None, 4, None, 1),
    ("UPDATE sequences SET sha256 = 'ABC' WHERE seq = 4", "sha256", None, 4, None, 1),
    ("UPDATE sequences SET metadata = '[]' WHERE seq = 4", "metadata", None, 4, None, 1),
    ("UPDATE tokens SET seq = 9 WHERE seq = 4", "token_sequence", None, 9, 0, 6),
    (f"DELETE FROM tokens WHERE {ROW}", "token_positions", None, 4, 2, 1),
    (f"UPDATE tokens SET pos = 3 WHERE {ROW}", "token_positions", None, 4, 2, 2),
    ("UPDATE tokens SET pos = pos + 1 WHERE seq = 4", "token_positions", None, 4, 0, 2),
    ("UPDATE sequences SET n_tokens = 7 WHERE seq = 4", "token_positions", None, 4, 6, 1),
    (f"UPDATE tokens SET token_id = -2 WHERE {ROW}", "token_id", None, 4, 2, 1),
    (f"UPDATE tokens SET token_id = 77 WHERE {ROW}", "vocabulary", None, 4, 2, 1),
    ("DELETE FROM vocabulary", "no_vocabulary", None, 0, 0, 11),
    ("INSERT INTO vocabulary SELECT * FROM vocabulary WHERE token_id = 3", "vocabulary_unique", None, None, None, 1),
    (f"UPDATE tokens SET phase = NULL WHERE {ROW}", "phase", None, 4, 2, 1),
    (f"UPDATE tokens SET phase = 'generated' WHERE {ROW}", "generated", None, 4, 2, 1),
    (f"UPDATE tokens SET nll = -0.5 WHERE {ROW}", "nll", None, 4, 2, 1),
    (f"UPDATE tokens SET nll = 'nan' WHERE {ROW}", "nll", None, 4, 2, 1),
    (f"UPDATE tokens SET predicted = 77 WHERE {ROW}", "predicted", None, 4, 2, 1),
    (f"UPDATE routing SET shift = -0.5 WHERE layer = 1 AND {ROW}", "shift", 1, 4, 2, 1),
    (f"UPDATE routing SET lookahead = NULL WHERE layer = 0 AND {ROW}", "lookahead", 0, 4, 2, 1),
    (f"UPDATE routing SET layer = 5 WHERE layer = 1 AND {ROW}", "routing_layer", 5, 4, 2, 1),
    (f"UPDATE routing SET seq = 9 WHERE layer = 1 AND {ROW}", "routing_sequence", 1, 9, 2, 1),
    (f"DELETE FROM routing WHERE layer = 1 AND {ROW}", "routing_positions", 1, 4, 2, 1),
    (f"INSERT INTO routing SELECT * FROM routing WHERE layer = 1 AND {ROW}", "routing_positions", 1, 4, 2, 1),
    ("DELETE FROM routing WHERE layer = 1", "routing_positions", 1, 0, 0, 11),
    (f"UPDATE routing SET experts = [0, 1, 2, 3, 4] WHERE layer = 1 AND {ROW}", "experts_count", 1, 4, 2, 1),
    (f"UPDATE routing SET experts = NULL WHERE layer = 1 AND {ROW}", "experts_count", 1, 4, 2, 1),
    (f"UPDATE routing SET experts = [0, 1, 2, 16] WHERE layer = 1 AND {ROW}", "experts_range", 1, 4, 2, 1),
    (f"UPDATE routing SET experts = [0, 1, 2, 1] WHERE layer = 1 AND {ROW}", "experts_distinct", 1, 4, 2, 1),
    (f"UPDATE routing SET weights = [0, 1] WHERE layer = 1 AND {ROW}", "weights_count", 1, 4, 2, 1),
    (f"UPDATE routing SET weights = NULL WHERE layer = 1 AND {ROW}", "weights_count", 1, 4, 2, 1),
    (f"UPDATE routing SET scale = 1.5 WHERE layer = 1 AND {ROW}", "weights_scale", 1, 4, 2, 1),
    (f"UPDATE routing SET scale = NULL WHERE layer = 1 AND {ROW}", "weights_scale", 1, 4, 2, 1),
    (f"UPDATE routing SET scale = 2, weights = [9, 9, 9, 9] WHERE layer = 1 AND {ROW}", "weights_in_scale", 1, 4, 2, 1),
    (f"UPDATE routing SET entropy = 3 WHERE layer = 1 AND {ROW}", "entropy", 1, 4, 2, 1),
    (f"UPDATE routing SET margin = 'inf' WHERE layer = 1 AND {ROW}", "margin", 1, 4, 2, 1),
    (f"UPDATE routing SET logits = [1.0] WHERE layer = 1 AND {ROW}", "logits", 1, 4, 2, 1),
    (f"UPDATE routing SET logits = list_concat(logits[:15], ['nan'::FLOAT]) WHERE layer = 1 AND {ROW}",
     "logits", 1, 4, 2, 1),
    (f"UPDATE routing SET norms = [1.0, 2.0, 3.0, -1.0] WHERE layer = 1 AND {ROW}", "norms", 1, 4, 2, 1),
    ("UPDATE routing SET experts = [], weights = [], norms = [] WHERE layer = 1", "layer_empty", 1, None, None, 1),
    ("UPDATE routing SET weights = [0, 0, 0, 0] WHERE layer = 1", "layer_zero", 1, None, None, 1),
    ("UPDATE routing SET experts = [0, 1, 2, 3] WHERE layer = 1", "layer_constant", 1, None, None, 1),
    ("DELETE FROM profiles WHERE layer = 1 AND seq = 4", "profiles_present", 1, 4, None, 1),
    ("UPDATE profiles SET probs = [0.5, 0.5] WHERE layer = 1 AND seq = 4", "profiles_sum", 1, 4, None, 1),
    ("UPDATE profiles SET probs = list_transform(probs, lambda p: 2 * p) WHERE layer = 1",
     "profiles_sum", 1, 0, None, 2),
    ("INSERT INTO tokens SELECT * REPLACE ('ghost' AS run) FROM tokens", "orphans", None, None, None, 1),
]  # fmt: skip
WARNINGS = {"finished", "no_vocabulary", "layer_constant"}


def test_nothing_to_find(good):
    assert validate(good).empty
    assert validate(good, "first").empty
    with pytest.raises(InputError, match="no run 'second'"):
        validate(good, "second")


@pytest.mark.parametrize(("statement", "check", "layer", "seq", "pos", "rows"), BREAKS)
def test_found(good, tmp_path, statement, check, layer, seq, pos, rows):
    path = tmp_path / "bad.duckdb"
    shutil.copy(good, path)
    with duckdb.connect(str(path)) as con:
        con.execute(statement)
    found = validate(path).set_index("check")
    assert check in found.index
    row = found.loc[check]
    where = [None if str(row[name]) == "<NA>" else int(row[name]) for name in ("layer", "seq", "pos")]
    assert (where, row["rows"]) == ([layer, seq, pos], rows)
    assert row["severity"] == ("warning" if check in WARNINGS else "error")
    assert row["message"]


def test_every_check_is_tested():
    assert {check.name for check in CHECKS if check.since < 3} | {"orphans"} == {check for _, check, *_ in BREAKS}


def test_encoder_tokens_without_experts(tmp_path):
    """A stack that does not see some tokens has empty lists for them: that is whole."""
    block = make_block([0], [6])
    block.routing[0].experts[:3] = NO_EXPERT
    block.routing[1].experts[3:] = NO_EXPERT
    path = tmp_path / "t.duckdb"
    layers = [LAYERS[0] | {"stack": "encoder"}, LAYERS[1]]
    with Writer(path, RUN, layers) as writer:
        writer.add_vocabulary(VOCABULARY)
        writer.append(block)
    assert validate(path).empty
