"""The gate: does a new release replace the promoted one? Decided on the fixed held-out set, by the profile's [gate].

The fixed set is the held-out split of the data from which the first release of the profile was promoted. A document's
side depends on its content and data.seed alone, so no later release has trained on it while seed and share stay.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from magellano import ledger, lineage, registry
from magellano.artifacts import ArtifactRef, Store
from magellano.errors import InputError
from magellano.names import Decision, Objective, Stage
from magellano.profile import GateConfig, Profile
from magellano.progress import Progress
from magellano.registry import Entry, HeldOut, Shelf
from magellano.runs import Release

log = logging.getLogger(__name__)

MEASURES = ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens")
Numbers = dict[str, Any]


def check(profile: Profile) -> None:
    """InputError, before anything is trained, where the profile splits its data in another way than the fixed set, or
    trains for what the gate does not measure.
    """
    if profile.train.objective is Objective.DPO:
        raise InputError(
            f"profile {profile.name}: the gate judges by the loss of what is to be said, which train.objective "
            f'"{Objective.DPO}" need not lower; train it by magellano train, and magellano promote RUN puts it in force'
        )
    held_out = registry.read().shelf(profile.name).held_out
    if held_out is None:
        return
    now = split_of(profile)
    if odd := [f"data.{k} {now[k]!r}, then {v!r}" for k, v in held_out.split.items() if now.get(k) != v]:
        raise InputError(
            f"profile {profile.name}: its data are split otherwise than the fixed held-out set ({'; '.join(odd)}), so "
            f"that it could train on what it is judged by; set them back, or promote a release by hand: magellano "
            f"promote RUN takes that one's held-out split from then on"
        )


def split_of(profile: Profile) -> dict[str, Any]:
    """What decides which documents are held out, and into which tokens they go."""
    data = profile.data.model_dump(mode="json", include={"held_out", "seed", "format", "template", "render"})
    if profile.data.sources:
        data["format"] = [str(part.format) for part in profile.data.parts]
    return {**data, "vocab_size": profile.model.vocab_size}


def judge(
    store: Store, profile: Profile, release: ArtifactRef, evaluation: ArtifactRef, *, made: str, data: dict[str, str],
    run: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Measure a release against the promoted one and the base on the fixed held-out set, decide, and enter it in the
    registry. Returns decision, reason, numbers and margins. `made`: the fingerprint; `data`: the files' digests.
    """
    while True:
        shelf = registry.read().shelf(profile.name)
        held_out, numbers, promote, reason = _weigh(store, profile, release, evaluation, shelf, progress)
        same = shelf.current == release.key
        entry = Entry(
            release=release.key, digest=release.digest, run=run, decided=ledger.now(),
            decision=Decision.PROMOTED if promote else Decision.KEPT_ASIDE, reason=reason, made=made, numbers=numbers,
            lineage=lineage.of(store, release, profile, data),
        )  # fmt: skip
        with registry.changed() as book:
            now = book.shelf(profile.name)
            if now.current != shelf.current:
                continue  # another run came into force while this one was measured: measured against that one again
            if same:
                now.entries = [e for e in now.entries if e.release != entry.release] + [entry]
            else:
                now.held_out = held_out if promote else now.held_out
                now.judge(entry)
            break
    return {
        "decision": "in force already" if same else str(entry.decision),
        "reason": "the run made the very adapter that is in force" if same else reason,
        "release": release.key, "in_force": now.current, "numbers": numbers,
        "margins": profile.gate.model_dump(), "made": made,
    }  # fmt: skip


def _weigh(
    store: Store, profile: Profile, release: ArtifactRef, evaluation: ArtifactRef, shelf: Shelf, progress: Progress
) -> tuple[HeldOut, dict[str, Any], bool, str]:
    """The fixed set, the numbers on it, whether the release may be in force, and why."""
    tokens = lineage.inputs(store, release)["tokens"]
    held_out = shelf.held_out or HeldOut(ref=tokens, since=ledger.now(), split=split_of(profile))
    if shelf.current == release.key:
        there = shelf.entry(release.key) or _no_entry()
        return held_out, there.numbers, True, there.reason
    numbers = _measure(store, profile, release, evaluation, held_out, shelf, progress)
    return held_out, numbers, *decide(profile.gate, numbers["candidate"], numbers["promoted"], numbers["base"])


def promote(store: Store, release: Release, reason: str, progress: Progress) -> dict[str, Any]:
    """Put a release in force by hand. Its own held-out split is the fixed set from now on."""
    direct = lineage.inputs(store, (Stage.CHECKPOINT, release.folder.name))
    ref = store.find(Stage.CHECKPOINT, release.folder.name)
    if ref is None or "tokens" not in direct:
        raise InputError(f"{release.folder}: not a release in {store.home}; only those can be promoted")
    profile, tokens = release.profile, release.tokens
    scores = {
        "candidate": _score(profile, tokens, release.base, release.folder, progress, "new"),
        "base": _score(profile, tokens, release.base, None, progress, "base"),
    }
    entry = Entry(
        release=ref.key, digest=ref.digest, run=None, decided=ledger.now(), decision=Decision.PROMOTED, reason=reason,
        made="", numbers={who: _picked(n, MEASURES) for who, n in scores.items()} | {"held_out": direct["tokens"].key},
        lineage=lineage.of(store, ref, profile, {}),
    )  # fmt: skip
    with registry.changed() as book:
        shelf = book.shelf(profile.name)
        before = shelf.current
        shelf.held_out = HeldOut(ref=direct["tokens"], since=ledger.now(), split=split_of(profile))
        shelf.judge(entry)
    return {"profile": profile.name, "release": ref.key, "before": before, "registry": str(registry.path())}


