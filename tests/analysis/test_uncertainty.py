"""Entropy, margin and their relation to the loss, against plain Python; laws; what a trace must hold."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import full_trace, write
from scipy.stats import spearmanr

from workbench.analysis.uncertainty import MEASURES, experts_to_mass, figure, findings, uncertainty
from workbench.errors import InputError

E, K, LAYERS = 6, 2, 2
LENGTHS = [9, 1, 12, 8, 10]
SEQ = np.repeat(np.arange(5), LENGTHS)
SEQUENCES = pd.DataFrame({"lang": ["en", "de", "en", None, "de"], "segment_id": list("abcde")})
POS = np.concatenate([np.arange(n) for n in LENGTHS])


def softmax(z) -> list[float]:
    total = sum(math.exp(x) for x in z)
    return [math.exp(x) / total for x in z]


def entropy(p) -> float:
    return -sum(x * math.log(x) for x in p if x) / math.log(len(p))


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    random = np.random.default_rng(5)
    logits = np.float32(random.normal(size=(LAYERS, len(SEQ), E)) * random.gamma(1, size=(1, len(SEQ), 1)))
    p = np.array([[softmax(z) for z in layer] for layer in logits.astype(float)])
    experts = np.argsort(-p, axis=2)[..., :K].transpose(1, 0, 2)
    ordered = -np.sort(-p, axis=2)
    margin = ordered[..., K - 1] - ordered[..., K]
    margin[0, 3] = np.nan
    nll = random.gamma(2, size=len(SEQ))
    nll[POS == 0] = np.nan
    both = {"n_experts": E, "seq": SEQ, "sequences": SEQUENCES, "nll": nll}
    folder = tmp_path_factory.mktemp("uncertainty")
    natural = np.array([[entropy(q) * math.log(E) for q in layer] for layer in p])
    trace = full_trace(folder / "t.duckdb", experts, entropy=natural, margin=margin, logits=logits, **both)
    return {
        "trace": trace,
        "p": p,
        "margin": np.float32(margin),
        "nll": np.float32(nll),
        "both": both,
        "experts": experts,
    }


def losses(nll) -> dict:
    following = [nll[t + 1] if t + 1 < len(SEQ) and SEQ[t + 1] == SEQ[t] else math.nan for t in range(len(SEQ))]
    return {"nll": nll, "next_nll": np.array(following), "position": POS}


@pytest.mark.parametrize("by", [None, "lang"])
def test_against_loop(routed, by):
    frame = uncertainty(routed["trace"], by=by, near_uniform=0.8, mass=0.6, n_resamples=30)
    context = losses(routed["nll"])
    for group, part in frame.groupby("group"):
        used = [t for t in range(len(SEQ)) if by is None or SEQUENCES["lang"][SEQ[t]] == group]
        for layer in range(LAYERS):
            table = part[part["layer"] == layer].set_index(["measure", "decile"])["value"]
            h = np.array([entropy(p) for p in routed["p"][layer]])
            m = routed["margin"][layer]
            assert table["entropy", 0] == pytest.approx(h[used].mean(), rel=1e-5)
            assert table["near_uniform", 0] == pytest.approx((h[used] > 0.8).mean())
            assert table["margin", 0] == pytest.approx(np.nanmean(m[used]), rel=1e-5)
            needed = []
            for t in used:
                mass, number = 0.0, 0
                for x in sorted(routed["p"][layer][t], reverse=True):
                    if mass < 0.6:
                        mass, number = mass + x, number + 1
                needed.append(number)
            assert table["experts_to_mass", 0] == pytest.approx(np.mean(needed))
            for name, values in (("entropy", h), ("margin", m)):
                for loss, other in context.items():
                    known = [t for t in used if np.isfinite(values[t]) and np.isfinite(other[t])]
                    expected = spearmanr(np.float32(values[known]), other[known])[0]
                    assert table[f"{name}_{loss}", 0] == pytest.approx(expected, abs=1e-6), (name, loss)
            ranked = sorted(used, key=lambda t: h[t])
            for loss in ("nll", "next_nll"):
                for tenth in range(10):
                    inside = [t for at, t in enumerate(ranked) if int((at + 0.5) * 10 / len(ranked)) == tenth]
                    values = [context[loss][t] for t in inside if np.isfinite(context[loss][t])]
                    found = table[loss, tenth + 1]
                    assert found == pytest.approx(np.mean(values), rel=1e-5) if values else math.isnan(found)
    assert set(frame["measure"]) == set(MEASURES)
    known = frame["low"].notna() & (frame["decile"] == 0) & ~frame["measure"].str.contains("_nll|position")
    assert (
        known.any() and (frame["low"] <= frame["value"])[known].all() and (frame["value"] <= frame["high"])[known].all()
    )
    assert (frame["n_unlabelled"] == (0 if by is None else 1)).all()
    assert set(frame.loc[frame["measure"] == "near_uniform", "threshold"]) == {0.8}


def test_interval_of_a_correlation(tmp_path):
    """Texts drawn again, the ranks of the whole sample kept."""
    from workbench.analysis.resampling import draws

    random = np.random.default_rng(0)
    entropy_, nll = random.random(60), random.random(60)
    seq = np.repeat(np.arange(6), 10)
    trace = full_trace(
        tmp_path / "t.duckdb", np.zeros((60, 1, 1), int), n_experts=4, seq=seq, entropy=entropy_[None], nll=nll,
        sequences=pd.DataFrame({"lang": ["en"] * 6}),
    )  # fmt: skip
    row = uncertainty(trace, measures=("entropy_nll",), n_resamples=40, seed=2).iloc[0]
    x, y = (np.argsort(np.argsort(np.float32(values))) for values in (entropy_, nll))
    again = []
    for times in np.concatenate(list(draws(6, 40, 2))):
        weight = times[seq]
        mx, my = (np.average(v, weights=weight) for v in (x, y))
        cov = np.average((x - mx) * (y - my), weights=weight)
        again.append(
            cov / math.sqrt(np.average((x - mx) ** 2, weights=weight) * np.average((y - my) ** 2, weights=weight))
        )
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])), abs=1e-6)


def test_entropy_follows_from_logits(routed, tmp_path):
    options = {"logits": list(np.log(routed["p"])), **routed["both"]}
    trace = full_trace(tmp_path / "t.duckdb", routed["experts"], **options)
    frame = uncertainty(trace, near_uniform=0.8, mass=0.6, n_resamples=0)
    assert not frame["measure"].str.startswith("margin").any()
    numbers = ["layer", "measure", "decile", "value"]
    whole = uncertainty(routed["trace"], near_uniform=0.8, mass=0.6, n_resamples=0)
    whole = whole[~whole["measure"].str.startswith("margin")]
    pd.testing.assert_frame_equal(frame[numbers], whole[numbers].reset_index(drop=True), rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.floats(0.01, 1), st.integers(0, 10**6))
def test_experts_to_mass_laws(n_experts, mass, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(n_experts, 0.5), 4)
    found = experts_to_mass(p, mass)
    assert ((found >= 1) & (found <= n_experts)).all()
    np.testing.assert_array_equal(found, experts_to_mass(p[:, ::-1], mass))
    assert (experts_to_mass(p, mass / 2) <= found).all() and (experts_to_mass(np.eye(n_experts), mass) == 1).all()
    even = experts_to_mass(np.full((1, n_experts), 1 / n_experts), mass)
    assert even == math.ceil(round(mass * n_experts, 6)) or abs(mass * n_experts - round(mass * n_experts)) < 1e-6
    assert np.isnan(experts_to_mass(np.full((1, 3), np.nan), mass)).all()


def test_uniform_and_sure_routers(tmp_path):
    seq, texts = np.repeat(np.arange(4), 5), pd.DataFrame({"lang": ["en"] * 4})
    logits = [np.full((20, 8), 0.5), np.eye(8)[np.zeros(20, int)] * 1e4]
    trace = full_trace(
        tmp_path / "t.duckdb", np.zeros((20, 2, 1), int), n_experts=8, seq=seq, sequences=texts, logits=logits
    )
    table = uncertainty(trace, mass=0.5, n_resamples=20).set_index(["layer", "measure"])["value"]
    assert table[0, "entropy"] == pytest.approx(1) and table[1, "entropy"] == pytest.approx(0, abs=1e-9)
    assert table[0, "near_uniform"] == 1 and table[1, "near_uniform"] == 0
    assert table[0, "experts_to_mass"] == 4 and table[1, "experts_to_mass"] == 1
    assert np.isnan(table[0, "entropy_position"])  # what doesn't vary has no correlation


def test_planted_relation_is_found(tmp_path):
    """A router that is unsure where the model is, in layer 1 only."""
    random = np.random.default_rng(3)
    seq = np.repeat(np.arange(40), 25)
    texts = pd.DataFrame({"lang": ["en"] * 40})
    nll = random.gamma(2, size=1000)
    following = np.append(nll[1:], 0)
    values = np.stack([random.random(1000), 0.3 * random.random(1000) + following / following.max()])
    trace = full_trace(
        tmp_path / "t.duckdb",
        np.zeros((1000, 2, 1), int),
        n_experts=8,
        seq=seq,
        sequences=texts,
        entropy=values,
        nll=nll,
    )
    frame = uncertainty(trace, n_resamples=200)
    table = frame[frame["measure"] == "entropy_next_nll"]
    low, high = table["low"].to_numpy(), table["high"].to_numpy()
    assert low[1] > 0.5 and low[0] < 0 < high[0]
    deciles = frame[(frame["measure"] == "next_nll") & (frame["layer"] == 1)]["value"].to_numpy()
    assert deciles[-1] > 3 * deciles[0]
    assert "layer 1" in findings(frame)[-1] and "in 1 of 2 layers" in findings(frame)[-1]


def test_what_was_not_recorded(routed, tmp_path):
    texts = pd.DataFrame({"lang": ["en"]})
    ids = write(tmp_path / "ids", np.zeros((3, 1, 1), int), [0] * 3, texts, 2).trace
    with pytest.raises(InputError, match="entropy was not recorded.*--record ids,entropy"):
        uncertainty(ids)
    bare = full_trace(
        tmp_path / "bare", np.zeros((3, 1, 1), int), n_experts=4, seq=[0] * 3, sequences=texts, entropy=np.ones((1, 3))
    )
    assert set(uncertainty(bare, n_resamples=0)["measure"]) == {"entropy", "near_uniform", "entropy_position"}
    with pytest.raises(InputError, match="margin was not recorded"):
        uncertainty(bare, measures=("margin_position",))
    with pytest.raises(InputError, match="logits were not recorded"):
        uncertainty(bare, measures=("entropy", "experts_to_mass"))
    with pytest.raises(InputError, match="entropy_nll needs the loss of each token"):
        uncertainty(bare, measures=("entropy_nll",))
    trace = routed["trace"]
    with pytest.raises(InputError, match="measures has 'typo'; expected some of entropy, near_uniform"):
        uncertainty(trace, measures=("typo",))
    with pytest.raises(InputError, match="measures names none"):
        uncertainty(trace, measures=())
    with pytest.raises(InputError, match="near_uniform is 90"):
        uncertainty(trace, near_uniform=90)
    for mass in (0, 1.5):
        with pytest.raises(InputError, match=f"mass is {mass}"):
            uncertainty(trace, mass=mass)
    with pytest.raises(InputError, match="no 'style'"):
        uncertainty(trace, by="style")


@pytest.mark.parametrize("n_experts, n_tokens", [(1, 3), (5, 1), (300, 12)])
def test_degenerate(tmp_path, n_experts, n_tokens):
    random = np.random.default_rng(0)
    trace = full_trace(
        tmp_path / "t.duckdb", np.full((n_tokens, 1, 1), -1), n_experts=n_experts, seq=[0] * n_tokens,
        sequences=pd.DataFrame({"lang": ["en"]}), logits=random.normal(size=(1, n_tokens, n_experts)),
        margin=np.full((1, n_tokens), np.nan), nll=np.full(n_tokens, 1.0),
    )  # fmt: skip
    frame = uncertainty(trace, n_resamples=5)
    table = frame[frame["decile"] == 0].set_index("measure")["value"]
    assert np.isnan(table["entropy"]) == (n_experts == 1) and np.isnan(table["margin"])
    assert frame["low"].isna().all()
    figure(frame)
    assert ("No entropy is defined" in findings(frame)[0]) == (n_experts == 1)


def titles(drawn) -> list[str]:
    """What stands above the panels."""
    return [text["text"] for text in drawn.to_dict()["layout"]["annotations"]]


def test_figures(routed):
    frame = uncertainty(routed["trace"], n_resamples=10)
    drawn = figure(frame)
    assert titles(drawn)[0] == "entropy / log E" and titles(drawn)[-1] == "loss of the next token, nats"
    assert {"layer 0", "layer 1"} <= {line.name for line in drawn.data}
    by = uncertainty(routed["trace"], by="position", n_resamples=10)
    assert {"0", "1–3", "4–15"} == {line.name for line in figure(by).data if line.showlegend}
    assert any("position" in sentence for sentence in findings(by))
    many = pd.concat([frame.assign(group=f"<i>{number}") for number in range(9)])
    assert figure(many).data[0].y[0].startswith("&lt;i&gt;") and np.shape(figure(many).data[0].z) == (9, 2)
    figure(uncertainty(routed["trace"], measures=("margin_nll",), n_resamples=0))
    only = figure(uncertainty(routed["trace"], measures=("nll",), n_resamples=0))
    assert titles(only) == ["loss of the token, nats"] and len(only.data) == 2
    assert len(figure(uncertainty(routed["trace"], by="lang", measures=("nll",), n_resamples=0)).data[0].x) == 2


def test_an_empty_run(tmp_path):
    trace = full_trace(
        tmp_path / "t.duckdb", np.zeros((0, 1, 1), int), n_experts=3, seq=np.zeros(0, int),
        sequences=pd.DataFrame({"lang": ["en"]}), entropy=np.zeros((1, 0)), nll=np.zeros(0),
    )  # fmt: skip
    frame = uncertainty(trace, n_resamples=5)
    assert frame["value"].isna().all() and (frame["n_compared"] == 0).all()
    assert findings(frame) == ["No entropy is defined in any layer."]
    figure(frame)
