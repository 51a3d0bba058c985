"""The `datasets` package with the network shut, and the hub for the one case where a profile opens it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from magellano.errors import InputError
from magellano.profile import DataConfig

log = logging.getLogger(__name__)


@contextmanager
def network(allowed: bool) -> Iterator[Any]:
    """The `datasets` package with the hub allowed or not: importing it and loading local files must ask no host."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    if not allowed:
        os.environ.update(dict.fromkeys(before, "1"))
    try:
        import datasets
        import huggingface_hub.constants
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    # The two read the environment once, at import: an earlier import may have decided otherwise.
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = not allowed
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as errors reaches the user as InputError
    yield datasets


@contextmanager
def _errors(name: str) -> Iterator[Any]:
    """`datasets` with the hub allowed, and what can go wrong there as InputError."""
    if any(
        os.environ.get(key, "0").lower() in ("1", "true", "yes", "on")
        for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        raise InputError(f"hub data set {name!r}: HF_HUB_OFFLINE forbids the network; unset it or give data.files")
    with network(allowed=True) as datasets:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            yield datasets
        except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise InputError(
                f"hub data set {name!r}: cannot be read ({reason}); check name, split and network"
            ) from None


def revision(name: str) -> str:
    """The commit of a data set on the hub now. Asks the hub; InputError where it does not answer with one."""
    with _errors(name):
        from huggingface_hub import HfApi

        log.warning("asking the Hugging Face hub for the data set %s: this uses the network", name)
        return str(HfApi().dataset_info(name).sha)


def rows(config: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of the profile's hub data set with their numbers, as a stream; InputError as above."""
    commit = revision(config.hub)
    with _errors(config.hub) as datasets:
        log.warning("reading %s at %s from the Hugging Face hub: this uses the network", config.hub, commit)
        yield from enumerate(datasets.load_dataset(config.hub, split=config.split, revision=commit, streaming=True), 1)
