"""prices.toml: what a kilowatt-hour, this machine and cloud instances cost. The owner's file comes first."""

import tomllib
from pathlib import Path

from pydantic import Field, ValidationError

from magellano import files
from magellano.artifacts import home
from magellano.errors import InputError
from magellano.profile import NonNegative, Section

NAME = "prices.toml"
OURS = Path(__file__).with_name(NAME)
HOURS_PER_YEAR = 24 * 365.0


class Machine(Section):
    """The machine that was bought. `years` and `price` give what an hour of it costs, used or not."""

    name: str
    price: NonNegative
    years: float = Field(gt=0)
    watts: NonNegative
    idle_watts: NonNegative = 0.0
    other_per_year: NonNegative = 0.0
    source: str = ""

    @property
    def per_hour(self) -> float:
        """Price over all the hours of its years."""
        return self.price / (self.years * HOURS_PER_YEAR)


class Instance(Section):
    """A rented one. `hours_ratio`: its hours for the work of one hour of the machine."""

    name: str
    per_hour: NonNegative
    hours_ratio: float = Field(default=1.0, gt=0)
    storage_per_month: NonNegative = 0.0
    source: str = ""


class Prices(Section):
    """The whole file."""

    currency: str
    kwh: NonNegative
    machine: Machine
    instance: tuple[Instance, ...] = Field(default=(), strict=False)


def found() -> Path:
    """The owner's file in the home, else the one shipped."""
    return home() / NAME if (home() / NAME).is_file() else OURS


def load(path: Path | None = None) -> Prices:
    """The prices in `path`, by default in the file that is `found`. InputError for what is no such file."""
    path = path or found()
    try:
        return Prices.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give a prices file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not valid TOML: {e}; correct it") from None
    except ValidationError as e:
        raise InputError(f"{path}: {files.told(e)}; see {OURS.name} of the package") from None
