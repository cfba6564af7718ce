"""What the tokens of a text are coloured by, and the colours, for a light and a dark page.

    values = by(text, "expert", layer=3)         # an id a token
    shown = coloured(values, "expert", n_experts=64)
    shown.codes, shown.light.background          # which colour each token has, and the colours

No 64 colours can be told apart by everyone, so an expert's colour is help, not proof: a page shows its number, too, and
can put one expert forward. The palette makes the most of it (see `palette`): the colours are chosen one after the
other, each the one that is furthest from all before it, in OKLab (Ottosson 2020), for the eye that tells it apart worst
of four: normal vision and simulated protanopia, deuteranopia and tritanopia (Machado, Oliveira & Fernandes 2009,
doi:10.1109/TVCG.2009.113). They differ in lightness as much as in hue. An expert has the same colour in every text,
layer and run. Text on every colour has a contrast of 4.5:1 or more (WCAG 2.1, level AA).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from workbench.errors import InputError
from workbench.figures import SEQUENTIAL, SEQUENTIAL_DARK
from workbench.reading import Reading
from workbench.routing import NO_EXPERT

COLOURINGS = {
    "expert": "chosen expert",
    "entropy": "entropy of the router (nats)",
    "margin": "margin of the choice",
    "nll": "loss (nll, nats)",
    "agreement": "agreement with another run",
}
"""What tokens can be coloured by, in words."""
N_COLOURS = 256
"""Colours of the palette of experts; an expert with a higher number shares one."""
STEPS = 64
"""Colours of a sequential scale."""
TAILS = (0.02, 0.98)
"""A scale runs between these quantiles of a text's values, so that one token alone doesn't make all others pale."""
INKS = ("#000000", "#ffffff")
"""Text on a colour: whichever of the two is read better. Anything less than black and white fails on some colours."""
CONTRAST = 4.5


@dataclass(frozen=True)
class Palette:
    """Colours, "#rrggbb", and the colour of the text on each."""

    background: list[str]
    ink: list[str]


@dataclass(frozen=True)
class Coloured:
    """n tokens with the colour of each.

    codes      int16 (n,), places in the palettes' lists; -1: no colour, nothing known
    light, dark   the palettes
    low, high  values at the ends of a scale; None for experts. below, above: whether some values lie beyond them
    """

    codes: np.ndarray
    light: Palette
    dark: Palette
    low: float | None = None
    high: float | None = None
    below: bool = False
    above: bool = False


def available(text: Reading) -> list[str]:
    """The colourings that a text has values for; agreement takes another run, and isn't listed."""
    known = {"expert": True, "entropy": text.entropy is not None, "margin": text.margin is not None}
    known["nll"] = bool(np.isfinite(text.nll).any())
    return [name for name in COLOURINGS if known.get(name)]


def by(
    text: Reading, colouring: str, *, layer: int | None = None, rank: int = 0, agreement: np.ndarray | None = None
) -> np.ndarray:
    """float32 (n,): the value of each token, NaN where there is none. An expert's id is exact.

    colouring  one of COLOURINGS
    layer      of expert, entropy, margin, agreement; None: the mean over the layers (not for expert)
    rank       of the expert, from 0
    agreement  float32 (L, n), what workbench.token_agreement returns

    Raises InputError for a layer or rank that there isn't, and for what wasn't recorded.
    """
    if colouring not in COLOURINGS:
        raise InputError(f"tokens can't be coloured by {colouring!r}; choose from {', '.join(COLOURINGS)}.")
    if layer is not None and not 0 <= layer < text.n_layers:
        raise InputError(f"layer {layer}: run {text.run!r} has layers 0 to {text.n_layers - 1}.")
    if colouring == "nll":
        return text.nll
    if colouring == "expert":
        if layer is None:
            raise InputError("an expert is of one layer: give layer, from 0.")
        k = int(text.layers["top_k"].iloc[layer])
        if not 0 <= rank < k:
            raise InputError(f"rank {rank}: layer {layer} chooses {k} experts; expected 0 to {k - 1}.")
        experts = text.experts[layer, :, rank]
        return np.where(experts == NO_EXPERT, np.nan, experts).astype(np.float32)
    values = agreement if colouring == "agreement" else getattr(text, colouring)
    if values is None:
        what = "another run was not given" if colouring == "agreement" else f"run {text.run!r} didn't record it"
        raise InputError(f"tokens can't be coloured by {colouring}: {what}. There is {', '.join(available(text))}.")
    if layer is not None:
        return values[layer]
    known = np.isfinite(values)
    total = np.where(known, values, 0).sum(axis=0, dtype=np.float64)
    return np.divide(total, known.sum(axis=0), out=np.full(len(text), np.nan), where=known.any(axis=0)).astype(
        np.float32
    )


