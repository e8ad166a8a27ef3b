"""A gateway process of the proof (test_allowances_together): does what the lines it reads say, at once."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from stockpot.allowances.allowance import Allowances, Claim, Hold, Spent
from stockpot.allowances.redis_store import RedisStore
from stockpot.caller import Caller, Limits
from stockpot.clock import SystemClock
from stockpot.errors import AllowanceExceeded
from stockpot.settings_gateway import AllowanceSettings


async def run(order: dict[str, Any]) -> None:
    settings = AllowanceSettings(redis_url=order["url"], timeout_s=20, lease_s=order["lease_s"])
    allowances = Allowances(settings, SystemClock(), RedisStore(settings))
    await allowances.start()
    caller = Caller(
        key_id="k", key_name="k", team="t", limits=Limits(**order["key"]), team_limits=Limits(**order["team"])
    )
    granted = refused = running = most_running = 0
    spent = Spent(*order["spent"])
    holds: list[Hold] = []

    async def one(number: int) -> None:
        nonlocal granted, refused, running, most_running
        try:
            hold = await allowances.reserve(caller, Claim(f"{order['name']}-{number}", *order["claim"]))
        except AllowanceExceeded:
            refused += 1
            return
        granted += 1
        running += 1
        most_running = max(most_running, running)
        if order["keep"]:
            holds.append(hold)
            return
        await asyncio.sleep(0.002)
        running -= 1
        allowances.settle_soon(hold, spent)

    for start in range(0, order["requests"], order["at_once"]):
        await asyncio.gather(*(one(number) for number in range(start, start + order["at_once"])))
    report = {
        "granted": granted,
        "refused": refused,
        "most_running": most_running,
        "tokens": granted * spent.tokens,
        "nanousd": granted * spent.nanousd,
    }
    if order["linger"]:
        print(json.dumps(report), flush=True)
        await asyncio.sleep(3600)  # until it is killed
    await allowances.close()
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        asyncio.run(run(json.loads(line)))
