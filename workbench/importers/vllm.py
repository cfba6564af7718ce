"""Routed experts of vLLM, from arrays that were saved or from HTTP responses.

Source: vllm-project/vllm, vllm/entrypoints/openai/completion/protocol.py (`CompletionResponseChoice.routed_experts`,
commit 002032e) and tests/entrypoints/openai/test_return_routed_experts.py (commit 184bf81). A server or an `LLM` with
`enable_return_routed_experts` gives for each completion ids of shape (tokens - 1, layers, k) as uint8, uint16 or int32:
the last sampled token was never read by the model, so it has no routing. No weights.

- .npy: one completion, `RequestOutput.outputs[0].routed_experts`; .npz: one a member, in their order
- .json, .jsonl: responses, whose `choices[i].routed_experts` is the .npy file in base64. With
  `"return_token_ids": true` in the request they bring `token_ids` and `prompt_token_ids` (of the choice or, of a chat,
  of the response)

The last sampled token is left out, so that a trace has the tokens that the routers saw. The rows of dense layers are
zeros. Prompts cut by `routed_experts_prompt_start` are refused.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.importers.documents import decoded, documents, first_line, npy, number, part
from workbench.importers.text import Text, integers, token_ids

MOST_BYTES = 1 << 30
"""Of an unpacked member of an archive: a small file may unpack to fill the memory."""


def texts(files: Sequence[Path]) -> Iterator[Text]:
    """One text a completion, as it is read. InputError for one without routing, or that isn't as described."""
    for path in files:
        if path.suffix == ".npy":
            yield Text(str(path), integers(str(path), "the array", _mapped(path), 3), fields={"source": path.name})
        elif path.suffix == ".npz":
            yield from _members(path)
        else:
            for where, response in documents(path):
                yield from _choices(where, response, path.name)


def _mapped(path: Path) -> np.ndarray:
    """An array that is read from the disk when it is used."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy has Python parse the header, which raises whatever its parser does
        raise InputError(f"{path}: not a whole NumPy array (.npy): {first_line(error)}") from None


def _members(path: Path) -> Iterator[Text]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if (size := archive.getinfo(name).file_size) > MOST_BYTES:
                    raise InputError(
                        f"{path}[{name}] takes {size:,} bytes; expected at most {MOST_BYTES:,}. Save it as a .npy file."
                    )
                where = f"{path}[{name.removesuffix('.npy')}]"
                array = npy(where, archive.read(name))
                yield Text(where, integers(where, "the array", array, 3), fields={"source": path.name})
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a whole archive of arrays (.npz): {error}") from None


def _choices(where: str, response: dict[str, Any], source: str) -> Iterator[Text]:
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise InputError(f"{where}: no `choices`; expected a response of vLLM's /v1/completions or chat/completions.")
    found = [_text(f"{where}: choice {index}", response, choice, source) for index, choice in enumerate(choices)]
    asked = response.get("prompt_token_ids") is None and any(one.get("prompt_token_ids") is None for one in choices)
    if len(found) > 1 and asked:  # then `usage` told how long prompts are, which it does of one prompt only
        said = sum(len(text.experts) + 1 - text.fields["n_prompt"] for text in found)
        counted = number(where, part(where, response, "usage"), "completion_tokens")
        if counted is not None and said != counted:
            raise InputError(
                f"{where}: {len(found)} choices of several prompts, whose lengths aren't told. Ask with "
                "return_token_ids, or for one prompt at a time."
            )
    yield from found


def _text(where: str, response: dict[str, Any], choice: dict[str, Any], source: str) -> Text:
    if choice.get("routed_experts") is None:
        raise InputError(f"{where} has no routed_experts: serve the model with --enable-return-routed-experts.")
    where_array = f"{where}: routed_experts"
    experts = integers(where, "routed_experts", npy(where_array, decoded(where, "routed_experts",
                                                                         choice["routed_experts"])), 3)  # fmt: skip
    n = len(experts)
    prompt = choice.get("prompt_token_ids")
    prompt = response.get("prompt_token_ids") if prompt is None else prompt
    said = choice.get("token_ids")
    prompt, said = (
        None if ids is None else integers(where, name, ids, 1)
        for name, ids in (("prompt_token_ids", prompt), ("token_ids", said))
    )
    n_prompt = number(where, part(where, response, "usage"), "prompt_tokens") if prompt is None else len(prompt)
    if n_prompt is None:
        n_prompt = n if said is None else n + 1 - len(said)
    n_said = n + 1 - n_prompt if said is None else len(said)
    if n_prompt < 0 or n_said < 0 or n != max(n_prompt + n_said - 1, 0):
        raise InputError(
            f"{where}: {n} tokens with routing of a prompt of {n_prompt} and {n_said} sampled tokens, of which the "
            "last has none. Ask without routed_experts_prompt_start, and for responses that don't stream."
        )
    ids = [np.full(n_prompt, -1) if prompt is None else prompt, np.full(n_said, -1) if said is None else said]
    model = response.get("model")
    return Text(
        where,
        experts,
        token_ids=token_ids(where, np.concatenate(ids)[:n], n),
        fields={"source": source, "n_prompt": min(n_prompt, n), "request": response.get("id")},
        model=model if isinstance(model, str) else None,
    )
