"""evaluate: release, held-out split, base -> measures of both models, samples, pictures, verdict."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from magellano import dpo, experts, loader, preference, report
from magellano.backend import mx
from magellano.data.shards import Shards
from magellano.evaluate import Example, Scores, Verdict, examples, score
from magellano.generate import Sampling, generate
from magellano.model import MagellanoLM
from magellano.names import METRICS, Stage
from magellano.profile import Profile
from magellano.progress import Progress
from magellano.runs import input_folder
from magellano.tokenizer import Tokenizer


def run(out: Path, profile: Profile, release: Path, tokens: Path, base: Path, progress: Progress) -> dict[str, Any]:
    """Write evaluation.json, evaluation.md, loss.png and experts.png; returns measures and verdict.

    One model is in memory at a time. InputError where the held-out split has no target that counts.
    """
    split, tokenizer = dpo.held_out_split(tokens), Tokenizer.load(base)
    preferred = _Preferred(profile, tokens)
    chosen = examples(split, tokenizer.end_of_text, profile.evaluate.samples)
    half = _Halves(progress)
    compute = profile.train.compute
    model = loader.load_model(base, compute)
    base_scores, base_texts = _measure(model, profile, split, tokenizer, chosen, half.first)
    preferred.look(model)
    del model
    mx.clear_cache()
    model = loader.load_release(release, base, compute)
    tuned_scores, tuned_texts = _measure(model, profile, split, tokenizer, chosen, half.second)
    preferred.look(model)
    verdict, pairs = Verdict.of(base_scores, tuned_scores), preferred.found()
    evaluation: dict[str, Any] = {
        "profile": profile.name,
        "base": base_scores.to_dict(),
        "fine_tuned": tuned_scores.to_dict(),
        "verdict": {
            "improved": verdict.improved if pairs is None else pairs.improved,
            "loss_percent": verdict.loss_percent,
            "perplexity_percent": verdict.perplexity_percent,
            "text": str(pairs or verdict),
        },
        "samples": [
            {"prompt": tokenizer.decode(e.prompt), "truth": tokenizer.decode(e.completion), "base": b, "fine_tuned": t}
            for e, b, t in zip(chosen, base_texts, tuned_texts, strict=True)
        ],
    }
    if pairs is not None:
        evaluation["preference"] = {"beta": profile.train.dpo_beta, **asdict(pairs)}
    _write(out, evaluation, release, base, profile.model.top_k)
    return {key: value for key, value in evaluation.items() if key != "samples"}


def _measure(
    model: MagellanoLM,
    profile: Profile,
    split: Shards,
    tokenizer: Tokenizer,
    chosen: Sequence[Example],
    progress: Progress,
) -> tuple[Scores, list[str]]:
    """Scores on the held-out split and the text generated for each example."""
    config = profile.evaluate
    scores = score(model, split, tokenizer.bytes_per_token(), config.batch, config.max_tokens, progress)
    sampling = Sampling(temperature=config.temperature, seed=profile.train.seed)
    made = [generate(model, e.prompt, tokenizer.end_of_text, config.sample_tokens, sampling) for e in chosen]
    return scores, [tokenizer.decode(list(tokens)) for tokens in made]


class _Preferred:
    """What both models make of held-out pairs, where the run was about pairs."""

    def __init__(self, profile: Profile, tokens: Path):
        self._dpo, self._config, self._tokens = dpo.Dpo.of(profile.train), profile.evaluate, tokens
        self._log_p: list[np.ndarray] = []

    def look(self, model: MagellanoLM) -> None:
        """The base first."""
        if self._dpo is not None:
            split, c = Shards(self._tokens, "held_out"), self._config
            self._log_p.append(preference.log_p(model, split, c.batch, c.max_tokens))

    def found(self) -> preference.Preference | None:
        return None if self._dpo is None else preference.Preference.of(self._dpo, *self._log_p)


class _Halves:
    """Progress over two passes of the same length."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def first(self, done: int, total: int, **facts: float | str) -> None:
        self._progress(done, 2 * total, model="base", **facts)

    def second(self, done: int, total: int, **facts: float | str) -> None:
        self._progress(total + done, 2 * total, model="fine-tuned", **facts)


def _write(out: Path, evaluation: dict[str, Any], release: Path, base: Path, top_k: int) -> None:
    text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
    (out / report.EVALUATION_JSON).write_text(text + "\n", encoding="utf-8")
    runs = {"pretraining of the base": input_folder(base, Stage.PRETRAIN), "fine-tuning": release}
    curves = {name: report.read_metrics(folder / METRICS) for name, folder in runs.items() if folder}
    page, trained = report.evaluation_markdown(evaluation), curves.get("fine-tuning", [])
    if (pairs := preference.table(evaluation)).rows:
        page += f"\n{pairs.markdown()}"
    if experts.looks(trained):
        experts.picture(out / experts.LOAD_PNG, trained)
        page += f"\n{experts.table(trained, top_k).markdown()}\n![expert load over time]({experts.LOAD_PNG})\n"
    (out / report.EVALUATION_MD).write_text(page, encoding="utf-8")
    base_scores, tuned_scores = evaluation["base"], evaluation["fine_tuned"]
    if "preference" in evaluation:
        preference.picture(out / report.LOSS_PNG, trained)
    else:
        report.loss_picture(out / report.LOSS_PNG, curves, base_scores["loss"], tuned_scores["loss"])
    report.experts_picture(out / report.EXPERTS_PNG, base_scores["experts"], tuned_scores["experts"])
