"""Placements of experts on devices as files: a plain table, and what inference engines read.

- `table`: one row an expert, the columns layer (counted over MoE layers from 0), expert, device; .csv, .parquet or
  .json. The only one that `read_placement` reads.
- `sglang`: the JSON file for `--init-expert-location FILE --ep-size N` (its
  python/sglang/srt/eplb/expert_location.py): {"physical_to_logical_map": [[…], …]} and no other key, since all keys
  become arguments. A row is a layer *of the model*, dense layers included (their rows aren't used: they keep the
  order); entry p is the expert in slot p, and device d holds the slots d · E/N to (d + 1) · E/N − 1. For
  `--ep-num-redundant-experts 0`, the default.
- `vllm`: the JSON file for vLLM's plugin vllm-ascend, `--additional-config '{"eplb_config": {"expert_map_path":
  FILE}}'` with `--enable-expert-parallel` (vllm_ascend/eplb/core/eplb_utils.py, as of 0.23; announced to go with
  0.25.1): {"moe_layer_count", "layer_list": [{"layer_id", "device_count", "device_list": [{"device_id",
  "device_expert"}]}]}, layers counted over MoE layers. vLLM itself reads no placement from a file so far: it
  places experts by `--expert-placement-strategy linear|round_robin`, and with `--enable-eplb` by its own measurements
  at run time.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.export import save_table
from workbench.output import new_file

FORMATS = ("table", "sglang", "vllm")
COLUMNS = ("layer", "expert", "device")
SUFFIXES = (".csv", ".parquet", ".json")


def export_placement(
    frame: pd.DataFrame, out: str | os.PathLike, format: str = "table", *, overwrite: bool = False
) -> None:
    """Write a placement.

    frame   layer, expert, device, one row an expert, as `workbench.analysis.placement.assign` returns it; `sglang` also
            takes its model_layer, without which the MoE layers count as the layers of the model
    format  table, sglang or vllm; the last two are .json

    InputError if the frame isn't a placement with equal numbers on all devices, or the format can't hold it.
    """
    out = Path(out)
    if format not in FORMATS:
        raise InputError(f"there is no placement format {format!r}; choose from {', '.join(FORMATS)}.")
    wanted = SUFFIXES if format == "table" else (".json",)
    if out.suffix not in wanted:
        raise InputError(f"{out} ends in {out.suffix!r}; a placement as {format} is written as {', '.join(wanted)}.")
    layers = by_layer(frame)
    if format == "table":
        table = frame[list(COLUMNS)].sort_values(["layer", "expert"], ignore_index=True)
        if out.suffix == ".json":
            _write(out, table.to_dict("records"), overwrite)
        else:
            save_table(table, out, overwrite=overwrite)
        return
    sizes = {len(devices) for devices in layers}
    if len(sizes) > 1:
        raise InputError(
            f"layers have {', '.join(map(str, sorted(sizes)))} experts; {format} takes the same number in each: "
            "use --format table."
        )
    content = _sglang(layers, model_layers(frame)) if format == "sglang" else _vllm(layers)
    _write(out, content, overwrite)


def read_placement(path: str | os.PathLike) -> pd.DataFrame:
    """A placement written as `table`: layer, expert, device, sorted. InputError if it isn't one."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} ends in {path.suffix!r}; a placement is a table in {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".json":
            frame = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
        else:
            frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; write one with `workbench place … --out {path}`.") from None
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{path} can't be read as a table of layer, expert, device: {error}") from error
    by_layer(frame)
    return frame[list(COLUMNS)].astype(np.int64).sort_values(["layer", "expert"], ignore_index=True)


def by_layer(frame: pd.DataFrame) -> list[np.ndarray]:
    """Devices of the experts of each layer, int64 (E,), after checking that they are a placement."""
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise InputError(f"a placement has the columns {', '.join(COLUMNS)}; {', '.join(missing)} is missing.")
    if frame.empty or not all(pd.api.types.is_integer_dtype(frame[name]) for name in COLUMNS):
        raise InputError("a placement has a row an expert, and whole numbers for layer, expert and device.")
    n_devices = int(frame["device"].max()) + 1
    if n_devices > len(frame):  # before devices are counted
        raise InputError(
            f"the placement has a device {n_devices - 1}, and {len(frame)} rows; expected devices from 0 on."
        )
    result = []
    for place, (layer, part) in enumerate(frame.sort_values(["layer", "expert"]).groupby("layer")):
        if layer != place:
            raise InputError(f"the placement has no layer {place}; layers are counted from 0 without gaps.")
        experts, devices = part["expert"].to_numpy(), part["device"].to_numpy(np.int64)
        if not np.array_equal(experts, np.arange(len(experts))):
            raise InputError(f"layer {layer} of the placement doesn't have each expert from 0 on exactly once.")
        held = np.bincount(devices, minlength=n_devices) if devices.min() >= 0 else np.array([-1])
        if (held != held[0]).any() or held[0] < 1:
            raise InputError(f"layer {layer} of the placement puts {held.tolist()} experts on its devices; expected "
                             "the same number on each.")  # fmt: skip
        result.append(devices)
    return result


def slots(devices: np.ndarray) -> list[list[int]]:
    """The experts that each device holds, ascending."""
    return [np.flatnonzero(devices == device).tolist() for device in range(int(devices.max()) + 1)]


def model_layers(frame: pd.DataFrame) -> list[int]:
    """Layer of the model that each MoE layer is; InputError if two are the same or they aren't in order."""
    name = "model_layer" if "model_layer" in frame.columns else "layer"
    numbers = frame.groupby("layer")[name].first().astype(int).tolist()
    if numbers != sorted(set(numbers)):
        raise InputError(
            f"the routers lie in layers {numbers} of the model; sglang takes one router a layer, in order: use "
            "--format table."
        )
    return numbers


def _sglang(layers: list[np.ndarray], numbers: list[int]) -> dict[str, Any]:
    n_experts = len(layers[0])
    rows = [list(range(n_experts)) for _ in range(numbers[-1] + 1)]
    for number, devices in zip(numbers, layers, strict=True):
        rows[number] = [expert for held in slots(devices) for expert in held]
    return {"physical_to_logical_map": rows}


def _vllm(layers: list[np.ndarray]) -> dict[str, Any]:
    listed = []
    for layer, devices in enumerate(layers):
        held = [{"device_id": device, "device_expert": experts} for device, experts in enumerate(slots(devices))]
        listed.append({"layer_id": layer, "device_count": len(held), "device_list": held})
    return {"moe_layer_count": len(listed), "layer_list": listed}


def _write(out: Path, content: Any, overwrite: bool) -> None:
    with new_file(out, overwrite) as partial:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
