"""Check every invariant of a trace, in SQL, and name the rows that break one.

>>> validate("udhr.duckdb")          # an empty table: no problems     # doctest: +SKIP
"""

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import duckdb
import pandas as pd

from workbench import connection, counts_checks, folder, schema
from workbench.errors import InputError
from workbench.location import is_folder, located

COLUMNS = ("severity", "check", "run", "layer", "seq", "pos", "rows", "message")


@dataclass(frozen=True)
class Check:
    """One invariant. `sql` selects the rows that break it, as seq, pos, layer (NULL where it has none) and message.

    since  the first format that has the columns it looks at
    """

    name: str
    sql: str
    severity: str = "error"
    since: int = 1


def validate(
    path: str | os.PathLike, run: str | None = None, *, progress: Callable[[int], None] | None = None
) -> pd.DataFrame:
    """The problems of one run of the trace at `path`, or of all runs; an empty table if there are none.

    One row for each invariant that is broken: severity ("error": analyses of this run can be wrong; "warning": it may
    be as meant), check (its name), run, layer, seq, pos (of the first row that breaks it, by layer, sequence and
    position; null where it has none), rows (how many break it) and message. Of a folder the check `parts` reads every
    file with its checksums, and compares those of a part; where one is damaged, nothing else is checked.
    `progress` is called after each check with the number done, of len(CHECKS) a run. InputError if the file is not a
    readable trace.
    """
    where = located(path)
    if is_folder(where):
        harm = (f"{name} is damaged or cut short ({why})" for name, why in folder.damaged(where, schema.columns()))
        if found := _of_parts(harm):  # every question that needs the file would fail for this one reason
            return _as_frame(found)
    with connection.reading(path) as con:
        found = _of_parts(folder.disagreeing(where, con)) if is_folder(where) else []
        version = schema.version_of(con)
        names = [row["run"] for row in schema.runs(con)] if run is None else [schema.find_run(con, path, run)]
        for number, (name, check) in enumerate(itertools.product(dict.fromkeys(names), CHECKS), start=1):
            found += _broken(con, check, name) if check.since <= version else []
            if progress is not None:
                progress(number)
        if run is None:
            found += _broken(con, _orphans(version), None)
    return _as_frame(found)


