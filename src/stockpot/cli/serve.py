"""`stockpot serve`: the model behind an HTTP API."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.config_watch import ConfigWatch
    from stockpot.runtime import Runtime
    from stockpot.serving import Serving
    from stockpot.settings import Settings
    from stockpot.telemetry.logs import LogLevel

_SWITCH_INTERVAL_S = 0.0005
_GC_THRESHOLDS = (10_000, 10, 10)
"""Requests leave hardly any cycles; with Python's defaults a request of the gateway paid for several
passes."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def serve(
        *,
        host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
        port: Annotated[
            int | None, typer.Option(min=0, max=65535, help="Port; 0 takes any free one. [default: 8000]")
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(help="A name, a path to a .gguf, or hf:org/repo:file.gguf (see 'stockpot models')."),
        ] = None,
        config: Annotated[
            Path | None, typer.Option(help="Settings as TOML. [default: ./stockpot.toml where it exists]")
        ] = None,
        context_tokens: Annotated[
            int | None,
            typer.Option(min=256, help="Tokens the context holds, shared by all requests. [default: 16384]"),
        ] = None,
        ram_gib: Annotated[
            float | None,
            typer.Option(
                min=0,
                help="RAM for prefixes that may come back. [default: a quarter of free memory, 4 at most]",
            ),
        ] = None,
        disk_gib: Annotated[
            float | None,
            typer.Option(
                min=0,
                help="Disk for prefixes that may come back, also after a restart; 0: none."
                " [default: a tenth of what is free, 8 at most]",
            ),
        ] = None,
        redis: Annotated[
            str | None,
            typer.Option(
                metavar="URL",
                help="Redis in which several servers share prefixes, for example redis://10.0.0.5:6379;"
                " needs STOCKPOT_CACHE__SECRET, the same on all of them.",
            ),
        ] = None,
        cache: Annotated[
            bool | None,
            typer.Option(
                "--cache/--no-cache", help="Reuse prefixes; without, every prompt is computed whole."
            ),
        ] = None,
        log_level: Annotated[
            str, typer.Option(help="debug, info, warning or error; debug has a line for each request.")
        ] = "info",
    ) -> None:
        """Serve models over HTTP: OpenAI's and Anthropic's APIs under /v1, metrics at /metrics.

        By itself it serves one model in this process; with [backends.NAME] in the settings it is a gateway to
        other servers too, or alone (engine.enabled = false). See 'stockpot config' and docs/gateway.md.

        The first start fetches the default model and finds the best encoding for this machine. What
        conversations and requests have in common is computed once; see 'stockpot cache stats'.

        Stop with Ctrl-C or SIGTERM: running requests finish first. A second one stops at once. When the
        settings file changes, or on SIGHUP, it is read again; one that does not fit changes nothing.

        Settings come from the TOML file, then from STOCKPOT_<SECTION>__<NAME> in the environment, then from
        these options.
        """
        overrides = _sections(
            server={"host": host, "port": port},
            model={"source": model},
            engine={"context_tokens": context_tokens},
            cache={
                "enabled": cache,
                "ram_bytes": _gib(ram_gib),
                **_sections(disk={"capacity_bytes": _gib(disk_gib)}, redis={"url": redis}),
            },
        )
        _serve(config, overrides, _log_level(log_level))


