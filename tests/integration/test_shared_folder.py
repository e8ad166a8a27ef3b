"""Processes that share one disk folder far too small for them, each with an engine of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kv.engine_harness import disk_tier, fake_driver

PROGRAM = """
import random, sys
from pathlib import Path
from tests.kv.engine_harness import Node, alone, disk_tier, fake_driver, random_tokens
from stockpot.kv.cache import CacheLimits

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
driver = fake_driver()
disk = disk_tier(folder, driver, capacity_bytes=60_000)
node = Node([disk], driver=driver, limits=CacheLimits(ram_bytes=2_000))
picks = random.Random(seed)
found = 0
for turn in range(60):
    names = [f"{turn} {n}" for n in range(3)]
    prompts = [random_tokens(picks.randrange(8), 100)[: picks.randrange(20, 100)] for _ in names]
    for name, prompt in zip(names, prompts):
        node.submit(name, prompt)
    node.run()
    for name, prompt in zip(names, prompts):
        assert node.answer(name) == alone(prompt), name
        found += node.cached(name).get("disk", 0)
    node.core.check_integrity()
    disk.check_integrity()
node.close()
print(found)
"""


def test_two_engines_evict_one_folder_and_every_answer_is_right(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=root,
        )
        for seed in (1, 2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all(int(each) > 0 for each in said), said
    after = disk_tier(tmp_path, fake_driver(), capacity_bytes=60_000)
    assert after.stats().used_bytes <= 60_000
    assert {verdict for _, verdict in after.verify()} == {"ok"}
    after.close()
