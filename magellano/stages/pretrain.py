"""pretrain: tokens -> a dense base folder, trained in full from its seeded initial weights."""

from pathlib import Path
from typing import Any

from magellano import loader, tensorboard
from magellano.backend import compute_dtype
from magellano.model import MagellanoLM, seeded
from magellano.names import METRICS
from magellano.profile import Profile
from magellano.progress import Progress
from magellano.tokenizer import Tokenizer
from magellano.trainer import Trainer, run_to_end


def run(out: Path, profile: Profile, tokens: Path, work: Path, progress: Progress) -> dict[str, Any]:
    """Train all parameters by [pretrain.train] and [loss]; resumes from `work`. Raises Stopped on a signal, the state
    saved.
    """
    assert profile.pretrain is not None
    config = profile.pretrain.train
    model = MagellanoLM(profile.model, seeded(profile.base.seed), compute_dtype(config.compute))
    trainer = Trainer(model, config, tokens, profile.loss, profile.memory.limit_gib)
    facts = run_to_end(trainer, work, progress, tensorboard.mirror(profile, work))
    loader.write_model(out, profile.model, loader.dense_tensors(model), quantized=False)
    Tokenizer(profile.model.vocab_size).save(out)
    (out / METRICS).write_bytes((work / METRICS).read_bytes())
    return facts
