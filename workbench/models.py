"""Load a checkpoint, find its MoE layers, say what it is.

    model = load("demo")                # the bundled model; or a folder, a Hub id, a module in memory
    model.layers[0].gating              # "softmax, top-k, renormalised"

Only safetensors are read, never pickles. A checkpoint that would load with anything missing is refused: transformers
fills gaps with random weights and a warning.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from workbench import bundled
from workbench.errors import InputError
from workbench.layers import Layer, expert_parameters, family_of, find_layers
from workbench.quantization import quantise, quietly

__all__ = ["Layer", "Model", "describe", "find_layers", "load", "outline", "twin"]

# In order of preference: the first class that knows the configuration loads it.
_AUTO_CLASSES = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForMultimodalLM,
    transformers.AutoModel,
)
_DEQUANTISE = (
    "load dequantised: AutoModelForCausalLM.from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True)) and "
    "pass the module to load()"
)


def twin(module: nn.Module) -> nn.Module:
    """Modules of their own that share the parameters and buffers: no second copy of the weights, no common hooks."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint in eval mode with its MoE layers found.

    name      as given to load(); the checkpoint's own name, or the class, for a module in memory
    revision  commit of the Hub the weights are from; None for folders and modules
    family    key of `workbench.families.FAMILIES`
    dtype     of most parameters: "float32", "bfloat16", …; "int8:bfloat16" for int8 weights computed with in bfloat16
    module    of torch; tokenizer: of transformers, or None; layers: see `Layer`, in order of execution
    """

    name: str
    revision: str | None
    family: str
    dtype: str
    module: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    layers: tuple[Layer, ...] = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs have to be."""
        return next(self.module.parameters()).device

    @property
    def max_length(self) -> int | None:
        """Longest sequence in tokens that model and tokenizer are made for; None if neither says."""
        config = getattr(self.module, "config", None)
        config = config.get_text_config(decoder=True) if isinstance(config, PretrainedConfig) else config
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
        limits = [*named, getattr(self.tokenizer, "model_max_length", None)]
        # Tokenizers without a limit say 1e30.
        return min((int(x) for x in limits if x is not None and 0 < x < 1e9), default=None)


