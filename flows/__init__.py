"""Wiring only: which stage follows which. Importing `tasks` first settles Prefect's environment."""

import tasks

__all__ = ["tasks"]