def _sections(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that were given, by section of the settings."""
    given = {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in sections.items()
    }
    return {name: section for name, section in given.items() if section}


def _gib(number: float | None) -> int | None:
    """In bytes."""
    return None if number is None else int(number * 2**30)


def _log_level(name: str) -> LogLevel:
    match name.lower():
        case "debug" | "info" | "warning" | "error" as level:
            return level
        case _:
            raise typer.BadParameter(
                f"{name!r} is none of debug, info, warning, error", param_hint="--log-level"
            )


def _serve(config: Path | None, overrides: dict[str, Any], log_level: LogLevel) -> None:
    """Listen, load, serve, drain."""
    import uvloop
    from rich.console import Console

    from stockpot.cli.progress import terminal_progress
    from stockpot.config_watch import ConfigWatch, print_of
    from stockpot.runtime import open_runtime
    from stockpot.settings import config_path, load_settings
    from stockpot.telemetry.logs import configure_logging
    from stockpot.wire.server import listen

    # Before they are read: loading the model may take minutes, in which the file may change.
    since = print_of(config_path(config))
    settings = load_settings(config, **overrides)
    configure_logging(log_level, settings.telemetry.log_format)
    # These concern the whole process, so they are set here and nowhere in the library.
    if settings.engine.enabled:
        # After each decode the engine's thread must have the interpreter back quickly; Python's default lets
        # the event loop keep it for 5 ms, several times a decode step of a small model.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.set_threshold(*_GC_THRESHOLDS)
    console = Console()
    with listen(settings.server.host, settings.server.port) as listener, ExitStack() as stack:
        runtime = None
        if settings.engine.enabled:
            with terminal_progress(Console(stderr=True)) as progress:
                runtime = stack.enter_context(closing(open_runtime(settings, progress=progress)))
        # By the path it was found at: a file that is gone later is an error, not a change to the defaults.
        found = config_path(config)
        reread = partial(load_settings, found, **overrides)
        watch = partial(ConfigWatch, found, reread, since=since)
        uvloop.run(_run(runtime, settings, listener, console, watch))


async def _run(
    runtime: Runtime | None,
    settings: Settings,
    listener: socket.socket,
    console: Console,
    watching: Callable[..., ConfigWatch],
) -> None:
    """Put the server together, serve until a signal, take it apart."""
    import asyncio

    from stockpot.clock import SystemClock
    from stockpot.serving import open_serving
    from stockpot.wire.app import application
    from stockpot.wire.server import Server

    clock = SystemClock()
    if runtime is None:
        serving = open_serving(settings, None, clock=clock)
    else:
        serving = open_serving(settings, runtime.backend, clock=clock, stats=runtime.engine_stats)
        runtime.observers.append(serving.service.metrics)
    serving.watch = watch = watching(apply=serving.reload, clock=clock)
    try:
        await serving.start()
        server = Server(
            application(serving.service),
            serving,
            drain_s=settings.server.drain_s,
            trusted_proxies=settings.server.trusted_proxies,
        )
        watch.start()
        gc.collect()
        gc.freeze()  # what is there now stays: passes need not look at it
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, watch.request)
        _print_banner(runtime, serving, settings.server.host, listener.getsockname()[1], console)
        await server.serve([listener])
    finally:
        await watch.stop()
        # Harmless a second time: after a drain there is nothing left to end.
        await serving.stop(drain=False)
    console.print("Stopped.")


def _print_banner(runtime: Runtime | None, serving: Serving, host: str, port: int, console: Console) -> None:
    """Address, facts, and a first request to copy. The fact `hint` is a sentence and comes last."""
    from urllib.parse import urlsplit

    from rich.table import Table
    from rich.text import Text

    shown_host = f"[{host}]" if ":" in host else host
    url = f"http://{shown_host}:{port}"
    facts = dict(runtime.banner_facts()) if runtime is not None else {}
    remote = [f"{name} ({urlsplit(each.url).hostname})" for name, each in serving.settings.backends.items()]
    if remote:
        facts = {"backends": ", ".join(remote), **facts}
    hint = facts.pop("hint", None)
    table = Table.grid(padding=(0, 2))
    for name, value in {"url": f"{url}/v1", **facts}.items():
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(Text("Stockpot is ready.", style="bold green"))
    console.print(table)
    models = serving.gateway.models()
    model = models[0].id if models else "MODEL"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    example = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    console.print(Text("try: " + example), soft_wrap=True)
    if hint:
        console.print(Text(hint, style="yellow"), soft_wrap=True)