def coloured(values: np.ndarray, colouring: str) -> Coloured:
    """The colour of each value: of an expert its own, of anything else one on a scale from pale to strong.

    The scale of an agreement runs from 1 (pale) to 0, that of the others between the TAILS of the values. NaN has none.
    """
    known = np.isfinite(values)
    codes = np.full(len(values), -1, np.int16)
    if colouring == "expert":
        codes[known] = values[known].astype(np.int64) % N_COLOURS
        return Coloured(codes, palette(False), palette(True))
    backward = colouring == "agreement"
    low, high = (0.0, 1.0) if backward else _ends(values[known])
    share = np.clip((values[known] - low) / (high - low), 0, 1) if high > low else np.zeros(known.sum())
    codes[known] = np.rint(share * (STEPS - 1))
    below, above = (bool((values[known] < low).any()), bool((values[known] > high).any()))
    light, dark = (scale(dark, backward) for dark in (False, True))
    return Coloured(codes, light, dark, low, high, below, above)


def _ends(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return 0.0, 1.0
    low, high = (float(end) for end in np.quantile(values.astype(np.float64), TAILS))
    return low, high


@cache
def palette(dark: bool, n: int = N_COLOURS) -> Palette:
    """Colours of experts 0 to n - 1 on a light or dark page, the most different first; see the top of the file."""
    rgb = _candidates(dark)
    seen = np.stack([_oklab(_as_seen(rgb, eye)) for eye in EYES])  # (eyes, candidates, 3)
    page = np.array([_rgb(DARK_PAGE if dark else "#ffffff")])
    away = np.linalg.norm(seen - np.stack([_oklab(_as_seen(page, eye)) for eye in EYES]), axis=2).min(axis=0)
    chosen = []
    for _ in range(n):
        best = int(away.argmax())
        chosen.append(best)
        away = np.minimum(away, np.linalg.norm(seen - seen[:, [best]], axis=2).min(axis=0))
    return inked([_hex(rgb[at]) for at in chosen])


@cache
def scale(dark: bool, backward: bool = False) -> Palette:
    """STEPS colours from the page's own to a strong blue, or backward; text on each is dark or light."""
    ends = SEQUENTIAL_DARK if dark else SEQUENTIAL
    known = np.array([_rgb(colour) for colour in ends])
    places = np.linspace(0, len(known) - 1, STEPS)
    rgb = np.stack([np.interp(places, np.arange(len(known)), known[:, channel]) for channel in range(3)], axis=1)
    return inked([_hex(one) for one in (rgb[::-1] if backward else rgb)])


def inked(colours: list[str]) -> Palette:
    """Colours with the better of the two INKS on each."""
    return Palette(colours, [max(INKS, key=lambda ink: contrast(colour, ink)) for colour in colours])


def contrast(first: str, second: str) -> float:
    """WCAG 2.1 contrast of two colours "#rrggbb", from 1 (the same) to 21 (black on white).

    >>> contrast("#000000", "#ffffff")
    21.0
    """
    a, b = sorted((float(_linear(_rgb(colour)) @ LUMINANCE) for colour in (first, second)), reverse=True)
    return round((a + 0.05) / (b + 0.05), 6)


# --- colour science: sRGB in [0, 1], (…, 3)

DARK_PAGE = "#12171d"
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
LEVELS = 14
"""Candidates a channel."""
LIGHTNESS = {False: (0.66, 0.95), True: (0.32, 0.72)}
"""Of the candidates, in OKLab, on a light and on a dark page."""
CHROMA = (0.03, 0.16)
"""Neither grey, which stands for nothing known, nor glaring."""
EYES = {
    "normal": np.eye(3),
    "protanopia": np.array([
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip
"""What linear RGB looks like to each (Machado et al. 2009, severity 1)."""
_TO_LMS = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_TO_LAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def _candidates(dark: bool) -> np.ndarray:
    """Colours of a page that text can be read on, (m, 3)."""
    axis = np.linspace(0, 1, LEVELS)
    rgb = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(_linear(rgb))
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    low, high = LIGHTNESS[dark]
    rgb = rgb[(lab[:, 0] >= low) & (lab[:, 0] <= high) & (chroma >= CHROMA[0]) & (chroma <= CHROMA[1])]
    return rgb[
        [contrast(_hex(one), ink) >= CONTRAST for one, ink in zip(rgb, inked([*map(_hex, rgb)]).ink, strict=True)]
    ]


def _as_seen(rgb: np.ndarray, eye: str) -> np.ndarray:
    """Linear RGB as an eye sees it."""
    return np.clip(_linear(rgb) @ EYES[eye].T, 0, 1)


def _linear(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255


def _hex(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(float(channel) * 255):02x}" for channel in rgb)
