"""Make a task of multiple choice for `workbench evaluate --tasks`: which of four endings continues a text.

    python data/continuations.py --corpus libreoffice-help --lang de --out tasks
    workbench evaluate demo --tasks tasks/libreoffice-help-de.yaml --recipe recipe.json

A text of the corpus is cut at the space nearest to its middle. The true ending is how it goes on; the others are the
endings of three other texts in the same language, drawn at random, all cut to the same number of characters.
"""

import argparse
import json
import random
from pathlib import Path

from workbench.corpus import read

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
SHORTEST, LONGEST, ENDING = 60, 400, 40
"""Characters of a text, at least and at most, and of an ending, at most."""


def items(texts: list[str], seed: int) -> list[dict]:
    """One item a text that can be cut: start, four endings, and which of them is the true one."""
    dice = random.Random(seed)
    halves = []
    for text in dict.fromkeys(texts):
        spaces = [place for place, character in enumerate(text) if character == " "]
        if SHORTEST <= len(text) <= LONGEST and spaces:
            middle = min(spaces, key=lambda place: abs(place - len(text) // 2))
            halves.append((text[:middle], text[middle + 1 :]))
    made = []
    for place, (start, ending) in enumerate(halves):
        others = dice.sample([other for at, (_, other) in enumerate(halves) if at != place], 3)
        shown = min(ENDING, *map(len, (ending, *others)))
        endings = [one[:shown] for one in (ending, *others)]
        if len(set(endings)) == 4:
            true = endings[0]
            dice.shuffle(endings)
            made.append({"start": start, "endings": endings, "answer": endings.index(true)})
    return made


def write(corpus: str, lang: str, out: Path, limit: int, seed: int) -> Path:
    """The YAML of the task; its data beside it."""
    texts = [row.text for row in read(corpus) if row.lang == lang and row.text is not None]
    made = items(texts, seed)
    if len(made) < 4:
        raise SystemExit(f"{corpus} has too few texts in {lang!r} of {SHORTEST} to {LONGEST} characters with a space.")
    random.Random(seed).shuffle(made)
    out.mkdir(parents=True, exist_ok=True)
    name = f"{Path(corpus).stem}-{lang}"
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in made[:limit])
    (out / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
    (out / f"{name}.yaml").write_text(TASK.format(name=name), encoding="utf-8")
    return out / f"{name}.yaml"


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--corpus", default="libreoffice-help")
    options.add_argument("--lang", default="en")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--limit", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    print(write(given.corpus, given.lang, given.out, given.limit, given.seed))
