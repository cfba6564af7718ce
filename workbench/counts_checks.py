"""What has to hold in the tables of a run that counts: names and SQL of checks, for `workbench.validate`.

Of the run: r, its layers l, sequences s, loads o, pairs c. A row of an answer is what breaks the invariant.
"""

_COUNTS = "(SELECT recorded = ['counts'] FROM r)"
_NOWHERE = "NULL::INTEGER AS seq, NULL::INTEGER AS pos"
_CHOSEN = "list_sum(list_transform(tokens, lambda n, i: n * (i - 1)))"
"""Choices that tokens make which choose 0, 1, … experts."""
_PAIRED = "(SELECT coalesce(corpus->>'pairs', 'true') = 'true' FROM r)"
"""Whether pairs were counted: imported counts can be of each expert by itself."""
_WITHIN = "(SELECT * FROM c WHERE layer = other)"


def _of_loads(condition: str, message: str) -> str:
    of = "o LEFT JOIN l USING (layer)"
    return f"SELECT seq, NULL::INTEGER AS pos, layer, {message} AS message FROM {of} WHERE {condition}"


def _of_pairs(condition: str, message: str) -> str:
    return f"""
        SELECT {_NOWHERE}, c.layer AS layer,
            format('block {{}}, expert {{}}: ', c.block, coalesce(expert::VARCHAR, 'any')) || {message} AS message
        FROM c LEFT JOIN l ON l.layer = c.layer LEFT JOIN l AS m ON m.layer = c.other WHERE {condition}"""


def _of_layer(table: str, condition: str, message: str) -> str:
    """table: a query with a column `layer`, one row a layer."""
    return f"SELECT {_NOWHERE}, layer, {message} AS message FROM l LEFT JOIN ({table}) USING (layer) WHERE {condition}"


CHECKS = (
    (
        "loads_where",
        _of_loads(
            f"NOT {_COUNTS} OR n_experts IS NULL OR seq IS NULL OR seq NOT IN (SELECT seq FROM s)",
            "'the run doesn''t count, or there is no such layer or sequence'",
        ),
    ),
    (
        "loads_unique",
        """SELECT seq, NULL::INTEGER AS pos, layer, format('{} rows of this text and phase', count(*)) AS message
           FROM o GROUP BY seq, phase, layer HAVING count(*) > 1""",
    ),
    (
        "loads_sizes",
        _of_loads(
            """len(counts) IS DISTINCT FROM n_experts OR len(tokens) IS DISTINCT FROM top_k + 1
               OR coalesce(least(list_min(counts), list_min(tokens)) < 0, true)""",
            "format('{} counts and {} numbers of tokens, none below 0; expected {} and {}', len(counts), len(tokens), "
            "n_experts, top_k + 1)",
        ),
    ),
    (
        "loads_sum",
        _of_loads(
            f"list_sum(counts) IS DISTINCT FROM {_CHOSEN} OR list_max(counts) > list_sum(tokens)",
            f"format('{{}} choices were counted; the tokens made {{}}', list_sum(counts), {_CHOSEN})",
        ),
    ),
    (
        "loads_tokens",
        """
        SELECT seq, NULL::INTEGER AS pos, layer, format('{} tokens; expected {}', n, n_tokens) AS message
        FROM (SELECT seq, layer, sum(list_sum(tokens)) AS n FROM o WHERE phase IS NOT NULL GROUP BY seq, layer)
        JOIN s USING (seq) WHERE n <> n_tokens
        UNION ALL
        """
        + _of_layer(
            "SELECT layer, sum(list_sum(tokens)) AS n FROM o GROUP BY layer",
            f"{_COUNTS} AND coalesce(n, 0) <> (SELECT coalesce(sum(n_tokens), 0) FROM s)",
            "format('{} tokens in all; expected {}', coalesce(n, 0), (SELECT coalesce(sum(n_tokens), 0) FROM s))",
        ),
    ),
    (
        "loads_empty",
        _of_layer(
            "SELECT layer, sum(list_sum(counts)) AS n FROM o GROUP BY layer",
            f"{_COUNTS} AND n = 0 AND (SELECT sum(n_tokens) FROM s) > 1",
            "'no token has an expert in this layer'",
        ),
    ),
    (
        "pairs_where",
        _of_pairs(
            f"NOT {_COUNTS} OR l.n_experts IS NULL OR m.n_experts IS NULL OR c.other NOT IN (c.layer, c.layer + 1) "
            "OR expert >= l.n_experts OR c.block IS NULL OR c.block NOT IN (SELECT block FROM o)",
            "'the run doesn''t count, or there is no such block, expert or pair of layers'",
        ),
    ),
    (
        "pairs_unique",
        f"""SELECT {_NOWHERE}, layer, format('{{}} rows of block {{}}', count(*), block) AS message
           FROM c GROUP BY block, layer, other, expert HAVING count(*) > 1""",
    ),
    (
        "pairs_sizes",
        _of_pairs(
            """len(counts) IS DISTINCT FROM m.n_experts OR coalesce(list_min(counts) < 0, true)
               OR coalesce(list_max(counts) > tokens, true)""",
            "format('{} counts up to {}; expected {}, none below 0 or above its {} tokens', len(counts), "
            "list_max(counts), m.n_experts, tokens)",
        ),
    ),
    (
        "pairs_within",
        f"""
        SELECT {_NOWHERE}, layer, format('expert {{}}: {{}} tokens in pairs, {{}} in loads', expert, coalesce(n, 0),
            coalesce(load, 0)) AS message
        FROM (SELECT layer, expert, sum(tokens) AS n FROM {_WITHIN} WHERE expert IS NOT NULL GROUP BY layer, expert)
        FULL JOIN (
            SELECT layer, expert, sum(n) AS load
            FROM (SELECT layer, unnest(range(len(counts))) AS expert, unnest(counts) AS n FROM o)
            GROUP BY layer, expert) USING (layer, expert)
        WHERE coalesce(n, 0) <> coalesce(load, 0) AND {_PAIRED}
        UNION ALL
        SELECT {_NOWHERE}, layer,
            format('block {{}}, expert {{}}: {{}} tokens, {{}} with itself', block, expert, tokens, counts[expert + 1])
        FROM {_WITHIN} WHERE expert IS NOT NULL AND counts[expert + 1] IS DISTINCT FROM tokens
        """,
    ),
    (
        "pairs_any",
        _of_layer(
            f"""SELECT layer, sum(tokens) AS n, max(known) AS known FROM {_WITHIN}
                JOIN (SELECT layer, sum(list_sum(tokens) - tokens[1]) AS known FROM o GROUP BY layer) USING (layer)
                WHERE expert IS NULL GROUP BY layer""",
            "n <> known",
            "format('{} tokens with any expert in pairs, {} in loads', n, known)",
        ),
    ),
)
"""Name and query of each."""
