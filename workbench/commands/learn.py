"""Recipes learned for one prompt: `rewire` from the prompt itself, `remix` from texts that went well."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.commands.edits import numbers
from workbench.commands.options import Device, Dtype, Overwrite, Revision, Run, Trust, check_output, model_and_prompt
from workbench.errors import InputError
from workbench.printing import paragraphs

Words = Annotated[
    list[str], typer.Argument(metavar="[MODEL] PROMPT", help="A model (default: `demo`), and the text to learn for.")
]
Chat = Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message: apply the chat template.")]
Out = Annotated[Path, typer.Option(help="The recipe to write, a .json file.")]


class Optimiser(Enum):
    adam = "adam"
    sgd = "sgd"


class Embedding(Enum):
    hidden = "hidden"
    profile = "profile"


class Method(Enum):
    kernel = "kernel"
    gradient = "gradient"


def rewire(
    words: Words,
    out: Out,
    layers: Annotated[
        str | None, typer.Option(help="Which to learn, as in 2-5 or 0,3. Default: the most confident ones.")
    ] = None,
    share: Annotated[float, typer.Option(help="How many are the most confident: a part of all layers.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Of the optimiser, each over the whole text.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="In the unit of the router's logits.")] = 0.05,
    optimiser: Annotated[Optimiser, typer.Option(help="How a step follows from the gradient.")] = Optimiser.adam,
    generate: Annotated[
        int, typer.Option(help="Also continue the prompt by as many tokens, learning again on the way.")
    ] = 0,
    every: Annotated[int, typer.Option(help="With --generate: tokens between two learnings.")] = 128,
    chat: Chat = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Learn vectors added to router logits from a prompt, so that the model predicts it better.

    The recipe is for texts like the prompt. With --generate it holds what was learned last.
    """
    check_output(out, (".json",), overwrite)  # before anything slow
    wanted = _layers(layers)
    if generate < 0:
        raise InputError(f"--generate {generate}: expected a number of tokens, 0 for none.")
    if steps < 1:
        raise InputError(f"--steps {steps}: expected 1 or more; without a step nothing is learned.")
    from workbench import rewiring
    from workbench.recipe import Recipe, of_model, write_recipe

    model, prompt, ids = _prompt(words, chat, max(generate, 1), revision, device, dtype, trust_remote_code)
    options: dict[str, Any] = {
        "layers": wanted, "share": share, "steps": steps, "learning_rate": learning_rate, "optimiser": optimiser.value,
    }  # fmt: skip
    source = {"method": "rewiring", "prompt": prompt, **options}
    if generate:
        text = list(ids)
        for stretch in rewiring.generate(model, ids, max_new_tokens=generate, every=every, **options):
            found = stretch.rewired
            _print_learned(found)
            text += stretch.token_ids
        print(f"\n{paragraphs(model.tokenizer.decode(text[len(ids) :]))}\n")
        source |= {"generated": len(text) - len(ids), "every": every}
    else:
        found = rewiring.rewire(model, ids, **options)
        _print_learned(found)
    source |= {"n_context": found.n_context, "losses": found.losses, "confidence": found.confidence}
    write_recipe(Recipe(found.deltas, of_model(model), source), out, overwrite=overwrite)
    print(f"{out}: Delta in layers {', '.join(str(delta.layer) for delta in found.deltas)}")


def remix(
    words: Words,
    out: Out,
    reference: Annotated[Path, typer.Option(help="A trace of other texts by this model, recorded with logits.")],
    success: Annotated[
        str | None,
        typer.Option(help="Which texts went well: a highest mean nll, or a column of true and false."),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Mean pathway of the neighbours, or steps down their loss.")
    ] = Method.kernel,
    alpha: Annotated[
        float | None,
        typer.Option(help="Of kernel: share of the own pathway. Default: what suits the neighbours."),
    ] = None,
    neighbours: Annotated[int, typer.Option(help="How many texts to learn from.")] = 3,
    embedding: Annotated[
        Embedding, typer.Option(help="What texts are near by: the last hidden state, or the mean routing.")
    ] = Embedding.hidden,
    experts: Annotated[int, typer.Option(help="How many of a layer's experts to change, the likeliest.")] = 20,
    layers: Annotated[str | None, typer.Option(help="Which to change, as in 2-5 or 0,3. Default: the last 5.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Of the Gaussian kernel. Default: the neighbours' median distance.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of gradient.")] = 10,
    run: Run = None,
    chat: Chat = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Route a prompt's last token more like that of similar texts which the model did well on.

    The recipe is for this prompt alone: it acts on its last token.
    """
    check_output(out, (".json",), overwrite)
    wanted = _layers(layers)
    from workbench import remixing
    from workbench.printing import print_table
    from workbench.recipe import Recipe, of_model, write_recipe
    from workbench.tracefile import Trace

    trace = Trace(reference, run)
    model, prompt, ids = _prompt(words, chat, 1, revision, device, dtype, trust_remote_code)
    known = remixing.reference(model, trace, success=_success(success), layers=wanted, embeddings=embedding.value)
    found = remixing.remix(
        model, ids, known, method=method.value, alpha=alpha, n_neighbours=neighbours, n_experts=experts,
        bandwidth=bandwidth, steps=steps,
    )  # fmt: skip
    source = {
        "method": f"remixing ({method.value})", "prompt": prompt, **known.source, "embedding": known.embedding,
        "n_reference": len(known.seq),
        "neighbours": found.neighbours["seq"].tolist(), "alpha": found.alpha, "losses": found.losses,
    }  # fmt: skip
    write_recipe(Recipe(found.interventions, of_model(model), source), out, overwrite=overwrite)
    print_table(found.neighbours)
    if found.alpha is not None:
        print(f"\nalpha {found.alpha:g}: so much of the own pathway is left")
    else:
        print(f"\nloss of the neighbours {found.losses[0]:.4f} → {found.losses[-1]:.4f} nats")
    print(f"{out}: Remix in layers {', '.join(str(edit.layer) for edit in found.interventions)}")


def _prompt(words: list[str], chat: bool, new: int, revision: Any, device: str, dtype: str, trust: bool) -> tuple:
    """The model, the prompt and its token ids, with room for so many new tokens."""
    name, prompt = model_and_prompt(words)
    from workbench.generation import prompt_ids
    from workbench.models import load

    model = load(name, revision=revision, device=device, dtype=dtype, trust_remote_code=trust)
    return model, prompt, prompt_ids(model, prompt, chat, new)


def _layers(text: str | None) -> tuple[int, ...] | None:
    found = None if text is None else numbers(text)
    if found == ():
        raise InputError(f"--layers {text!r}: expected numbers and ranges, as in 2-5 or 0,3.")
    return found


def _success(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _print_learned(found: Any) -> None:
    print(
        f"learned from {found.n_context} tokens, layers {', '.join(map(str, found.layers))}: "
        f"loss {found.losses[0]:.4f} → {found.losses[-1]:.4f} nats a token"
    )
    if found.losses[-1] > found.losses[0]:
        print("warning: the loss rose; take fewer steps or a lower --learning-rate.", file=sys.stderr)
