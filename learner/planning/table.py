"""A plan for people and for programs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from learner.planning.against import Comparison
from learner.planning.capacity import Plan
from learner.planning.memory import gib, longest_response


def phases(plan: Plan) -> dict[str, float]:
    """Seconds of each phase of a step."""
    return {
        "generation": plan.generation.seconds,
        "reward": plan.reward,
        "train": plan.training.seconds,
        "weight sync": plan.sync.seconds,
        "checkpoint": plan.checkpoint_due,
        "driver": plan.driver,
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures: bytes, seconds, tokens; shares are of a step."""
    setup, work, made = plan.setup, plan.work, plan.generation
    return {
        "hardware": setup.hardware.model_dump(),
        "assumptions": plan.assumptions.model_dump(),
        "setup": {
            "replicas": setup.replicas,
            "ranks": setup.ranks,
            "tensor_parallel": setup.tensor_parallel,
            "devices": setup.devices,
            "nodes": setup.nodes,
            "zero_stage": setup.config.learner.zero_stage,
            "offload": setup.offload,
            "transport": setup.transport,
            "max_staleness": setup.max_staleness,
            "in_flight": setup.in_flight,
            "parameters": setup.shape.parameters,
        },
        "memory_bytes": {
            "learner_rank": {
                **plan.learner.parts(),
                "total": plan.learner.total,
                "host": plan.learner.host,
            },
            "replica_device": plan.replica.parts(),
            "kv_cache_tokens": plan.replica.tokens,
            "full_length_responses": plan.replica.responses,
        },
        "tokens_per_step": {
            "generated": work.generated_tokens,
            "erased": work.erased_tokens,
            "committed": work.committed_tokens,
            "trained": work.trained_tokens,
        },
        "seconds_per_step": {**phases(plan), "step": plan.step_seconds},
        "generation": {
            "concurrency": made.concurrency,
            "limited_by": made.limited_by,
            "engine_step_seconds": made.engine_step.seconds,
            "decode": made.decode,
            "prefill": made.prefill,
            "after_sync": made.after_sync,
            "tail": made.tail,
        },
        "training": {
            "operations": plan.training.operations,
            "links": plan.training.links,
            "optimizer": plan.training.optimizer,
            "microbatches": plan.training.microbatches,
        },
        "weight_sync": {"bytes": plan.sync.bytes, "send": plan.sync.send, "load": plan.sync.load},
        "generated_tokens_per_second": plan.tokens_per_second,
        "busy_share": {name: seconds / plan.step_seconds for name, seconds in plan.busy.items()},
        "saturates_first": plan.first,
        "problems": plan.problems,
    }


def print_plan(plan: Plan, console: Console) -> None:
    for table in (_devices(plan), _memory(plan), _seconds(plan), _busy(plan)):
        console.print(table)
    console.print(f"saturates first: [bold]{plan.first}[/bold]")


def print_comparison(rows: Sequence[Comparison], console: Console) -> None:
    table = Table(title="planned and measured, medians", title_justify="left", title_style="bold", show_edge=False)
    for name in ("", "planned", "measured", "planned / measured"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        table.add_row(row.name, _number(row.planned), _number(row.measured), f"{row.ratio:.2f}")
    console.print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number == 1 else "left", overflow="fold")
    return table


def _devices(plan: Plan) -> Table:
    setup, work = plan.setup, plan.work
    table = _table(f"{setup.config.name} on {setup.hardware.name}", "a step", "", "")
    loop = "synchronous" if setup.is_synchronous else f"asynchronous, max_staleness {setup.max_staleness}"
    unit = "GPUs" if setup.on_gpu else "parts"
    table.add_row("parameters", f"{setup.shape.parameters:,}", setup.config.model.dtype)
    table.add_row(
        unit,
        f"{setup.devices:,}",
        f"{setup.replicas} replica(s) x {setup.tensor_parallel} + {setup.ranks} rank(s), {setup.nodes} node(s); {loop}",
    )
    table.add_row(
        "responses", f"{work.responses:,}", f"{work.prompt_tokens:,.0f} + {work.response_tokens:,.0f} tokens, the mean"
    )
    table.add_row("generated tokens", f"{work.generated_tokens:,.0f}", f"{work.erased_tokens:,.0f} of them erased")
    table.add_row("trained tokens", f"{work.trained_tokens:,.0f}", "prompts, responses and padding")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("memory", "part", "", "")
    table.add_row("learner rank", gib(plan.learner.total), f"ZeRO stage {plan.setup.config.learner.zero_stage}")
    for name, size in plan.learner.parts().items():
        note = "not at the same time as a micro-batch" if name == "optimizer step" else ""
        table.add_row(f"  {name}", gib(size), note)
    if plan.learner.host:
        table.add_row("  in the host's memory", gib(plan.learner.host), f"offload {plan.setup.offload}")
    table.add_row("replica, each GPU" if plan.setup.on_gpu else "replica", gib(sum(plan.replica.parts().values())), "")
    for name, size in plan.replica.parts().items():
        table.add_row(f"  {name}", gib(size), f"{plan.replica.tokens:,} tokens" if name == "KV cache" else "")
    table.add_row(
        "  responses at a time",
        f"{plan.replica.responses:,}",
        f"of the full {longest_response(plan.setup.config):,} tokens; max_concurrent_responses is "
        f"{plan.setup.config.rollout.engine.max_concurrent_responses:,}",
    )
    return table


def _seconds(plan: Plan) -> Table:
    made, trained = plan.generation, plan.training
    notes = {
        "generation": f"{made.concurrency:,} at a time (limit: {made.limited_by}), "
        f"{made.engine_step.seconds * 1e3:.1f} ms an engine step; prefill {made.prefill:.1f} s, after a sync "
        f"{made.after_sync:.1f} s, the longest alone {made.tail:.1f} s",
        "reward": "beside generation",
        "train": f"{trained.microbatches:,} micro-batches a rank; operations {trained.operations:.1f} s, links "
        f"{trained.links:.1f} s{' at the same time' if trained.overlaps else ''}, optimizer {trained.optimizer:.2f} s",
        "weight sync": f"{plan.setup.transport}, {gib(plan.sync.bytes)}: gather {plan.sync.gather:.1f} s, send "
        f"{plan.sync.send:.1f} s, load {plan.sync.load:.1f} s",
        "checkpoint": f"{gib(plan.checkpoint.bytes)} each: write {plan.checkpoint.write:.1f} s, digests "
        f"{plan.checkpoint.digest:.1f} s",
        "driver": f"{plan.assumptions.driver_seconds_per_million_tokens:g} s per million generated tokens",
    }
    table = _table("seconds of a step", "phase", "seconds", "")
    for name, seconds in phases(plan).items():
        table.add_row(name, f"{seconds:,.2f}", notes[name])
    sides = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in plan.sides.items())
    loop = "generation (rewards and checkpoint beside it) + train + weight sync + driver"
    table.add_row(
        "[bold]step[/bold]",
        f"[bold]{plan.step_seconds:,.2f}[/bold]",
        f"{loop if plan.setup.is_synchronous else f'the longest side: {sides}'}; "
        f"{plan.tokens_per_second:,.0f} generated tokens/s",
    )
    return table


def _busy(plan: Plan) -> Table:
    table = _table("busy", "resource", "of a step", "")
    for name, seconds in sorted(plan.busy.items(), key=lambda item: -item[1]):
        if seconds / plan.step_seconds >= 0.005:
            table.add_row(name, f"{seconds / plan.step_seconds:.0%}", "")
    return table
