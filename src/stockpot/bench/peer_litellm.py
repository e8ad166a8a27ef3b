"""LiteLLM's proxy before a provider, in an environment of its own, set up as its documentation advises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stockpot.bench.gateway_server import GatewayPeer, ServedGateway
from stockpot.bench.progress import BenchProgress
from stockpot.bench.server import ServerCommand, free_port
from stockpot.bench.setup_steps import PythonEnvironment, Workshop

# The newest whose extra `proxy` can be installed: later releases, up to 1.110.2, ask for versions of
# litellm-proxy and litellm-proxy-extras that the package index does not have. Never 1.82.7 or 1.82.8.
_VERSION = "1.108.7"
_KEY = "sk-bench-0123456789abcdef"
_START_S = 180.0
_ENVIRONMENT = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # its list of prices comes from the network otherwise
    "LITELLM_TELEMETRY": "False",
    "NO_PROXY": "127.0.0.1",
}
_CONFIG = """\
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: {url}/v1
      api_key: none
litellm_settings:
  set_verbose: false
  request_timeout: 600
general_settings:
  master_key: {key}
"""


class LiteLLMPeer(GatewayPeer):
    """One worker, as its documentation advises for a container; we have one process too. Its virtual keys,
    budgets and spend need PostgreSQL: they are off, which is less than ours does."""

    name = "litellm"

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / "bench" / f"litellm-{_VERSION}"

    def prepare(self, progress: BenchProgress) -> None:
        """An environment of its own (about 650 MB)."""
        complete = self._folder / "complete"
        if not complete.is_file():
            workshop = Workshop(self._folder, progress)
            PythonEnvironment(workshop, "venv").create((f"litellm[proxy]=={_VERSION}",))
            complete.touch()

    def serve(self, upstream_url: str, model: str, folder: Path) -> ServedGateway:
        config = folder / "litellm.yaml"
        config.write_text(_CONFIG.format(model=model, url=upstream_url, key=_KEY), encoding="utf-8")
        port = free_port()
        arguments = (
            *(str(self._folder / "venv" / "bin" / "litellm"), "--config", str(config)),
            *("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"),
        )
        command = ServerCommand(self.name, arguments, port, "/health/readiness", _ENVIRONMENT, _START_S)
        return ServedGateway(command, _KEY)

    def facts(self) -> Mapping[str, object]:
        return {
            "version": _VERSION,
            "options": "--num_workers 1",
            "environment": "LITELLM_MODE=PRODUCTION LITELLM_LOG=ERROR",
            "on": "master key",
            "off": "virtual keys, budgets, spend (they need PostgreSQL), callbacks, debugging",
        }
