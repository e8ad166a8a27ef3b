"""Closed classes of English words that exclude one another: opposites, days, roles, places, kinds."""

from __future__ import annotations

from typing import Final


def _classes(text: str) -> tuple[tuple[str, ...], ...]:
    """Classes are set off by `;`, their values by spaces; `a/b` are one value."""
    return tuple(tuple(line.split()) for line in text.split(";"))


ANTONYMS: Final = _classes(
    """lock unlock; mute unmute; enable/activate/enabling/activating
    disable/deactivate/disabling/deactivating; on off; in out;
    increase/raise/bigger/increasing/raising decrease/lower/reduce/smaller/decreasing/reducing;
    increased/raised decreased/reduced/lowered; include exclude; included excluded; open
    close/closed opened/open; opening closing; import export; importing exporting; add
    remove/delete; adding removing/deleting; upgrade downgrade; upgrading downgrading; accept
    decline/reject/refuse; accepted declined/rejected/refused; approved rejected/denied; approve
    reject/deny; buy/buying sell/selling; borrow lend; deposit withdraw; deposits withdrawals;
    subscribe unsubscribe; subscribing unsubscribing; join leave/quit; arrive/arrival/arrivals
    depart/departure/departures; arriving departing/leaving; start/starting stop/stopping; install
    uninstall; installing uninstalling; log-in log-out; upload download; uploading downloading;
    uploads downloads; send receive; sending receiving; sender recipient; encrypt decrypt; compress
    decompress; block unblock; show hide; allow/allowed forbid/forbidden/prohibited/banned; best
    worst; benefits/benefit/advantages/advantage/pros/upsides
    drawbacks/drawback/disadvantages/disadvantage/cons/downsides; cheapest/least-expensive
    most-expensive/dearest; maximum/max/most/highest minimum/min/least/lowest; before/prior after;
    above/over below/under; upper lower; longest shortest; longer shorter; largest/biggest smallest;
    fastest slowest; faster slower; earliest latest; early late; win lose; pass fail/failed;
    success/successful failure/unsuccessful; profit loss; legal/lawful illegal/unlawful; safe
    unsafe/dangerous; possible impossible; fair unfair; valid invalid; refundable nonrefundable;
    public private; free paid; hot cold; left right; top bottom; true false; spicy mild;
    indoor/indoors outdoor/outdoors; inside outside; old new; hire/hiring/recruit
    fire/firing/sack/sacking; push pull; attach detach; connect/connecting disconnect/disconnecting;
    connected disconnected; appear/appears/appearing disappear/disappears/disappearing; freeze
    unfreeze/thaw; pause resume; pausing resuming; follow unfollow; archive unarchive/restore;
    expand collapse; zoom-in zoom-out; opt-in opt-out; check-in check-out; gain lose; eat/take/use
    avoid; income outcome; input output; encode decode; serialize deserialize; commit
    rollback/revert; ascending descending; positive negative; debit credit; taxable nontaxable; stay
    leave"""
)
"""What excludes one another: a line is a class of values; `x/y` is `x`, written `y`."""

CLASSES: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "date": _classes(
        """monday/mondays tuesday/tuesdays wednesday/wednesdays thursday/thursdays friday/fridays
    saturday/saturdays sunday/sundays weekday/weekdays weekend/weekends; january/jan february/feb
    march april may june july august september october november december; today/tonight tomorrow
    yesterday; same-day next-day; spring summer autumn/fall winter; morning/mornings
    afternoon/afternoons evening/evenings night/overnight; daily/day weekly monthly/month
    yearly/annual/annually/year quarterly"""
    ),
    "colour": _classes("red blue green yellow orange purple black white brown pink grey/gray amber silver"),
    "role": _classes(
        """adult/adults child/children/toddler/toddlers/son/daughter baby/babies/infant/infants/newborn
    teenager/teenagers/teen/teens senior/seniors/pensioner/pensioners; employee/employees
    contractor/contractors freelancer/freelancers volunteer/volunteers; full-time part-time;
    employed self-employed unemployed; undergraduate/undergraduates postgraduate/postgraduates;
    pregnant breastfeeding; economy business-class first-class;
    colleague/colleagues/coworker/coworkers"""
    ),
    "person": _classes(
        """tenant/tenants/renter/renters landlord/landlords homeowner/homeowners; employer/employers
    employee/employees; resident/residents visitor/visitors; member/members nonmember/nonmembers;
    buyer/buyers seller/sellers; male/men/man/boys/boy female/women/woman/girls/girl; husband wife;
    mother/mom/mum father/dad; son daughter; brother sister; married unmarried/single divorced;
    admin/administrator/admins guest/guests; doctor/doctors dentist/dentists vet/vets
    optician/opticians nurse/nurses; student/students teacher/teachers; international home domestic;
    parent/parents child/children"""
    ),
    "kind": _classes(
        """dog/dogs/puppy/puppies cat/cats/kitten/kittens rabbit/rabbits horse/horses hamster/hamsters;
    chicken beef/steak pork/ham lamb fish/salmon/tuna turkey duck tofu; breakfast lunch dinner brunch;
    car/cars motorbike/motorbikes/motorcycle van/vans truck/lorry bike/bicycle bus train/trains
    plane/flight ferry; flat/apartment house/houses office/offices; north/northern south/southern
    east/eastern west/western; credit debit; savings current/checking; visa mastercard amex paypal;
    home-insurance car-insurance travel-insurance; water gas electricity; radiator/radiators
    boiler/boilers shower/showers toilet/toilets; iphone/ios/ipad android; windows mac/macos
    linux/ubuntu; python java javascript ruby rust golang php kotlin swift typescript; gmail outlook
    yahoo; pdf word excel csv json xml; facebook instagram twitter linkedin tiktok whatsapp; chrome
    firefox safari edge; aws azure gcp; bachelor/bachelors/undergraduate master/masters/postgraduate
    phd/doctorate; first second third fourth last; tea coffee; wine beer; vegan vegetarian; single
    double twin"""
    ),
    "currency": _classes("gbp/pounds/sterling usd/dollars/dollar eur/euro/euros yen/jpy rupees/inr"),
    "place": _classes(
        """england scotland wales northern-ireland; uk/britain us/usa/america canada australia france germany
    spain italy austria china japan india brazil mexico portugal greece turkey ireland netherlands
    belgium sweden norway denmark poland switzerland russia; london manchester edinburgh bristol
    leeds glasgow birmingham liverpool cardiff belfast paris rome madrid berlin amsterdam dublin
    tokyo chicago boston"""
    ),
    "quantifier": _classes(
        """all/every/each none/no; always never; both neither; everyone/everybody nobody"""
    ),
    "bound": _classes(
        """more/over/above/exceeding less/under/below/fewer; before/until after/since; within outside;
    larger/bigger/greater smaller; older younger; maximum/max minimum/min"""
    ),
}
"""Classes of values by the name of the conflict. They speak where both questions have one of a class."""

ONE_SIDED: Final = frozenset({"role"})
"""Of these a value only one of them has tells them apart too."""
