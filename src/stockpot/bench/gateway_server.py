"""The seam to a gateway before a provider, and ourselves behind it: keys, limits, ledger and metrics on."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from stockpot.accounts.accounts import open_accounts
from stockpot.bench.progress import BenchProgress
from stockpot.bench.server import ServerCommand, free_port
from stockpot.caller import Limits
from stockpot.clock import SystemClock
from stockpot.identity.key_admin import KeyAdmin, NewKey
from stockpot.identity.sql_keys import SqlKeyStore
from stockpot.settings import load_settings

_START_S = 120.0
_PLENTY = 2**40
_LIMITS = Limits(
    requests_per_minute=_PLENTY,
    tokens_per_minute=_PLENTY,
    concurrency=100_000,
    tokens_per_day=_PLENTY,
    usd_per_month=1_000_000.0,
)
"""Each is reserved, counted and settled for every request, and none is ever reached."""
_CONFIG = """\
data_dir = {data}

[engine]
enabled = false

[backends.mock]
url = "{url}/v1"
models = ["{model}"]
max_concurrency = 10000

[backends.mock.prices."{model}"]
input = 0.5
output = 1.5

[teams.bench.limits]
requests_per_minute = {plenty}
tokens_per_day = {plenty}
"""


@dataclass(frozen=True, slots=True)
class ServedGateway:
    """How to start a gateway, and the key it asks for."""

    command: ServerCommand
    key: str


class GatewayPeer(ABC):
    """A gateway with the OpenAI wire. `prepare` before `serve`."""

    name: str

    @abstractmethod
    def prepare(self, progress: BenchProgress) -> None:
        """Install what is missing; a second call finds everything there. Raises BuildFailed."""

    @abstractmethod
    def serve(self, upstream_url: str, model: str, folder: Path) -> ServedGateway:
        """How to start it before the provider at `upstream_url`; what it keeps goes into `folder`."""

    @abstractmethod
    def facts(self) -> Mapping[str, object]:
        """Version and options, for the result file; no paths."""


class StockpotGateway(GatewayPeer):
    """`stockpot serve` without an engine, one process: virtual key, limits of key and team, prices, ledger,
    metrics."""

    name = "stockpot"

    def prepare(self, progress: BenchProgress) -> None:
        del progress

    def serve(self, upstream_url: str, model: str, folder: Path) -> ServedGateway:
        config = folder / "stockpot.toml"
        data = json.dumps(str(folder / "data"))  # a TOML string too
        config.write_text(_CONFIG.format(data=data, url=upstream_url, model=model, plenty=_PLENTY))
        port = free_port()
        code = "from stockpot.cli.main import main; main()"
        arguments = (
            *(sys.executable, "-c", code, "serve", "--config", str(config)),
            *("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
        )
        command = ServerCommand(self.name, arguments, port, "/ready", start_s=_START_S)
        return ServedGateway(command, _new_key(config))

    def facts(self) -> Mapping[str, object]:
        return {
            "options": "one process",
            "on": "virtual key, limits of key and team (requests, tokens, concurrency, dollars), prices,"
            " ledger (SQLite), metrics, routing, retries, breaker, adaptive concurrency limit",
        }


def _new_key(config: Path) -> str:
    clock = SystemClock()
    with closing(open_accounts(load_settings(config), clock=clock)) as accounts:
        keys = KeyAdmin(SqlKeyStore(accounts.database), accounts.audit, clock)
        return keys.create(NewKey("bench", team="bench", limits=_LIMITS), actor="bench")[1]
