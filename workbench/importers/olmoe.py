"""Routing dumps of OLMoE's analysis script: JSON lines.

Source: allenai/OLMoE, scripts/run_moe_analysis.py (`run`), commit 357454f; its files are published as
huggingface.co/datasets/allenai/analysis_olmoe and analysis_mixtral. Each line is one context of n tokens:

    {"input_ids": [n], "predicted_token_ids": [n], "exp_ids": [n][k][L]}

exp_ids are in falling order of the router logits; predicted_token_ids are the likeliest next tokens. The script cuts
the texts of C4 into contexts of 2,048 tokens, so a context can hold several texts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from workbench.errors import InputError
from workbench.importers.documents import lines
from workbench.importers.text import Text, integers, token_ids


def texts(files: Sequence[Path]) -> Iterator[Text]:
    """One text a line, as it is read. InputError for a line that isn't as described."""
    for path in files:
        for where, line in lines(path):
            if missing := [name for name in ("input_ids", "exp_ids") if name not in line]:
                raise InputError(f"{where}: no {' and no '.join(missing)}; expected input_ids and exp_ids, as OLMoE's "
                                 "run_moe_analysis.py writes them.")  # fmt: skip
            experts = integers(where, "exp_ids", line["exp_ids"], 3).transpose(0, 2, 1)
            n = len(experts)
            predicted = line.get("predicted_token_ids")
            yield Text(
                where,
                experts,
                token_ids=token_ids(f"{where}: input_ids", line["input_ids"], n),
                predictions=None if predicted is None else token_ids(f"{where}: predicted_token_ids", predicted, n),
                fields={"source": path.name},
            )