def load(
    model: str | Path | nn.Module = "demo",
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Model:
    """Load a mixture-of-experts model in eval mode.

    model      "demo", "demo-early", a folder, a Hub id, or a module in memory (used as it is, where it is)
    tokenizer  a tokenizer, or the folder or Hub id of one; default: the checkpoint's own, None if it has none
    revision   branch, tag or commit of a Hub model; None: its main branch
    dtype      "auto" (as the checkpoint says), or a torch dtype or its name; "int8": the weights rounded to torchao's
               weight-only int8, computing in the checkpoint's dtype ("int8:float32": in that one). The numerics are
               int8's, the memory isn't: see `workbench.quantization`

    InputError if there is no such model, a file is missing or truncated, weights are missing, the model is dense, its
    family can't be traced, its experts run in kernels that can't be seen into, there is no such device, or int8 is
    asked for without torchao.
    """
    computing, int8 = _dtype(dtype)
    if isinstance(model, nn.Module):
        if int8:
            raise InputError(
                f"dtype {dtype!r}: a module in memory is used as it is; give the folder or id of a checkpoint."
            )
        return _wrap(model, _name(model), tokenizer, revision)
    _check_device(device)
    source = _locate(model)
    config = _config(source, revision, trust_remote_code)
    _check_family(source, config, trust_remote_code)
    cls = _auto_class(config, trust_remote_code)
    with _explained(source):
        module, gaps = cls.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=computing,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(gaps["missing_keys"])
    if missing:
        raise InputError(
            f"{model}: {len(missing)} weights are missing from the checkpoint, the first of them {missing[0]}. "
            "Expected a complete checkpoint; download or save it again."
        )
    if tokenizer is None or isinstance(tokenizer, str | Path):
        wanted = tokenizer is not None
        tokenizer = _tokenizer(str(tokenizer) if wanted else source, wanted, trust_remote_code)
    commit = getattr(config, "_commit_hash", None)
    loaded = _wrap(module.to(device), str(model), tokenizer, revision if commit is None else commit)
    if not int8:
        return loaded
    quantise(loaded.module, loaded.layers)
    return replace(loaded, dtype=f"int8:{loaded.dtype}")


def outline(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Model:
    """A checkpoint as load() finds it, but on torch's device "meta": nothing of its weights is read or made.

    For engines that run the checkpoint elsewhere. Its dtype is the configuration's. InputError as load() has it.
    """
    source = _locate(model)
    config = _config(source, revision, trust_remote_code)
    module: Any = _check_family(source, config, trust_remote_code)
    with suppress(OSError):  # there needn't be one
        module.generation_config = GenerationConfig.from_pretrained(source, revision=revision or "main")
    commit = getattr(config, "_commit_hash", None)
    tokenizer = _tokenizer(source, False, trust_remote_code)
    return _wrap(module, str(model), tokenizer, revision if commit is None else commit)


def describe(
    model: str | Path = "demo", *, revision: str | None = None, trust_remote_code: bool = False, local: bool = False
) -> dict:
    """What a checkpoint is, from its configuration alone: no weights are read or made.

    Keys: model, family, layers (a list of dicts: layer, name, n_experts, top_k, n_shared, gating, stack), experts,
    top_k, gating, n_shared (the values that occur over the layers, joined by "/"), parameters, active_parameters,
    expert_parameters, caveat.

    `active_parameters` are all parameters but those of the routed experts that a token doesn't use: attention, norms,
    routers, shared experts, and both embeddings count in full. Where an expert needs no parameters (zero-computation
    experts) it is an upper bound. Tied weights count once.

    local  only from files on this machine: a model that isn't here isn't looked for elsewhere

    InputError as load() has it.
    """
    source = _locate(model)
    config = _config(source, revision, trust_remote_code, local)
    module = _check_family(source, config, trust_remote_code)
    layers = find_layers(module)
    total = sum(p.numel() for p in module.parameters())
    routed = [expert_parameters(layer) for layer in layers]
    rows = [
        {
            "layer": layer.index,
            "name": layer.name,
            "n_experts": layer.n_experts,
            "top_k": layer.top_k,
            "n_shared": layer.n_shared,
            "gating": layer.gating,
            "stack": layer.stack,
        }
        for layer in layers
    ]
    return {
        "model": str(model),
        "family": family_of(layers[0].block),
        "layers": rows,
        "experts": _values(rows, "n_experts"),
        "top_k": _values(rows, "top_k"),
        "gating": _values(rows, "gating"),
        "n_shared": _values(rows, "n_shared"),
        "parameters": total,
        "active_parameters": round(total - sum(all_ for all_, _ in routed) + sum(used for _, used in routed)),
        "expert_parameters": sum(all_ for all_, _ in routed),
        "caveat": layers[0].family.caveat,
    }


def _values(rows: list[dict], key: str) -> str:
    return "/".join(str(value) for value in dict.fromkeys(row[key] for row in rows))


def _wrap(module: nn.Module, name: str, tokenizer: Any, revision: str | None) -> Model:
    """Check a module in memory and find its layers."""
    if getattr(module, "use_kernels", False):
        raise InputError(
            f"{name} was loaded with use_kernels=True, which bypasses the modules a recorder reads. Load it without."
        )
    if any("Mxfp4" in type(child).__name__ for child in module.modules()):
        raise InputError(f"{name} has MXFP4 experts, which run in a kernel that can't be seen into; {_DEQUANTISE}.")
    layers = find_layers(module)
    if not layers:
        raise InputError(_dense(name, module))
    if isinstance(tokenizer, str | Path):
        tokenizer = _tokenizer(str(tokenizer), True, False)
    dtypes: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        dtypes[parameter.dtype] = dtypes.get(parameter.dtype, 0) + parameter.numel()
    return Model(
        name=name,
        revision=revision,
        family=family_of(layers[0].block),
        dtype=str(max(dtypes, key=lambda dtype: dtypes[dtype])).removeprefix("torch."),
        module=module.eval(),
        tokenizer=tokenizer,
        layers=layers,
    )


def _name(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "name_or_path", "") or type(module).__name__


def _dense(name: object, module: nn.Module) -> str:
    config = getattr(module, "config", None)
    if any((getattr(config, count, 0) or 0) > 1 for count in ("num_experts", "n_routed_experts", "num_local_experts")):
        return (
            f"{name} ({type(module).__name__}) names experts in its configuration, but has no router of a known form. "
            "`workbench models` lists the families that can be traced."
        )
    return (
        f"{name} ({type(module).__name__}) is not a mixture of experts: no router found in it. "
        "`workbench models` lists the families that can be traced."
    )


def _locate(model: str | Path) -> str:
    """The folder or Hub id that `model` means."""
    text = str(model)
    if text in bundled.MODELS:
        return str(bundled.path(bundled.MODELS[text]))
    path = Path(text).expanduser()
    if path.is_dir() and text.strip():
        if not (path / "config.json").is_file():
            raise InputError(f"{text}: the folder has no config.json. Expected a checkpoint saved by save_pretrained.")
        return str(path)
    if path.is_file():
        raise InputError(f"{text} is a file. Expected the folder of a checkpoint, or a Hub id.")
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text.strip():
        raise InputError(f"{text!r}: no such folder. Expected 'demo', the folder of a checkpoint, or a Hub id.")
    return text


def _config(source: str, revision: str | None, trust_remote_code: bool, local: bool = False) -> PretrainedConfig:
    with _explained(source):
        config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local
        )
    quantised = getattr(config, "quantization_config", None) or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if method == "mxfp4":
        raise InputError(f"{source} has MXFP4 experts, which run in a kernel that can't be seen into; {_DEQUANTISE}.")
    return config


def _auto_class(config: PretrainedConfig, trust_remote_code: bool) -> Any:
    remote = getattr(config, "auto_map", None) or {} if trust_remote_code else {}
    for cls in _AUTO_CLASSES:
        if type(config) in cls._model_mapping or cls.__name__ in remote:
            return cls
    raise InputError(f"{config.model_type}: transformers has no language model for this configuration.")


def _check_family(source: str, config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    """The model without weights, on the meta device; InputError before any weight is read if it can't be traced."""
    cls = _auto_class(config, trust_remote_code)
    with _explained(source), torch.device("meta"):
        module = cls.from_config(config, trust_remote_code=trust_remote_code)
    if not find_layers(module):
        raise InputError(_dense(source, module))
    return module


def _tokenizer(source: str, wanted: bool, trust_remote_code: bool) -> Any:
    """The tokenizer at `source`; None if there is none and none was asked for."""
    folder = Path(source)
    if not wanted and folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    with _explained(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def _check_device(device: str | torch.device) -> None:
    """InputError unless this torch, on this machine, can put something there."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, ImportError) as error:  # torch without CUDA fails an assertion
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"device {str(device)!r} can't be used: {said}. Take cpu; cuda needs a GPU and a torch built for it."
        ) from error


def _dtype(dtype: str | torch.dtype) -> tuple[str | torch.dtype, bool]:
    """What to compute in, and whether the weights are to be int8's."""
    if isinstance(dtype, torch.dtype):
        return dtype, False
    weights, _, computing = dtype.rpartition(":")
    if dtype == "int8":
        weights, computing = dtype, "auto"
    named = computing if computing == "auto" else getattr(torch, computing, None)
    floating = named == "auto" or (isinstance(named, torch.dtype) and named.is_floating_point)
    if named is None or not floating or weights not in ("", "int8"):
        raise InputError(
            f"dtype {dtype!r}: expected 'auto', 'float32', 'bfloat16', 'float16', or 'int8' (also as 'int8:float32')."
        )
    return named, weights == "int8"


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers raises for a bad checkpoint into an InputError with its first line."""
    logger = logging.getLogger("transformers")
    level = logger.level
    # Its warnings about missing weights come back as errors of ours, those about parallel plans concern nobody here.
    logger.setLevel(logging.ERROR)
    try:
        with quietly():
            yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(
            f"{source}: a weights file is truncated or broken ({error}). Download or save the checkpoint again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{source} can't be loaded: {lines[0]}") from error
    finally:
        logger.setLevel(level)
