"""Total cost of ownership: the machine that was bought against instances that are rented, over the same work.

    machine    price * years/its years + other * years + kWh price * (watts * training hours + idle watts * other hours)
    instance   price an hour * training hours * hours ratio + storage a month * months

Not in it: anybody's time, taxes on the cloud, what the machine is worth at the end, moving data out.
"""

from typing import Any

from magellano.prices import HOURS_PER_YEAR, Instance, Machine, Prices


def compare(prices: Prices, years: float, hours_per_day: float) -> dict[str, Any]:
    """Each option with fixed, running and total cost, its formula with the numbers in it, its ratio to the machine's
    total, and the training hours a day from which on the machine is cheaper (None: it never is).
    """
    training = 365 * years * hours_per_day
    own = _machine(prices.machine, prices.kwh, years, training)
    options = [own]
    for instance in prices.instance:
        option = _instance(instance, years, training)
        ratio = option["total"] / own["total"] if own["total"] else None
        options.append({**option, "ratio": ratio, "even_hours": _even(prices, instance, years)})
    return {"currency": prices.currency, "years": years, "hours_per_day": hours_per_day, "options": options}


def _machine(m: Machine, kwh: float, years: float, training: float) -> dict[str, Any]:
    idle = years * HOURS_PER_YEAR - training
    fixed = m.price * years / m.years + m.other_per_year * years
    running = kwh * (m.watts * training + m.idle_watts * idle) / 1000
    total = fixed + running
    formula = (
        f"{m.price:,.0f} * {years:g}/{m.years:g} + {m.other_per_year:g} * {years:g} "
        f"+ {kwh:g} * ({m.watts:g} W * {training:,.0f} h + {m.idle_watts:g} W * {idle:,.0f} h) / 1000 = {total:,.0f}"
        f"{_source(m)}"
    )
    facts = {"fixed": fixed, "running": running, "total": total, "formula": formula}
    return {"name": m.name, **facts, "ratio": None, "even_hours": None}


def _instance(i: Instance, years: float, training: float) -> dict[str, Any]:
    fixed, running = 12 * years * i.storage_per_month, i.per_hour * i.hours_ratio * training
    formula = (
        f"{i.per_hour:g} * {training:,.0f} h * {i.hours_ratio:g} + {i.storage_per_month:g} * {12 * years:g} "
        f"= {fixed + running:,.0f}{_source(i)}"
    )
    return {"name": i.name, "fixed": fixed, "running": running, "total": fixed + running, "formula": formula}


def _even(prices: Prices, instance: Instance, years: float) -> float | None:
    """Hours a day at which both cost the same: both are linear in them."""

    def more(hours: float) -> float:
        """By how much the instance costs more at so many hours a day."""
        training = 365 * years * hours
        own = _machine(prices.machine, prices.kwh, years, training)
        return float(_instance(instance, years, training)["total"] - own["total"])

    at = more(0.0), more(24.0)
    if at[0] >= 0:
        return 0.0
    return 24.0 * -at[0] / (at[1] - at[0]) if at[1] > 0 else None


def _source(priced: Machine | Instance) -> str:
    return f"   ({priced.source})" if priced.source else "   (no source)"
