"""The stages as Prefect tasks: paths and small JSON in and out. The work itself is magellano.stages."""

from tasks import server, settings

settings.prepare()
server.end_with_us()