def decide(gate: GateConfig, candidate: Numbers, promoted: Numbers | None, base: Numbers) -> tuple[bool, str]:
    """Whether the candidate replaces the promoted one (None: there is none yet), and why, in a line."""
    checks = [_gain("the base", gate.min_gain_on_base_percent, candidate["loss"], base["loss"])]
    if promoted is not None:
        checks.insert(0, _gain("the promoted adapter", gate.min_gain_percent, candidate["loss"], promoted["loss"]))
        drop = 100 * (promoted["accuracy"] - candidate["accuracy"])
        said = f"token accuracy {-drop:+.2f} points (may lose {gate.max_accuracy_drop:g})"
        checks.append((drop <= gate.max_accuracy_drop, said))
    failed = [said for passed, said in checks if not passed]
    return not failed, "; ".join(failed or [said for _, said in checks])


def table(found: dict[str, Any]) -> list[dict[str, str]]:
    """What `judge` returned, a row for each measure."""
    numbers = found["numbers"]
    who = [name for name in ("base", "promoted", "candidate") if numbers.get(name)]
    return [{"measure": m, **{name: f"{numbers[name][m]:,.6g}" for name in who if numbers[name][m] is not None}}
            for m in MEASURES]  # fmt: skip


def _gain(than: str, least: float, loss: float, other: float) -> tuple[bool, str]:
    percent = 100 * (1 - loss / other) if other else 0.0
    change = f"{abs(percent):.2f} % {'lower' if percent >= 0 else 'higher'} than {than}'s {other:.4f}"
    return percent > least, f"held-out loss {loss:.4f}, {change} (must be lower by more than {least:g} %)"


def _measure(
    store: Store, profile: Profile, release: ArtifactRef, evaluation: ArtifactRef, held_out: HeldOut, shelf: Shelf,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of candidate, promoted and base on the fixed set. What the evaluation has measured on it stays."""
    tokens = store.find(held_out.ref.stage, held_out.ref.key)
    if tokens is None or tokens.digest != held_out.ref.digest:
        raise InputError(
            f"{held_out.ref.stage}/{held_out.ref.key}: the fixed held-out set of {profile.name} is gone or another; "
            f"put it back, or promote a release by hand: magellano promote RUN takes that one's held-out split"
        )
    folder, numbers = store.path(tokens), {}
    direct = lineage.inputs(store, release)
    candidate, base = store.path(release), store.path(direct["base"])
    if direct["tokens"].digest == tokens.digest and profile.gate.max_tokens == profile.evaluate.max_tokens:
        measured = store.manifest(evaluation)["summary"]
        numbers = {"candidate": measured["fine_tuned"], "base": measured["base"]}
    else:
        numbers["candidate"] = _score(profile, folder, base, candidate, progress, "new")
        numbers["base"] = _score(profile, folder, base, None, progress, "base")
    numbers["promoted"] = None
    if shelf.current is not None:
        if store.find(Stage.CHECKPOINT, shelf.current) is None:
            log.warning("the promoted adapter %s is gone; its recorded numbers stand for it", shelf.current[:8])
            numbers["promoted"] = (shelf.entry(shelf.current) or _no_entry()).numbers["candidate"]
        else:
            there = Release.read(store.home / "artifacts" / Stage.CHECKPOINT / shelf.current)
            numbers["promoted"] = _score(profile, folder, there.base, there.folder, progress, "promoted")
    picked = {who: values and _picked(values, MEASURES) for who, values in numbers.items()}
    return {**picked, "held_out": held_out.ref.key}


def _score(
    profile: Profile, tokens: Path, base: Path, release: Path | None, progress: Progress, who: str
) -> Numbers:  # fmt: skip
    """Measures on the held-out split in `tokens`, of a release or of the bare base; one model in memory at a time."""
    from magellano import dpo, evaluate, loader
    from magellano.backend import mx
    from magellano.tokenizer import Tokenizer

    mx.clear_cache()
    compute = profile.train.compute
    model = loader.load_model(base, compute) if release is None else loader.load_release(release, base, compute)

    def told(done: int, total: int, **facts: float | str) -> None:
        progress(done, total, model=who, **facts)

    spelled = Tokenizer(profile.model.vocab_size).bytes_per_token()
    split = dpo.held_out_split(tokens)
    return evaluate.score(model, split, spelled, profile.evaluate.batch, profile.gate.max_tokens, told).to_dict()


def _picked(values: Numbers, names: Iterable[str]) -> Numbers:
    return {name: values[name] for name in names}


def _no_entry() -> Entry:
    raise InputError(f"{registry.path()}: the release in force has no entry; put a good copy in its place")
