"""What a recipe does to accuracy on tasks: lm-eval's own harness on local files, plain, steered, and random experts.

    accuracy("demo", "task.yaml", "recipe.json")

A task is a YAML file as the Language Model Evaluation Harness (EleutherAI, `lm-eval`) reads it, and its data is local,
too: paths of data files are relative to the YAML file. Nothing is read from the network.

    task: continuations
    dataset_path: json
    dataset_kwargs: {data_files: {test: continuations.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{start}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"
    metric_list: [{metric: acc}]

**value** and **stderr** are lm-eval's. **delta** (value − plain) and **versus_random** (steered − mean of the controls)
are paired by item; their intervals cover 95% of bootstrap resamples of items, and say nothing about other random draws.
They are known for metrics that are means over items. **n_random_worse** counts the controls that are no better.
"""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from tqdm.auto import tqdm

from workbench import figures
from workbench.analysis.resampling import draws, interval
from workbench.conditions import PLAIN, RANDOM, STEERED, conditions, refuse_generation
from workbench.errors import InputError, RunError, not_negative
from workbench.intervening import Given, intervene
from workbench.models import Model, load

LOCAL = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path` that read local files."""
FEWSHOT_SEED = 1234
"""lm-eval's own default, which its `simple_evaluate` sets: the same examples under every condition."""


def accuracy(
    model: Model | str | Path,
    tasks: str | Path | Sequence[str | Path],
    recipe: Given,
    *,
    n_random: int = 5,
    limit: int | None = None,
    batch_size: int = 16,
    n_resamples: int = 1000,
    seed: int = 0,
    trust_code: bool = False,
) -> pd.DataFrame:
    """Accuracy, or whatever the tasks measure: plain, steered, and with random experts.

    tasks       YAML files of tasks, not of groups
    recipe      what `workbench.intervene` takes; a Contrast only for tasks that generate text
    n_random    controls, drawn with the seeds seed, seed + 1, …; 0 for none
    limit       only the first items of each task
    batch_size  requests in one forward pass
    trust_code  run the Python functions that a task names (`!function`)

    Returns one row a condition × task × metric × filter: condition ("plain", "steered", "random" for the mean of the
    controls, "random N"), task, metric, filter; value, stderr (NaN for the mean, and where lm-eval has none); delta
    with delta_low, delta_high; versus_random with versus_random_low, versus_random_high, n_random, n_random_worse
    (steered only); n_items.

    Raises InputError for a task that can't be loaded, one that isn't local, a recipe that doesn't fit the model, or
    without the package lm-eval; RunError if an evaluation breaks off, or the recipe touched no token.
    """
    paths = [Path(one) for one in ([tasks] if isinstance(tasks, str | Path) else tasks)]
    if not paths:
        raise InputError("no tasks: give at least one YAML file of lm-eval.")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: give at least 1 item, or leave it out for all.")
    manager = _manager()
    with _quiet():
        configs = {path: _config(path, trust_code) for path in paths}
        kinds = {task.OUTPUT_TYPE for task in _tasks(manager, configs, limit).values()}
    not_negative(n_resamples=n_resamples)
    loaded = model if isinstance(model, Model) else load(model)
    if loaded.tokenizer is None:
        raise InputError(f"model {loaded.name} has no tokenizer: load it with `workbench.load(…, tokenizer=…)`")
    runs = conditions(loaded, recipe, n_random, seed)
    if kinds != {"generate_until"}:
        refuse_generation(runs, "the likelihood of an answer")
    found = {}
    for name, edits in tqdm(runs.items(), desc="evaluating", unit=" conditions", disable=None):
        # A control may draw experts that are never selected; the recipe itself has to touch something.
        steering = intervene(loaded, edits, idle=name != STEERED) if edits else nullcontext()
        with _quiet(), steering:
            found[name] = _measured(loaded, _tasks(manager, configs, limit), limit, batch_size)
    return pd.DataFrame(_rows(found, n_resamples, seed)).astype({"n_random_worse": "Int64"})


# -- lm-eval -----------------------------------------------------------------------------------------------------------


def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"tasks take the package lm-eval: pip install 'moe-workbench[eval]' ({error}).") from error
    return TaskManager(include_defaults=False)


def _config(path: Path, trust_code: bool) -> dict[str, Any]:
    """A task's YAML with absolute paths. InputError if it isn't one, or its data isn't local."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a task of lm-eval, a YAML file.")
    try:
        if not trust_code and "!function" in path.read_text(encoding="utf-8"):
            raise InputError(f"{path} runs Python code (!function): allow it with --trust-remote-code, if you know it.")
        config = load_yaml(path, resolve_func=trust_code)
    except InputError:
        raise
    except Exception as error:  # whatever a YAML parser, an included file or a function's module raises
        raise InputError(f"{path}: not a task of lm-eval ({_line(error)}); expected a YAML file with keys.") from error
    if "group" in config and not isinstance(config.get("task"), str):
        raise InputError(f"{path} is a group of tasks: give the YAML files of its tasks.")
    if not isinstance(config.get("task"), str):
        raise InputError(f"{path} has no key `task`, the task's name; expected a task of lm-eval.")
    source, options = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    if source not in LOCAL:
        raise InputError(
            f"{path}: dataset_path is {source!r}, which isn't local; expected {', '.join(LOCAL)}, with data_files in "
            "dataset_kwargs."
        )
    options["data_files"] = _absolute(options.get("data_files"), path)
    return config | {"dataset_kwargs": options}


def _absolute(files: Any, path: Path) -> Any:
    """The data files of a task, relative to its YAML file before, absolute afterwards."""
    if isinstance(files, Mapping):
        return {split: _absolute(one, path) for split, one in files.items()}
    if isinstance(files, list):
        return [_absolute(one, path) for one in files]
    if not isinstance(files, str) or "://" in files:
        raise InputError(f"{path}: data_files is {files!r}; expected the names of local files.")
    found = (path.parent / files).absolute()
    if not found.is_file():
        raise InputError(f"{path}: its data file {files} isn't there: {found} is no file.")
    return str(found)


def _tasks(manager: Any, configs: Mapping[Path, dict[str, Any]], limit: int | None) -> dict[str, Any]:
    """lm-eval's tasks by name, with their requests made. InputError says what is wrong with one."""
    tasks: dict[str, Any] = {}
    for path, config in configs.items():
        if config["task"] in tasks:
            raise InputError(f"{path}: another task is called {config['task']!r}, too; give each a name of its own.")
        try:
            (task,) = manager.load([copy.deepcopy(config)])["tasks"].values()
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
        except Exception as error:  # lm-eval has no errors of its own
            raise InputError(f"{path}: lm-eval can't use the task: {_line(error)}") from error
        tasks[config["task"]] = task
    return tasks


def _measured(model: Model, tasks: dict[str, Any], limit: int | None, batch_size: int) -> Any:
    """lm-eval's results of all tasks, with samples."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        wrap: Any = HFLM
        wrapped = wrap(
            pretrained=model.module,
            tokenizer=copy.deepcopy(model.tokenizer),  # lm-eval may give it a padding token
            batch_size=batch_size,
            max_length=model.max_length,
        )
        return evaluate(wrapped, {"tasks": tasks, "groups": {}, "group_map": {}}, limit=limit)
    except (InputError, RunError):
        raise
    except Exception as error:
        raise RunError(f"lm-eval broke off: {_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No network, and no bars and notes of lm-eval and its data sets."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with _offline(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face's libraries don't use the network, though they were imported without being told so."""
    places: list[Any] = [import_module(name) for name in ("huggingface_hub.constants", "datasets.config")]
    earlier = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, earlier, strict=True):
            place.HF_HUB_OFFLINE = value


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- the table ---------------------------------------------------------------------------------------------------------


def _rows(found: dict[str, Any], n_resamples: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the table from lm-eval's results by condition."""
    controls = [name for name in found if name.startswith(RANDOM)]
    rows = []
    for task, measured in found[PLAIN]["results"].items():
        n_items = found[PLAIN]["n-samples"][task]["effective"]
        for key in measured:
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            values = {name: float(results["results"][task][key]) for name, results in found.items()}
            errors = {
                name: _number(results["results"][task].get(f"{metric}_stderr,{chosen}"))
                for name, results in found.items()
            }
            items = {name: _items(results["samples"][task], metric, chosen) for name, results in found.items()}
            paired = all(len(each) and np.isclose(each.mean(), values[name]) for name, each in items.items())
            if controls:
                values[RANDOM], errors[RANDOM] = float(np.mean([values[name] for name in controls])), np.nan
                items[RANDOM] = np.mean([items[name] for name in controls], axis=0) if paired else np.empty(0)
            higher = found[PLAIN]["higher_is_better"][task].get(metric, True)
            sign = 1 if higher else -1
            worse = sum(sign * values[name] <= sign * values[STEERED] for name in controls)
            for name in (PLAIN, STEERED, *([RANDOM] if controls else []), *controls):
                row: dict[str, Any] = {"condition": name, "task": task, "metric": metric, "filter": chosen}
                row |= {"value": values[name], "stderr": errors[name]}
                for column, other in (("delta", PLAIN), ("versus_random", RANDOM)):
                    known = other in values and (column == "delta" or name == STEERED)
                    ends = _ends(items[name] - items[other], n_resamples, seed) if known and paired else (np.nan,) * 2
                    row |= {
                        column: values[name] - values[other] if known else np.nan,
                        f"{column}_low": ends[0],
                        f"{column}_high": ends[1],
                    }
                row |= {"n_random": len(controls), "n_random_worse": worse if name == STEERED else None}
                rows.append(row | {"n_items": n_items})
    return rows


def _number(found: Any) -> float:
    """lm-eval writes "N/A" where it has no standard error."""
    return float(found) if isinstance(found, int | float) else np.nan


def _items(samples: list[dict[str, Any]], metric: str, chosen: str) -> np.ndarray:
    """float64 (n_items,): the metric of each item; empty where it isn't a number."""
    values = [one.get(metric) for one in samples if one["filter"] == chosen]
    return np.array(values, float) if all(isinstance(one, int | float) for one in values) else np.empty(0)


def _ends(differences: np.ndarray, n_resamples: int, seed: int) -> tuple[float, float]:
    """Ends of the 95% interval of the mean of differences by item."""
    if len(differences) < 2 or not n_resamples:
        return np.nan, np.nan
    drawn = np.concatenate(list(draws(len(differences), n_resamples, seed)))
    low, high = interval(drawn.astype(np.float64) @ differences / len(differences))
    return float(low), float(high)


# -- what is shown -----------------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The table without the single draws."""
    rows = frame[~frame["condition"].str.startswith(f"{RANDOM} ")]
    return rows.drop(columns=["n_random", "n_random_worse"]).dropna(axis="columns", how="all")


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a task and metric, a dot a condition, with lm-eval's 95% interval (1.96 standard errors)."""
    parts = list(frame.groupby(["task", "metric", "filter"], sort=False))
    titles = [figures.plain(f"{task}: {metric}") for (task, metric, _), _ in parts]
    n_rows = frame["condition"].nunique()
    result = figures.panels(titles, height=60 + 26 * n_rows)
    for panel, (_, part) in enumerate(parts):
        part = part.iloc[::-1]
        half = 1.96 * part["stderr"]
        figures.dots(
            result, part["value"], list(part["condition"]), part["value"] - half, part["value"] + half, panel=panel
        )
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """What steering does to each metric, and whether random experts do as much, in sentences."""
    controlled, sentences = bool(frame["n_random"].iloc[0]), []
    for (task, metric, chosen), part in frame.groupby(["task", "metric", "filter"], sort=False):
        rows = part.set_index("condition")
        steered, before = rows.loc[STEERED], rows.loc[PLAIN, "value"]
        of = f"{task}, {metric}" + ("" if chosen == "none" else f" ({chosen})")
        said = f"{of}: {before:.3f} plain, {steered['value']:.3f} steered, on {steered['n_items']:,} items"
        said += f"; {steered['delta']:+.3f} {_interval(steered, 'delta')}"
        if controlled:
            said += (
                f", {steered['versus_random']:+.3f} {_interval(steered, 'versus_random')} against random experts "
                f"({steered['n_random_worse']} of {steered['n_random']} draws are no better)"
            )
        sentences.append(said + ".")
    if not controlled:
        sentences.append("There is no control: no edit names experts that could be drawn at random, or none was asked.")
    return sentences


def _interval(row: Any, name: str) -> str:
    return f"[{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"
