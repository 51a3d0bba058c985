"""Data sets of the Hugging Face hub, by the `datasets` package: the one case in which a profile opens the network."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from magellano.errors import InputError
from magellano.profile import DataConfig

log = logging.getLogger(__name__)


def network() -> Any:
    """The `datasets` package with the hub allowed: an earlier import may have read otherwise from the environment."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = False
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as errors reaches the user as InputError
    return datasets


def no_network() -> None:
    """Forbids the hub to `datasets`, also where an earlier import has read otherwise from the environment."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextmanager
def _errors(name: str) -> Iterator[Any]:
    """`datasets` with the hub allowed, and what can go wrong there as InputError."""
    if any(
        os.environ.get(key, "0").lower() in ("1", "true", "yes", "on")
        for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        raise InputError(f"hub data set {name!r}: HF_HUB_OFFLINE forbids the network; unset it or give data.files")
    datasets = network()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield datasets
    except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"hub data set {name!r}: cannot be read ({reason}); check name, split and network") from None


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
