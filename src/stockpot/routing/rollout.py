"""Weighted rollout: which of a route's targets a caller is given, and goes on being given."""

from __future__ import annotations

import random

from stockpot.requests import Generation
from stockpot.routing.rendezvous import chosen
from stockpot.settings_gateway import RouteSettings


def target(name: str, route: RouteSettings, generation: Generation, chance: random.Random) -> str:
    """The model of one of the targets, drawn by weight.

    With `sticky` session or key the same session (or else the same key) draws the same target in every
    process, for as long as the weights stand; a change moves only the share that must move. The route's
    `name` is part of the draw, so that who is early in one rollout is not early in all of them.
    """
    if len(route.targets) == 1:
        return route.targets[0].model
    stuck_to = _stuck_to(route, generation)
    weights = [(one.model, one.weight) for one in route.targets]
    if stuck_to is not None:
        return chosen(f"{name}\0{stuck_to}", weights)
    return chance.choices([model for model, _ in weights], [weight for _, weight in weights])[0]


def _stuck_to(route: RouteSettings, generation: Generation) -> str | None:
    """What the draw depends on; None: on nothing."""
    if route.sticky == "session" and generation.session:
        return f"session\0{generation.tenant}\0{generation.session}"
    if route.sticky != "none" and generation.caller.key_id:
        return f"key\0{generation.caller.key_id}"
    return None
