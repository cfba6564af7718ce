"""Routed experts of SGLang's HTTP responses.

Source: sgl-project/sglang, python/sglang/srt/state_capturer/routed_experts.py (commit 024911f) and
python/sglang/srt/entrypoints/openai/protocol.py (`SglExt`). A server with --enable-return-routed-experts answers a
request with `"return_routed_experts": true` with base64 of raw int32 ids, of shape (seqlen - 1, layers, k) in the
model's layers, dense ones included; the last sampled token was never read by the model. No weights.

- /generate: `meta_info.routed_experts`, beside prompt_tokens and completion_tokens; a list of them for a batch. With
  `"return_logprob": true, "logprob_start_len": 0` also the ids of the tokens and their losses
- /v1/completions and /v1/chat/completions: `sgl_ext.routed_experts` of the choice (`sglext` of the response in newer
  versions), beside `usage`; with one choice a response, since `usage` is of all

The bytes don't tell their shape: k and the number of layers must be given. Responses cut by
`routed_experts_start_len` are refused where they say how many tokens they have.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.importers.documents import decoded, documents, number, part
from workbench.importers.text import Text, integers, token_ids


def texts(files: Sequence[Path], top_k: int, n_layers: int) -> Iterator[Text]:
    """One text a completion, as it is read. InputError for one without routing, or that isn't as described."""
    for path in files:
        for where, response in documents(path):
            yield _text(where, response, path.name, top_k, n_layers)


def _text(where: str, response: dict[str, Any], source: str, top_k: int, n_layers: int) -> Text:
    meta, encoded = _found(where, response)
    if encoded is None:
        raise InputError(
            f"{where}: no routed_experts. Start the server with --enable-return-routed-experts and ask with "
            '"return_routed_experts": true.'
        )
    data = decoded(where, "routed_experts", encoded)
    n, more = divmod(len(data), 4 * n_layers * top_k)
    if more:
        raise InputError(
            f"{where}: {len(data):,} bytes aren't int32 ids of whole tokens, {n_layers} layers of top-{top_k}. Check "
            "--n-layers and --top-k."
        )
    prompt, said = (number(where, meta, name) for name in ("prompt_tokens", "completion_tokens"))
    if prompt is not None and said is not None and n != max(prompt + said - 1, 0):
        raise InputError(
            f"{where}: {n} tokens with routing of a prompt of {prompt} and {said} sampled tokens, of which the "
            "last has none. Check --n-layers and --top-k, and ask without routed_experts_start_len."
        )
    ids, nll, vocabulary = _tokens(where, meta, response, n)
    model = response.get("model")
    return Text(
        where,
        np.frombuffer(data, "<i4").reshape(n, n_layers, top_k),
        token_ids=ids,
        nll=nll,
        fields={"source": source, "n_prompt": n if prompt is None else min(prompt, n), "request": _request(response)},
        vocabulary=vocabulary,
        model=model if isinstance(model, str) else None,
    )


def _found(where: str, response: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The object that counts the tokens, and what stands for the routing."""
    if "meta_info" in response:
        meta = part(where, response, "meta_info")
        return meta, meta.get("routed_experts")
    choices = response.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise InputError(f"{where}: neither `meta_info` nor one choice; expected a response of SGLang's /generate or "
                         "/v1 with n = 1.")  # fmt: skip
    extra = part(where, choices[0], "sgl_ext") or part(where, response, "sglext")
    return part(where, response, "usage"), extra.get("routed_experts")


def _request(response: dict[str, Any]) -> Any:
    meta = response.get("meta_info")
    return (meta if isinstance(meta, dict) else response).get("id")


def _tokens(
    where: str, meta: dict[str, Any], response: dict[str, Any], n: int
) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
    """Ids, losses and texts of the n tokens, as far as the response has them."""
    rows = [meta.get("input_token_logprobs"), meta.get("output_token_logprobs")]
    if all(isinstance(each, list) for each in rows):
        listed = [row for each in rows for row in each][:n]  # type: ignore[union-attr]
        good = all(isinstance(row, list) and len(row) >= 2 for row in listed)
        if good and len(listed) == n and all(isinstance(row[0], float | int | None) for row in listed):
            ids = token_ids(where, [row[1] for row in listed], n)
            nll = np.array([np.nan if row[0] is None else -float(row[0]) for row in listed])
            words = [row[2] if len(row) > 2 and isinstance(row[2], str) else None for row in listed]
            texts = {int(i): word for i, word in zip(ids, words, strict=True) if word is not None}
            # tokens before logprob_start_len aren't listed, so a shorter list can't be aligned
            return ids, np.where(nll >= 0, nll, np.nan), texts if len(texts) == len(set(ids.tolist())) else {}
    ids = np.full(n, -1)
    said = response.get("output_ids")
    if said is not None:
        said = integers(where, "output_ids", said, 1)[:-1]
        if len(said) <= n:
            ids[n - len(said) :] = token_ids(where, said, len(said))
    return ids, None, {}
