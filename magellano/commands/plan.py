"""magellano plan PROFILE"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from magellano.profile import Profile

HELP = "memory by part and the time of a step, before anything is allocated"
CLAIMED = 2400  # tokens a second that have been claimed for a model such as production3b on an Apple M4


def arguments(parser: argparse.ArgumentParser) -> None:
    from magellano.commands.train import profile_arguments

    profile_arguments(parser)
    parser.add_argument(
        "--on",
        metavar="MACHINE",
        help="a known machine in place of this one, whose ceilings are measured: m4, h100, h200",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import roofline
    from magellano.profile import load_profile, parse_override

    profile = load_profile(args.profile, dict(map(parse_override, args.set)))
    machine = roofline.machine_named(args.on) if args.on else roofline.measured()
    facts = plan_facts(profile, machine.gpu, machine.memory)
    return {**facts, **_step_facts(profile, machine, facts["limit_bytes"] or machine.memory)}


def plan_facts(profile: "Profile", gpu: bool | None = None, memory: int | None = None) -> dict[str, Any]:
    """The plan of `profile` on a machine with so many bytes of memory, by default this one."""
    from magellano import backend, plan

    gpu = backend.on_gpu() if gpu is None else gpu
    p = plan.fine_tune(profile, gpu)
    return {
        "profile": profile.name,
        "parameters": p.parameters,
        "trainable": p.trainable,
        "trainable_share": p.share,
        "moment": p.moment,
        "memory_bytes": p.memory,
        "memory_total_bytes": p.total,
        "moments_bytes": p.moments,
        "machine_memory_bytes": memory or backend.device_memory(),
        "limit_bytes": int(profile.memory.limit_gib * plan.GIB) or None,
        "tokens_per_step": p.tokens_per_step,
        "flops_per_step": p.flops_per_step,
    }


def _step_facts(profile: "Profile", machine: Any, memory: int | None) -> dict[str, Any]:
    from magellano import plan, roofline

    step = roofline.step(profile, machine)
    return {
        "on": {
            "machine": machine.name,
            "source": machine.source,
            "matmul_tflop_s": machine.matmul / 1e12,
            "bandwidth_gb_s": machine.bandwidth / 1e9,
            "scan_g_s": machine.scan / 1e9,
            "launch_us": machine.launch * 1e6,
        },
        "step_parts_s": step.parts,
        "step_s": step.seconds,
        "tokens_per_s": profile.train.accumulate * profile.train.batch * profile.data.seq_len / step.seconds,
        "seq_len": profile.data.seq_len,
        "largest": plan.largest(profile, machine.gpu, memory) if memory else None,
        "claimed_tokens_per_s": CLAIMED,
        "claimed_needs_tflop_s": roofline.matmul_rate_for(profile, CLAIMED) / 1e12,
    }


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    total = facts["memory_total_bytes"]
    rows = [(part, report.size(n), f"{n / total:.1%}") for part, n in facts["memory_bytes"].items() if n]
    rows.append(("together, about", report.size(total), "100.0%"))
    report.Table(f"Memory of train {facts['profile']}", ("part", "size", "share"), tuple(rows)).show(console)
    console.print(
        f"at its largest moment, {facts['moment']}\n"
        f"parameters {facts['parameters']:,}; trainable {facts['trainable']:,} ({facts['trainable_share']:.2%})\n"
        f"one step: {facts['tokens_per_step']:,} tokens, {facts['flops_per_step'] / 1e12:,.3f} TFLOP"
    )
    limit = facts["limit_bytes"] or facts["machine_memory_bytes"]
    if limit and total > limit:
        console.print(f"[bold]does not fit:[/bold] {report.size(limit)} may be used; lower train.batch or data.seq_len")
    if "on" in facts:
        _show_step(facts, console)


def _show_step(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    on = facts["on"]
    rows = [(part, f"{1e3 * seconds:,.1f} ms") for part, seconds in facts["step_parts_s"].items()]
    rows.append(("together, as they overlap", f"{1e3 * facts['step_s']:,.1f} ms"))
    report.Table(f"Time of a step on {on['machine']}", ("part", "time"), tuple(rows)).show(console)
    console.print(
        f"about {facts['tokens_per_s']:,.0f} tokens/s; ceilings: products {on['matmul_tflop_s']:,.3g} TFLOP/s, "
        f"{on['bandwidth_gb_s']:,.0f} GB/s, {on['launch_us']:,.3g} us a launch\n({on['source']})"
    )
    if facts["largest"]:
        batch, length = facts["largest"]["batch"], facts["largest"]["seq_len"]
        fits = f"batch {batch:,} x {facts['seq_len']:,} tokens" if batch else f"no batch of {facts['seq_len']:,} tokens"
        console.print(f"fits at most: {fits}; batch 1 x {length:,} tokens")
    needed, claimed = facts["claimed_needs_tflop_s"], facts["claimed_tokens_per_s"]
    if needed > on["matmul_tflop_s"]:
        times = needed / on["matmul_tflop_s"]
        console.print(f"{claimed:,} tokens/s would need about {needed:,.3g} TFLOP/s, {times:,.1f} times what there is")
