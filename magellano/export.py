"""A model as a folder that another library runs. mlx-lm: config.json names a model file, which lies beside it."""

import json
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Any

from magellano import hf_tokenizer, layout, loader, merge, writing
from magellano.backend import mx
from magellano.data.template import Template
from magellano.errors import InputError
from magellano.model import MagellanoLM
from magellano.tokenizer import Tokenizer

MODEL_FILE = "magellano_model.py"
_SOURCE = Path(__file__).resolve().parent.parent / "exports" / "mlx_lm_model.py"
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class Format(StrEnum):
    """What `magellano export --to` writes."""

    MLX_LM = "mlx-lm"


def mlx_lm(
    folder: Path, model: MagellanoLM, tokenizer: Tokenizer, dtype: str, chat: bool, template: Template | None = None
) -> dict[str, Any]:
    """Write `model`, adapters merged, for mlx-lm into `folder`, which must be empty or missing; whole or not at all.

    `dtype`: of the weights, and so of what mlx-lm computes in; A_log, D, biases and the router stay float32. `chat`:
    with a chat template, `template` or ours. One shard is in memory at a time. InputError for a BlackMamba and for a
    folder with something in it.
    """
    if not model.config.of_its_own:
        raise InputError("--to mlx-lm: a BlackMamba's gated experts, sigmoid gates and LayerNorm are not known there")
    size = {"float32": 4}.get(dtype, 2) * layout.count(model.config)
    with writing.folder(folder, size) as own:
        written = loader.write_tensors(own, merge.tensors(model, DTYPES[dtype]))
        config = json.dumps(_config(model, tokenizer, dtype), indent=2)
        (own / loader.CONFIG).write_text(config + "\n", encoding="utf-8")
        shutil.copyfile(_SOURCE, own / MODEL_FILE)
        hf_tokenizer.save(own, tokenizer, chat, template)
    return {"folder": str(folder), "bytes": written, "dtype": dtype, "chat_template": chat}


def _config(model: MagellanoLM, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    end = tokenizer.end_of_text
    return {
        "architectures": ["MagellanoLM"],
        "model_type": "magellano",
        "model_file": MODEL_FILE,
        **model.config.model_dump(mode="json"),
        "tie_word_embeddings": model.config.tied,
        "torch_dtype": dtype,
        "bos_token_id": end,
        "eos_token_id": end,
    }
