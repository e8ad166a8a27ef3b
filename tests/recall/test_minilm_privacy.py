"""The embedding runtime tells nobody anything: it writes no file of its own outside our folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOADS = """
import asyncio
from stockpot.recall.vectors.minilm import MiniLm

async def main():
    embedder = MiniLm()
    await embedder.start()
    await embedder.embed(["hello"])
    await embedder.close()

asyncio.run(main())
"""


def test_nothing_is_written_to_the_users_folders(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_"))}
    subprocess.run(
        [sys.executable, "-B", "-c", LOADS], env={**environment, "HOME": str(tmp_path)}, check=True
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
