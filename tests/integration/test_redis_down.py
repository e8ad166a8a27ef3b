"""Redis stopped, paused, restarted empty, slow: no request fails, answers are right, causes are named."""

from __future__ import annotations

import pytest
from tests.integration.servers import until
from tests.kv.engine_harness import Node, alone, fake_driver, random_tokens, sealer_for
from tests.redis_server import RedisServer, SlowProxy

from stockpot.clock import SystemClock
from stockpot.kv.redis_connection import RedisOptions
from stockpot.kv.redis_tier import RedisTier

PROMPTS = [random_tokens(seed, 80) for seed in range(6)]


def node_at(url: str) -> Node:
    driver = fake_driver()
    tier = RedisTier(
        RedisOptions(url),
        sealer=sealer_for(driver),
        clock=SystemClock(),
        node="node",
        ttl_s=600,
        timeout_s=0.1,
        connect_timeout_s=0.1,
    )
    return Node([tier], driver=driver)


def round_of_requests(node: Node, name: str) -> list[str]:
    """All prompts with an empty RAM, two at a time; the causes of what was not found."""
    node.empty_ram()
    causes: list[str] = []
    for n in range(0, len(PROMPTS), 2):
        for k in (n, n + 1):
            node.submit(f"{name} {k}", PROMPTS[k])
        node.run()
        for k in (n, n + 1):
            assert node.answer(f"{name} {k}") == alone(PROMPTS[k])
            causes += node.causes(f"{name} {k}")
    node.core.check_integrity()
    return causes


@pytest.mark.parametrize("fault", ["stopped", "paused", "restarted empty"])
def test_no_request_fails_and_all_is_well_again_afterwards(redis: RedisServer, fault: str) -> None:
    node = node_at(redis.url)
    round_of_requests(node, "before")
    assert node.cache.flush(30)
    if fault == "stopped":
        redis.stop()
    elif fault == "paused":
        redis.pause()
    else:
        redis.restart_empty()
    causes: list[str] = []
    for n in range(3):
        causes += round_of_requests(node, f"during {n}")
    if fault != "restarted empty":
        assert set(causes) & {"tier down", "tier timeout", "tier error"}
        assert node.core.stats().tiers["redis"].counts.state != "up"
        if fault == "stopped":
            redis.start()
        else:
            redis.resume()
    until(lambda: node.core.stats().tiers["redis"].counts.state == "up")
    assert node.cache.flush(30)
    round_of_requests(node, "written again")
    assert node.cache.flush(30)
    round_of_requests(node, "after")
    assert sum(node.cached(f"after {k}").get("redis", 0) for k in range(len(PROMPTS))) > 0
    node.close()


def test_a_slow_redis_never_gives_a_wrong_answer(redis: RedisServer) -> None:
    proxy = SlowProxy(redis.port)
    node = node_at(proxy.url)
    round_of_requests(node, "before")
    assert node.cache.flush(30)
    proxy.piece_bytes, proxy.delay_s = 700, 0.02
    for n in range(2):
        round_of_requests(node, f"slow {n}")
    proxy.delay_s = 0.3  # longer than the tier waits
    causes = round_of_requests(node, "very slow")
    assert set(causes) & {"tier down", "tier timeout", "tier error"}
    node.close()
    proxy.close()