def _as_frame(found: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(found, columns=list(COLUMNS))
    return frame.astype({"layer": "Int64", "seq": "Int64", "pos": "Int64", "rows": "int64"})


def _of_parts(messages: Iterable[str]) -> list[tuple]:
    told = list(messages)
    return [("error", "parts", None, None, None, None, len(told), told[0])] if told else []


def _broken(con: duckdb.DuckDBPyConnection, check: Check, run: str | None) -> list[tuple]:
    since = schema.version_of(con) if run is not None else 0
    query = f"""
        {"WITH" if run is None else _OF_RUN if since < 3 else _OF_RUN + _OF_COUNTS}
        broken AS ({check.sql}),
        told AS (
            SELECT (layer, seq, pos) AS place,
                {{l: layer, s: seq, p: pos, m: coalesce(message, 'a value is missing')}} AS row
            FROM broken)
        SELECT count(*), arg_min(row, place) FROM told"""
    try:
        rows, first = con.execute(query, {} if run is None else {"run": run}).fetchall()[0]
    except duckdb.OutOfMemoryException as error:  # which says nothing of the trace
        raise InputError(f"the check {check.name} needs more memory: raise {connection.MEMORY}. {error}") from error
    except duckdb.Error as error:  # such as a block that can't be read
        return [("error", check.name, run, None, None, None, 0, f"the check failed: {schema.first_line(error)}")]
    if not rows:
        return []
    return [(check.severity, check.name, run, first["l"], first["s"], first["p"], rows, first["m"])]


_OF_RUN = """
    WITH r AS (SELECT * FROM runs WHERE run = $run),
    l AS (SELECT * FROM layers WHERE run = $run),
    s AS (SELECT * FROM sequences WHERE run = $run),
    t AS (SELECT * FROM tokens WHERE run = $run),
    v AS (SELECT * FROM vocabulary WHERE run = $run),
    x AS (SELECT * FROM routing WHERE run = $run),
    p AS (SELECT * FROM profiles WHERE run = $run),
    w AS (FROM s WHERE (SELECT recorded IS DISTINCT FROM ['counts'] FROM r)),
"""
_OF_COUNTS = """
    o AS (SELECT * FROM loads WHERE run = $run),
    c AS (SELECT * FROM pairs WHERE run = $run),
"""


def _of_run(name: str, condition: str, message: str, severity: str = "error") -> Check:
    row = "NULL::INTEGER AS seq, NULL::INTEGER AS pos, NULL::INTEGER AS layer"
    return Check(name, f"SELECT {row}, {message} AS message FROM r WHERE {condition}", severity)


def _of_layer(name: str, condition: str, message: str) -> Check:
    row = "NULL::INTEGER AS seq, NULL::INTEGER AS pos, layer"
    return Check(name, f"SELECT {row}, {message} AS message FROM l WHERE {condition}")


def _of_sequence(name: str, condition: str, message: str) -> Check:
    row = "seq, NULL::INTEGER AS pos, NULL::INTEGER AS layer"
    return Check(name, f"SELECT {row}, {message} AS message FROM s WHERE {condition}")


def _of_token(name: str, condition: str, message: str, severity: str = "error", since: int = 1) -> Check:
    query = f"SELECT seq, pos, NULL::INTEGER AS layer, {message} AS message FROM {condition}"
    return Check(name, query, severity, since)


def _of_routing(name: str, condition: str, message: str, layers: str = "l", since: int = 1) -> Check:
    query = f"SELECT x.seq, x.pos, x.layer, {message} AS message FROM x JOIN {layers} USING (layer) WHERE {condition}"
    return Check(name, query, since=since)


def _recorded(name: str) -> str:
    return f"(SELECT list_contains(recorded, '{name}') FROM r)"


def _whole_layers(condition: str, message: str) -> str:
    """Layers of at least two tokens whose routing, taken together, meets a condition."""
    return f"""
        SELECT NULL::INTEGER AS seq, NULL::INTEGER AS pos, layer, {message} AS message
        FROM (
            SELECT layer, count(*) AS n, max(len(experts)) AS longest, max(list_max(weights)) AS heaviest,
                bool_and(experts = (SELECT experts FROM x AS one WHERE one.layer = x.layer LIMIT 1)) AS same,
                min(experts) AS first
            FROM x GROUP BY layer
        ) JOIN l USING (layer)
        WHERE n > 1 AND {condition}"""


def _one_row_each(table: str, keys: str, per: str) -> str:
    """Sequences (in each layer) that lack a row for a position, or have one twice or beyond their end.

    A run that counts has no such rows. What a whole sequence adds up to is compared first; only those that differ are
    looked through position by position.
    """
    match = " AND ".join(f"odd.{key} = one.{key}" for key in keys.split(", "))
    return f"""
        SELECT seq, pos, {per} AS layer, format('{{}} rows at this position; expected exactly one', n) AS message
        FROM (
            WITH every AS (SELECT seq, unnest(range(n_tokens))::INTEGER AS pos FROM w),
            sums AS (SELECT seq, bit_xor(hash(pos)) AS positions FROM every GROUP BY seq),
            expected AS (
                SELECT {keys}, n_tokens, positions
                FROM w LEFT JOIN sums USING (seq) {"CROSS JOIN l" if "layer" in keys else ""}),
            had AS (SELECT {keys}, count(*) AS n, bit_xor(hash(pos)) AS positions FROM {table} GROUP BY {keys}),
            odd AS (
                SELECT {keys}, n_tokens FROM expected LEFT JOIN had USING ({keys})
                WHERE coalesce(n, 0) <> n_tokens OR expected.positions IS DISTINCT FROM had.positions),
            wanted AS (SELECT {keys}, unnest(range(n_tokens))::INTEGER AS pos, true AS wanted FROM odd),
            there AS (
                SELECT {keys}, pos, count(*) AS n FROM {table} AS one
                WHERE EXISTS (FROM odd WHERE {match}) GROUP BY {keys}, pos)
            SELECT {keys}, pos, coalesce(n, 0) AS n
            FROM wanted FULL JOIN there USING ({keys}, pos)
            WHERE n IS NULL OR n <> 1 OR wanted IS NULL)"""


def _repeated(ids: str) -> str:
    """Whether a list holds an id twice; ids that agree modulo 64 or less show in the bits that are set, cheaply."""

    def maybe(modulus: int) -> str:
        return f"bit_count(list_bit_xor(list_transform({ids}, lambda e: 1::UBIGINT << (e % {modulus})))) < len({ids})"

    return f"{maybe(64)} AND {maybe(61)} AND list_unique({ids}) < len({ids})"


# Layers with what comes after them in their stack.
_WITH_NEXT = """(
    SELECT layer, lead(top_k) OVER stack_order AS next_k, lead(n_experts) OVER stack_order AS next_experts
    FROM l WINDOW stack_order AS (PARTITION BY stack ORDER BY layer))"""


CHECKS = (
    # the run
    _of_run("run_unique", "(SELECT count(*) FROM r) > 1", "'two runs have this name'"),
    _of_run("status", f"status IS NULL OR status NOT IN {schema.STATUSES}", "format('status is {}', status)"),
    _of_run(
        "finished",
        "status IN ('running', 'interrupted', 'failed')",
        "format('the run is {}, not finished: it is still being written, or resume it', status)",
        "warning",
    ),
    _of_run(
        "recorded",
        f"NOT coalesce(list_has_all({list(schema.RECORDABLE)}, recorded) OR recorded = ['{schema.COUNTS}'], false)",
        "format('recorded is {}', recorded)",
    ),
    # layers
    Check(
        "layer_numbers",
        """SELECT NULL::INTEGER AS seq, NULL::INTEGER AS pos, coalesce(layer, place) AS layer,
               'layers are not numbered 0, 1, … without gaps' AS message
           FROM (SELECT layer, row_number() OVER (ORDER BY layer) - 1 AS place FROM l)
           WHERE layer IS DISTINCT FROM place
           UNION ALL SELECT NULL, NULL, NULL, 'the run has no layers' WHERE NOT EXISTS (FROM l)""",
    ),
    _of_layer(
        "layer_sizes",
        "coalesce(NOT (1 <= top_k AND top_k <= n_experts), true)",
        "format('top-{} of {} experts', top_k, n_experts)",
    ),
    # sequences
    _of_sequence(
        "sequence_unique",
        "seq IS NULL OR seq IN (SELECT seq FROM s GROUP BY seq HAVING count(*) > 1)",
        "'the id is missing or used twice'",
    ),
    _of_sequence(
        "sequence_lengths",
        "coalesce(NOT (0 <= n_prompt AND n_prompt <= n_tokens), true)",
        "format('n_prompt is {} and n_tokens {}; expected 0 <= n_prompt <= n_tokens', n_prompt, n_tokens)",
    ),
    _of_sequence(
        "sha256",
        "NOT regexp_full_match(sha256, '[0-9a-f]{64}')",
        "format('sha256 is {}; expected 64 digits 0-9a-f', sha256)",
    ),
    _of_sequence(
        "metadata",
        "coalesce(NOT json_valid(metadata) OR json_type(metadata) <> 'OBJECT', true)",
        "'metadata is not a JSON object'",
    ),
    # tokens
    _of_token("token_sequence", "t WHERE seq IS NULL OR seq NOT IN (SELECT seq FROM s)", "'no such sequence'"),
    Check("token_positions", _one_row_each("t", "seq", "NULL::INTEGER")),
    _of_token(
        "token_id", f"t WHERE token_id IS NULL OR token_id < {schema.UNKNOWN_TOKEN}", "'token id is below -1 or null'"
    ),
    _of_token(
        "vocabulary",
        f"""t WHERE token_id <> {schema.UNKNOWN_TOKEN} AND EXISTS (FROM v)
            AND token_id NOT IN (SELECT token_id FROM v WHERE token_id IS NOT NULL)""",
        "format('token id {} is not in the vocabulary', token_id)",
    ),
    _of_token(
        "no_vocabulary",
        f"t WHERE token_id <> {schema.UNKNOWN_TOKEN} AND NOT EXISTS (FROM v)",
        "'the run has no vocabulary: token ids can''t be shown as text'",
        "warning",
    ),
    Check(
        "vocabulary_unique",
        """SELECT NULL::INTEGER AS seq, NULL::INTEGER AS pos, NULL::INTEGER AS layer,
               format('token id {} has {} texts', token_id, count(*)) AS message
           FROM v GROUP BY token_id HAVING count(*) > 1 OR token_id IS NULL""",
    ),
    _of_token("phase", "t WHERE phase IS NULL", "'the phase is missing'"),
    _of_token(
        "generated",
        "t JOIN s USING (seq) WHERE (pos >= n_prompt) <> (phase = 'generated')",
        "format('phase is {} at a position {} n_prompt', phase::VARCHAR, if(pos < n_prompt, 'below', 'from'))",
    ),
    _of_token("nll", "t WHERE nll < 0 OR NOT isfinite(nll)", "format('nll is {}; expected >= 0 or null', nll)"),
    _of_token(
        "predicted",
        f"""t WHERE predicted < {schema.UNKNOWN_TOKEN} OR (predicted IS NULL) = {_recorded("predictions")}
            OR (predicted <> {schema.UNKNOWN_TOKEN} AND EXISTS (FROM v)
                AND predicted NOT IN (SELECT token_id FROM v WHERE token_id IS NOT NULL))""",
        "format('predicted is {}; expected an id of the vocabulary, -1 where unknown, null where not recorded', "
        "coalesce(predicted::VARCHAR, 'null'))",
        since=2,
    ),
    # routing
    Check(
        "routing_layer",
        """SELECT seq, pos, layer, 'no such layer' AS message
           FROM x WHERE layer IS NULL OR layer NOT IN (SELECT layer FROM l)""",
    ),
    Check(
        "routing_sequence",
        """SELECT seq, pos, layer, 'no such sequence' AS message
           FROM x WHERE seq IS NULL OR seq NOT IN (SELECT seq FROM s)""",
    ),
    Check("routing_positions", _one_row_each("x", "seq, layer", "layer")),
    _of_routing(
        "experts_count",
        "coalesce(len(experts) > top_k, true)",
        "format('experts is {}; expected at most {}', experts, top_k)",
    ),
    _of_routing(
        "experts_range",
        "list_max(experts) >= n_experts",
        "format('experts is {}; expected ids below {}', experts, n_experts)",
    ),
    _of_routing(
        "experts_distinct",
        _repeated("experts"),
        "format('experts is {}; expected distinct ids', experts)",
    ),
    _of_routing(
        "weights_count",
        f"(len(weights) IS DISTINCT FROM len(experts)) AND (weights IS NOT NULL OR {_recorded('weights')})",
        "format('{} weights for {} experts', coalesce(len(weights)::VARCHAR, 'no'), len(experts))",
    ),
    _of_routing(
        "weights_scale",
        "weights IS NOT NULL AND coalesce(NOT isfinite(scale) OR scale < 1 OR log2(scale) <> floor(log2(scale)), true)",
        "format('scale is {}; expected 1, 2, 4, …', scale)",
    ),
    _of_routing(
        "weights_in_scale",
        "scale > 1 AND coalesce(list_max(weights), 0) < 32767",
        "format('scale is {} though no weight needs it: {}', scale, weights)",
    ),
    _of_routing(
        "entropy",
        # bf16 routers compute it to three digits
        "coalesce(NOT isfinite(entropy) OR entropy < -0.01 OR entropy > ln(n_experts) * 1.01 + 0.01, false)",
        "format('entropy is {}; expected 0 to ln {} = {:.3f} nats', entropy, n_experts, ln(n_experts))",
    ),
    _of_routing("margin", "coalesce(NOT isfinite(margin), false)", "format('margin is {}', margin)"),
    _of_routing(
        "logits",
        f"""(len(logits) IS DISTINCT FROM n_experts OR list_bool_or(list_transform(logits, lambda z: isnan(z))))
            AND (logits IS NOT NULL OR {_recorded("logits")})""",
        "format('{} logits, some maybe NaN; expected {}', coalesce(len(logits)::VARCHAR, 'no'), n_experts)",
    ),
    _of_routing(
        "norms",
        f"""(len(norms) IS DISTINCT FROM len(experts)
             OR list_bool_or(list_transform(norms, lambda z: NOT isfinite(z) OR z < 0)))
            AND (norms IS NOT NULL OR {_recorded("norms")})""",
        "format('norms is {}; expected {} finite numbers >= 0', norms, len(experts))",
    ),
    _of_routing(
        "shift",
        f"coalesce(shift < 0 OR shift > 2.001 OR NOT isfinite(shift), {_recorded('shift')})",
        "format('shift is {}; expected 0 to 2', coalesce(shift::VARCHAR, 'null'))",
        since=2,
    ),
    _of_routing(
        "lookahead",
        f"""(lookahead IS NULL) = (next_k IS NOT NULL AND {_recorded("lookahead")})
            OR coalesce(len(lookahead) > next_k OR list_max(lookahead) >= next_experts, false)
            OR ({_repeated("lookahead")})""",
        """format('lookahead is {}; expected {}', coalesce(lookahead::VARCHAR, 'null'), coalesce(
            format('at most {} distinct ids below {}', next_k, next_experts), 'null in the last layer of a stack'))""",
        layers=_WITH_NEXT,
        since=2,
    ),
    Check("layer_empty", _whole_layers("longest = 0", "'no token has an expert in this layer'")),
    Check("layer_zero", _whole_layers("longest > 0 AND heaviest = 0", "'every weight of this layer is 0'")),
    Check(
        "layer_constant",
        _whole_layers(
            "same AND longest > 0 AND top_k < n_experts", "format('every token has the same experts: {}', first)"
        ),
        "warning",
    ),
    # profiles
    Check(
        "profiles_present",
        f"""SELECT seq, NULL::INTEGER AS pos, layer, format('{{}} profiles; expected one', n) AS message
            FROM (
                SELECT seq, layer, coalesce(n, 0) AS n
                FROM (SELECT seq, layer, n_tokens FROM s CROSS JOIN l)
                FULL JOIN (SELECT seq, layer, count(*) AS n FROM p GROUP BY seq, layer) USING (seq, layer)
                WHERE n_tokens IS NULL OR (n_tokens > 0 AND n IS DISTINCT FROM 1))
            WHERE {_recorded("profiles")}""",
    ),
    Check(
        "profiles_sum",
        """SELECT seq, NULL::INTEGER AS pos, layer,
               format('{} values, sum {:.4f}; expected {}, sum 1', len(probs), list_sum(probs), n_experts) AS message
           FROM p JOIN l USING (layer) JOIN s USING (seq)
           WHERE n_tokens > 0
               AND (len(probs) IS DISTINCT FROM n_experts OR coalesce(abs(list_sum(probs) - 1) > 0.01, true)
                   OR list_min(probs) < 0)""",
    ),
    *(Check(name, sql, since=3) for name, sql in counts_checks.CHECKS),
)


def _orphans(version: int) -> Check:
    """Rows of runs that don't exist, in a file of this format."""
    return Check(
        "orphans",
        " UNION ALL ".join(
            f"""SELECT NULL::INTEGER AS seq, NULL::INTEGER AS pos, NULL::INTEGER AS layer,
                format('{table} has {{}} rows of run {{}}, which does not exist', count(*), run) AS message
            FROM {table} WHERE run IS NULL OR run NOT IN (SELECT run FROM runs) GROUP BY run"""
            for table in schema.tables(version)
            if table not in ("runs", "selections")
        ),
    )
