"""Our models under lm-eval's model interface, its tasks from local files, and base against fine-tuned in its measures.

Only `magellano evaluate --tasks` imports this: it needs lm_eval, of the extra `exchange`. Nothing is downloaded.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from magellano import completion, evaluate, generate
from magellano.data import hub
from magellano.errors import InputError
from magellano.model import MagellanoLM
from magellano.progress import Progress
from magellano.sampling import Sampling
from magellano.tokenizer import Tokenizer

MAX_TOKENS = 256  # of a generated answer, where the task does not say
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Tasks(TaskManager):
    """The tasks `names` of the YAML files below `folder`, or lm-eval's own without one, whose data must be here."""

    def __init__(self, names: Sequence[str], folder: Path | None):
        """Raises InputError where a task is not there or cannot be loaded."""
        hub.no_network()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if folder is not None and not folder.is_dir():
            raise InputError(f"--tasks-from {folder}: no such folder; give the one with the tasks' YAML files")
        super().__init__(include_path=folder and str(folder), include_defaults=folder is None)
        self.names, where = list(names), f"in {folder}" if folder else "in lm-eval; give yours with --tasks-from FOLDER"
        for name in names:
            if name not in self.all_tasks:
                known = f"; there are {', '.join(self.all_tasks[:20]) or 'none'}" if folder else ""
                raise InputError(f"--tasks {name}: no such task {where}{known}")
        self.load(self.names)

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
            reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise InputError(
                f"--tasks {', '.join(self.names)}: cannot be loaded ({reason}); nothing is downloaded, so a task's "
                "data must be files on this machine, as dataset_kwargs.data_files names them"
            ) from None


class Adapter(LM):
    """A model as lm-eval calls it. A text starts with end-of-text, as a document does in training; there is no limit to
    its length.
    """

    def __init__(self, model: MagellanoLM, tokenizer: Tokenizer, batch: int, progress: Progress, name: str):
        super().__init__()
        self.model, self.texts, self.batch, self.name = model, tokenizer, batch, name
        self._progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args) for request in requests]
        return self._scores([a + b for a, b in pairs], [len(b) for _, b in pairs])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        rows = [[self.texts.end_of_text, *self.texts.encode(request.args[0])] for request in requests]
        return [total for total, _ in self._scores(rows, [len(row) - 1 for row in rows])]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        made, alike = [""] * len(requests), {}  # type: tuple[list[str], dict[str, list[int]]]
        for n, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        done = 0
        for settings, numbers in alike.items():
            stops, most, sampling = generation(json.loads(settings))
            for first in range(0, len(numbers), self.batch):
                group = numbers[first : first + self.batch]
                prompts = [self.texts.encode(requests[n].args[0]) for n in group]
                contexts = [generate.begin(self.model, self.texts.end_of_text, prompt) for prompt in prompts]
                texts = completion.complete(self.model, self.texts, contexts, most, sampling, stops, group[0])
                for n, one in zip(group, texts, strict=True):
                    made[n] = one.text
                done += len(group)
                self.heard(done, len(requests))
        return made

    def _scores(self, rows: list[list[int]], counted: list[int]) -> list[tuple[float, bool]]:
        return evaluate.log_likelihoods(self.model, rows, counted, self.batch, self.heard)

    def heard(self, done: int, total: int, **facts: float | str) -> None:
        self._progress(done, total, model=self.name, of="requests", **facts)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, split as lm-eval splits them for others: blanks at the context's end go to what follows,
        and what follows is what encoding both together has beyond the context alone.
        """
        bare = context.rstrip()
        start = self.texts.encode(bare)
        whole = self.texts.encode(bare + context[len(bare) :] + continuation)
        return [self.texts.end_of_text, *start], whole[len(start) :]


def generation(settings: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop strings, the most tokens and the sampling that a task's generation_kwargs ask for. InputError for others."""
    left = dict(settings)
    until, most, draws = left.pop("until", None), left.pop("max_gen_toks", MAX_TOKENS), left.pop("do_sample", False)
    how = {key: left.pop(key) for key in SAMPLING if key in left}
    if left:
        known = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
        raise InputError(f"generation_kwargs: {', '.join(sorted(left))}: not known here; known are {known}")
    how["temperature"] = how.get("temperature", 1.0) if draws else 0.0
    return [until] if isinstance(until, str) else list(until or []), most, Sampling(**how)


def run(lm: Adapter, tasks: Tasks, out: Path, limit: int | None, shots: int | None) -> dict[str, Any]:
    """Its results as lm-eval returns them, samples with them, and written below out, in its own format."""
    tracker = EvaluationTracker(output_path=str(out))
    results: dict[str, Any] = simple_evaluate(
        lm, model_args={"model": lm.name}, tasks=tasks.names, task_manager=tasks, batch_size=lm.batch, limit=limit,
        num_fewshot=shots, evaluation_tracker=tracker,
    )  # fmt: skip
    samples = results["samples"]
    tracker.save_results_aggregated(results={k: v for k, v in results.items() if k != "samples"}, samples=samples)
    written = out / lm.name / f"results_{getattr(tracker, 'date_id', None)}.json"
    if not written.is_file():  # it logs what went wrong and goes on
        raise OSError(f"{written.parent}: lm-eval could not write its results there")
    for task, each in samples.items():
        tracker.save_results_samples(task, [dict(sample) for sample in each])
    return {**results, "file": str(written)}


def compare(base: dict[str, Any], tuned: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each measure of each task: both values with their standard errors as lm-eval gives them, and the
    change's, which is that of the mean of the samples' own changes, where a measure is such a mean.
    """
    rows = []
    for task, values in tuned["results"].items():
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            before, error = base["results"][task], f"{metric}_stderr,{kept}"
            samples = base["samples"].get(task, []), tuned["samples"].get(task, [])
            rows.append({
                "task": task, "metric": metric, "filter": kept,
                "higher_is_better": tuned.get("higher_is_better", {}).get(task, {}).get(metric),
                "samples": tuned.get("n-samples", {}).get(task, {}).get("effective"),
                "base": _number(before[key]), "base_stderr": _number(before.get(error)),
                "fine_tuned": _number(value), "fine_tuned_stderr": _number(values.get(error)),
                "change_stderr": _paired(*samples, metric, kept, value),
            })  # fmt: skip
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, float | int) and math.isfinite(value) else None


def _paired(
    base: list[dict[str, Any]], tuned: list[dict[str, Any]], metric: str, kept: str, mean: float
) -> float | None:
    both = [{s["doc_id"]: s.get(metric) for s in each if s["filter"] == kept} for each in (base, tuned)]
    if len(both[1]) < 2 or not all(isinstance(v, float | int) for each in both for v in each.values()):
        return None
    first, second = (np.array([each[n] for n in both[1]], dtype=float) for each in both)
    if not math.isclose(second.mean(), mean, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return float((second - first).std(ddof=1) / math.sqrt(len(first)))
