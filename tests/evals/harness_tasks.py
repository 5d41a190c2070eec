"""lm-eval tasks of every output type, over the demo's data, that need nothing but local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[2] / "examples" / "demo"
PAIR = (DEMO / "pair" / "base", DEMO / "pair" / "instruct")
BATCH = 4
CASES: dict[str, tuple[list[str], int, bool]] = {
    "plain": (["t_choice", "t_likelihood", "t_rolling", "t_answer"], 0, False),
    "shots": (["t_choice", "t_likelihood", "t_answer"], 2, False),
    "chat": (["t_choice", "t_answer"], 0, True),
    "chat and shots": (["t_choice", "t_answer"], 2, True),
}
"""Tasks, shots, chat template."""

_COMMON = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{data}.jsonl, train: {folder}/{data}-pool.jsonl}}
test_split: test
fewshot_split: train
target_delimiter: ""
fewshot_delimiter: "\\n"
metadata: {{version: 1.0}}
"""
_TASKS = {
    "t_choice": (
        """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
process_docs: !function documents.upper
tag: t_tag
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
    ),
    "t_likelihood": (
        """
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
tag: t_tag
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
    ),
    "t_rolling": (
        """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
    ),
    "t_answer": (
        """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["]"], max_gen_toks: 9, do_sample: false}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: lower, filter: [{function: lowercase}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
    ),
}
_GROUP = """
group: t_group
task: [t_choice, t_likelihood]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""
_DOCUMENTS = """
def upper(documents):
    return documents.map(lambda row: {"prompt": row["prompt"].upper()})
"""


def write_tasks(folder: Path, count: int = 12) -> Path:
    """YAML and data files of the tasks below `folder`, `count` documents each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        json.loads(line)
        for line in (DEMO / "fewshot.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    pool = [row for row in rows if row.get("split") == "pool"]
    scored = [row for row in rows if row.get("split") != "pool"][::11][:count]
    requests = [
        json.loads(line)
        for line in (DEMO / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    likelihood = [{"prompt": "abc>c", "answer": "ba"}, {"prompt": "abc>cb", "answer": "d"}]
    documents: dict[str, list[dict[str, Any]]] = {
        "t_choice": [{key: row[key] for key in ("prompt", "answer", "choices")} for row in scored],
        # the last two share a row of the batch: equal but for the last token, and cut at different
        # places
        "t_likelihood": (
            [{"prompt": row["prompt"], "answer": row["answer"]} for row in scored[:5]] + likelihood
        ),
        "t_rolling": [
            {"text": " ".join(row["answer"] for row in rows[n : n + 9 * n + 1])} for n in (1, 3, 8)
        ],
        "t_answer": [
            {"prompt": row["prompt"].strip("[]"), "answer": row["answer"]}
            for row in requests[:: len(requests) // count][:count]
        ],
    }
    shown = {
        "t_choice": [{**row, "choices": [row["answer"], "x"]} for row in pool],
        "t_rolling": [{"text": "abc"}],
    }
    for name, data in documents.items():
        drawn = [{key: row[key] for key in data[0]} for row in shown.get(name, pool)]
        for file, written in ((f"{name}.jsonl", data), (f"{name}-pool.jsonl", drawn)):
            (folder / file).write_text(
                "".join(json.dumps(row) + "\n" for row in written), encoding="utf-8"
            )
    for name, task in _TASKS.items():
        text = _COMMON.format(name=name, folder=folder, data=name) + task
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "t_group.yaml").write_text(_GROUP, encoding="utf-8")
    (folder / "documents.py").write_text(_DOCUMENTS, encoding="utf-8")
    return folder
