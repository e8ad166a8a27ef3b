"""A real PostgreSQL for tests: a throw-away cluster on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.redis_server import free_port

from stockpot.accounts.database import Database, DatabaseUnavailable

_START_S = 60.0


class PostgresServer:
    """A cluster of its own on a free port, in /tmp and not as root (which PostgreSQL refuses)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stockpot-postgres-"))
        self.port = free_port()
        self._as: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(self.folder, "postgres")
        self._data = self.folder / "data"
        self._process: subprocess.Popen[Any] | None = None
        subprocess.run(
            ["initdb", "-D", self._data, "-U", "stockpot", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._as,
        )

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://stockpot@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("postgres", "-D", self._data, "-p", str(self.port), "-h", "127.0.0.1"),
                    *("-k", self.folder, "-c", "fsync=off"),
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self._as,
            )
        deadline_s = time.monotonic() + _START_S
        while True:
            database = Database(self.url())
            try:
                with database.reading() as connection:
                    connection.exec_driver_sql("SELECT 1")
                    return
            except DatabaseUnavailable:
                assert time.monotonic() < deadline_s, (self.folder / "log").read_text()
                time.sleep(0.1)
            finally:
                database.close()

    def stop(self) -> None:
        """End it at once, connections and all. Idempotent."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def fresh(self) -> str:
        """The URL of a new, empty database."""
        name = f"test{time.monotonic_ns()}"
        subprocess.run(
            ["createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "stockpot", name],
            check=True,
            capture_output=True,
        )
        return self.url(name)
