"""Rates that are bounded: token buckets, one or one for each client (of as many as are remembered)."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from stockpot.clock import Clock


class Bucket:
    """Holds `most` at first and at most, refills by `per_s`. (Turner 1986, "leaky bucket as a meter".)"""

    __slots__ = ("_at_s", "_held", "_most", "_per_s")

    def __init__(self, most: float, per_s: float, now_s: float) -> None:
        self._most = most
        self._per_s = per_s
        self._held = most
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """How long until one can be taken; 0: now."""
        self._held = min(self._most, self._held + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return 0.0 if self._held >= 1 else (1 - self._held) / self._per_s

    def take(self, now_s: float) -> None:
        """Take one, whether or not it is there."""
        self.wait_s(now_s)
        self._held = max(-1.0, self._held - 1)


class WrongKeys:
    """Counts wrong keys by the address they come from: `a_minute` are looked at each minute. Of `clients_max`
    addresses the one that was quiet for longest is forgotten first."""

    def __init__(self, clock: Clock, *, a_minute: int = 20, clients_max: int = 10_000) -> None:
        self._clock = clock
        self._a_minute = a_minute
        self._clients_max = clients_max
        self._clients: OrderedDict[str, Bucket] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """How long this address must wait before a key of its is looked at; 0: not at all."""
        if not self._clients:
            return 0.0
        bucket = self._clients.get(_network(address))
        return 0.0 if bucket is None else bucket.wait_s(self._clock.monotonic())

    def count(self, address: str) -> None:
        """One more from this address."""
        network, now_s = _network(address), self._clock.monotonic()
        bucket = self._clients.get(network)
        if bucket is None:
            bucket = self._clients[network] = Bucket(self._a_minute, self._a_minute / 60, now_s)
            if len(self._clients) > self._clients_max:
                self._clients.popitem(last=False)
        self._clients.move_to_end(network)
        bucket.take(now_s)


def _network(address: str) -> str:
    """Who can be told apart: an IPv6 address stands for its /64, which is one customer's."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
