"""From the name a client asks for to the models that may answer: aliases, rollout, fallbacks, degrading."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, get_args

from stockpot.errors import ConfigurationError, FailureCause, Forbidden, UnknownModel
from stockpot.events import Notice
from stockpot.requests import AnyRequest, EmbeddingRequest, Generation
from stockpot.routing import rollout
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_gateway import CascadeSettings, Policy, RouteSettings

LOG = logging.getLogger(__name__)

SURVIVABLE: Final[frozenset[FailureCause]] = frozenset(get_args(FailureCause)) - {
    "invalid_request",
    "context_overflow",
    "allowance",
    "guard",
    "cancelled",
    "deadline",
}
"""Failures of an attempt another model may survive: what a fallback without `on` takes over for. A context
that overflows is none of them, since as a rule the next is no longer; a fallback may name it. That the caller
is refused never comes this far: unauthenticated and forbidden are said of our own key by a backend."""

STEPS_MAX = 64
"""Models one request could lead through; more than that is a mistake in the routes."""
LISTED_MAX = 20


class Router:
    """Decides the way of each request, from the routes and from nothing that changes between two requests.

    A name without a route is a model. Targets, fallbacks, cascades and cheaper models may name other routes,
    whose own rules then hold; of policies and cascades the outermost one counts. A route that names itself
    means the model of that name, so a model can be given fallbacks under its own name.

    `serves` tells whether some backend is known to serve a model, ready or not; `known` lists such models for
    the message of a refusal. Raises ConfigurationError for routes that lead in a circle or into too much.
    """

    def __init__(
        self,
        routes: Mapping[str, RouteSettings],
        *,
        default_policy: Policy,
        serves: Callable[[str], bool],
        known: Callable[[], Iterable[str]] | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._routes = dict(routes)
        self._policy: Policy = default_policy
        self._serves = serves
        self._known = known
        self._chance = chance or random.Random()
        lengths: dict[str, int] = {}
        for name in self._routes:
            _check(name, self._routes[name])
            self._measure(name, (), lengths)

    def plan(self, request: AnyRequest, standing: float | None) -> RoutePlan:
        """The way of a request. `standing` is the share of the caller's tightest budget that is left (None:
        it has none). Raises Forbidden and UnknownModel."""
        generation = request.generation
        asked = generation.model
        allowed = generation.caller.models
        if allowed is not None and asked not in allowed:
            raise Forbidden(
                f"This key may not use the model {asked!r}; {_listed(allowed, 'it may use')}.",
                param="model",
            )
        if asked not in self._routes:
            if not self._serves(asked):
                raise UnknownModel(
                    f"The model {asked!r} is not served here; {_listed(self._names(allowed), 'there are')}.",
                    param="model",
                )
            return RoutePlan(asked, (Step(asked),), self._policy)
        way = _Way(self._routes, generation, standing, self._chance)
        way.follow(asked, frozenset())
        cascade = way.cascade
        if cascade is not None and isinstance(request, EmbeddingRequest):
            cascade = None
        return RoutePlan(asked, way.steps(), way.policy or self._policy, cascade, way.notices)

    def names(self) -> tuple[str, ...]:
        """The names of the routes."""
        return tuple(self._routes)

    def unserved(self) -> dict[str, tuple[str, ...]]:
        """By route, the models it may lead to that no backend is known to serve; also logged. A backend may
        be down just now: worth a word to the operator, and no error."""
        missing: dict[str, tuple[str, ...]] = {}
        for name, route in self._routes.items():
            leaves = [to for to in _edges(route) if to == name or to not in self._routes]
            if lacking := tuple(to for to in dict.fromkeys(leaves) if not self._serves(to)):
                missing[name] = lacking
                LOG.warning(
                    "route %r leads to %s, which no backend serves; check the name, or wait for the backend",
                    name,
                    ", ".join(map(repr, lacking)),
                )
        return missing

    def _names(self, allowed: frozenset[str] | None) -> set[str]:
        names = set(self._routes).union(self._known() if self._known else ())
        return names if allowed is None else names & allowed

    def _measure(self, name: str, above: tuple[str, ...], lengths: dict[str, int]) -> int:
        """How many models the route may lead through; raises ConfigurationError for a circle."""
        if name not in self._routes or (above and above[-1] == name):
            return 1
        if name in above:
            circle = " -> ".join((*above[above.index(name) :], name))
            raise ConfigurationError(
                f"The routes lead in a circle: {circle}. Let one of them name a model instead."
            )
        if name not in lengths:
            lengths[name] = sum(
                self._measure(to, (*above, name), lengths) for to in _edges(self._routes[name])
            )
            if lengths[name] > STEPS_MAX:
                raise ConfigurationError(
                    f"The route {name!r} can lead through {lengths[name]} models, more than {STEPS_MAX}."
                    " Name fewer targets and fallbacks, here or in the routes it names."
                )
        return lengths[name]


class _Way:
    """One request's way through the routes, as it is found."""

    def __init__(
        self,
        routes: Mapping[str, RouteSettings],
        generation: Generation,
        standing: float | None,
        chance: random.Random,
    ) -> None:
        self._routes = routes
        self._generation = generation
        self._standing = standing
        self._chance = chance
        self._steps: dict[str, frozenset[FailureCause]] = {}
        self.policy: Policy | None = None
        self.cascade: CascadeSettings | None = None
        self.notices: tuple[Notice, ...] = ()

    def steps(self) -> tuple[Step, ...]:
        return tuple(Step(model, on) for model, on in self._steps.items())

    def follow(self, name: str, on: frozenset[FailureCause], above: str | None = None) -> None:
        """Add the steps behind a name; the first is taken after the failures in `on`."""
        first = not self._steps
        route = None if name == above else self._routes.get(name)
        if route is None:
            self._add(name, on)
            return
        degrade = route.degrade
        if first:
            self.policy = self.policy or route.policy
        if degrade is not None and self._standing is not None and self._standing < degrade.below:
            # Neither cascade nor fallbacks of the route: they lead to what there is no budget for.
            if first:
                self.notices += (
                    Notice(
                        "degraded",
                        f"{degrade.to} answers in place of {name}: less than {degrade.below:.0%} of a budget"
                        " is left.",
                    ),
                )
            self.follow(degrade.to, on, name)
            return
        if first and self.cascade is None and route.cascade is not None:
            self.cascade = self._resolved(route.cascade, name)
        self.follow(rollout.target(name, route, self._generation, self._chance), on, name)
        for fallback in route.fallbacks:
            self.follow(fallback.to, frozenset(fallback.on) or SURVIVABLE, name)

    def _add(self, model: str, on: frozenset[FailureCause]) -> None:
        """A model stands once in the plan, at its first place, for all causes it is named for. The first step
        has failed when any other is reached, so it is not repeated."""
        if model not in self._steps:
            self._steps[model] = on
        elif self._steps[model]:
            self._steps[model] |= on

    def _resolved(self, cascade: CascadeSettings, name: str) -> CascadeSettings:
        """With a model as `to`, where it names a route."""
        if cascade.to == name or cascade.to not in self._routes:
            return cascade
        way = _Way(self._routes, self._generation, self._standing, self._chance)
        way.follow(cascade.to, frozenset(), name)
        return cascade.model_copy(update={"to": way.steps()[0].model})


def _edges(route: RouteSettings) -> list[str]:
    """All names a route leads to."""
    edges = [one.model for one in route.targets] + [one.to for one in route.fallbacks]
    edges += [one.to for one in (route.cascade, route.degrade) if one is not None]
    return edges


def _check(name: str, route: RouteSettings) -> None:
    """Raises ConfigurationError for what one route says twice or not at all."""
    targets = [one.model for one in route.targets]
    fallbacks = [one.to for one in route.fallbacks]
    for what, models in (("target", targets), ("fallback", fallbacks)):
        if twice := sorted({model for model in models if models.count(model) > 1}):
            raise ConfigurationError(f"The route {name!r} names the {what} {twice[0]!r} twice; name it once.")
    if not any(one.weight > 0 for one in route.targets):
        raise ConfigurationError(
            f"All targets of the route {name!r} have weight 0, so none would be taken; give one a weight."
        )


def _listed(names: Collection[str], lead: str) -> str:
    if not names:
        return "there are no models here for it"
    shown = sorted(names)[:LISTED_MAX]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{lead} {', '.join(map(repr, shown))}{more}"
