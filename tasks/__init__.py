"""The stages as Prefect tasks: paths and small JSON in and out. The work itself is magellano.stages."""

from tasks import settings

settings.prepare()
