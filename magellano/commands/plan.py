"""magellano plan PROFILE"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from magellano.profile import Profile

HELP = "what a fine-tune will need, by part, before anything is allocated"


def arguments(parser: argparse.ArgumentParser) -> None:
    from magellano.commands.train import profile_arguments

    profile_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano.profile import load_profile, parse_override

    return plan_facts(load_profile(args.profile, dict(map(parse_override, args.set))))


def plan_facts(profile: "Profile") -> dict[str, Any]:
    """The plan of `profile` on this machine, beside the memory that there is."""
    from magellano import backend, info, plan

    p = plan.fine_tune(profile, wide_compute=not backend.on_gpu())
    return {
        "profile": profile.name,
        "parameters": p.parameters,
        "trainable": p.trainable,
        "trainable_share": p.share,
        "memory_bytes": p.memory,
        "memory_total_bytes": p.total,
        "machine_memory_bytes": info.memory_bytes(),
        "limit_bytes": int(profile.memory.limit_gib * (1 << 30)) or None,
        "tokens_per_step": p.tokens_per_step,
        "flops_per_step": p.flops_per_step,
    }


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    rows = [
        (part, report.size(n), f"{n / facts['memory_total_bytes']:.1%}") for part, n in facts["memory_bytes"].items()
    ]
    rows.append(("together, about", report.size(facts["memory_total_bytes"]), "100.0%"))
    report.Table(f"Memory of train {facts['profile']}", ("part", "size", "share"), tuple(rows)).show(console)
    console.print(
        f"parameters {facts['parameters']:,}; trainable {facts['trainable']:,} ({facts['trainable_share']:.2%})\n"
        f"one step: {facts['tokens_per_step']:,} tokens, {facts['flops_per_step'] / 1e12:,.3f} TFLOP"
    )
    limit = facts["limit_bytes"] or facts["machine_memory_bytes"]
    if limit and facts["memory_total_bytes"] > limit:
        console.print(f"[bold]does not fit:[/bold] {report.size(limit)} may be used; lower train.batch or data.seq_len")
