"""Questions whose answer does not carry over: it depends on when or on who asks, or a new one is wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stockpot.recall.questions import words as known
from stockpot.recall.questions.normal_form import NormalForm
from stockpot.recall.questions.question import Question, read_question

_X = re.VERBOSE
_POLITELY = (
    r"(?:(?:can|could|would|will)\ you\ )?(?:please\ )?(?:go\ ahead\ and\ )?(?:just\ )?"
    r"(?:help\ me\ (?:to\ )?)?"
)
_WANT = r"(?:i\ (?:want|need|would\ like|wish)\ (?:you\ )?to\ |let\ us\ )"

_TIME = re.compile(
    rf"""\b(?:
    todays? | tonights? | tomorrows? | yesterdays? | nowadays | so\ far | these\ days | as\ of\ now
    | (?:this|last|coming)\ (?:second|minute|hour|day|week|weekend|month|quarter|year|season|morning|afternoon
      |evening|night|{"|".join(sorted(known.WEEKDAYS))})s?
    | next\ (?:week|weekend|month|quarter|year|season|{"|".join(sorted(known.WEEKDAYS))})s?
    | what\ (?:time|day|date|year|month)\ is\ (?:it|the\ date)
    | what\ is\ the\ (?:time|date|day)(?:$|\ (?:right|in|here)\b)
    | weather | forecasts? | news | headlines
    | (?:stock|share|market|gold|oil|gas|petrol|fuel|house|bitcoin|crypto\w*)\ prices?
    | price\ of\ (?:bitcoin|btc|ethereum|gold|silver|oil|petrol|gas)
    | (?:what\ is|what\ are|give\ me|check)\ (?:the\ )?(?:\w+\ ){{0,2}}exchange\ rates?
    | convert\ .*\b(?:gbp|usd|eur|pounds?|dollars?|euros?|yen)\ (?:to|into)
    | traffic\ (?:on|in|near|like|jams?) | is\ (?:winning|playing|trending)
    | (?:live|final)\ scores? | what\ is\ the\ score
    | (?:is|are)\ (?!it\ ok)(?:\S+\ ){{1,6}}(?:on\ time|running\ late|delayed|still\ (?:open|available|down)
      |in\ stock|sold\ out|(?:down|open|closed)\ (?:right|yet|again)) | any(?:thing)?\ (?:new|free)\ (?:at|on)
    )\b""",
    _X,
)
_NOW = re.compile(
    r"""\b(?:now(?!\ pay\ later) | currently | latest | newest | at\ the\ moment | at\ present
    | current\ (?!accounts?\b|account\b)\w+ )\b""",
    _X,
)
"""Time, unless one asks how something is done, or why: then it is by the way."""

_ACTS = (
    r"(?:cancel|book|reserve|order|buy|purchase|send|transfer|pay|refund|delete|remove|reschedule"
    r"|schedule|remind"
    r"|call|email|text|message|submit|subscribe|unsubscribe|renew|track|update|change|set|add|move|close|open"
    r"|lock|unlock|freeze|block|activate|deactivate|enable|disable|stop|start|pause|resume|confirm"
    r"|approve|register|sign"
    r"|log|connect|return|replace|upgrade|downgrade|switch|turn|increase|decrease|raise|lower"
    r"|withdraw|deposit"
    r"|apply|invite|share|upload|dispute|report|forward|assign|print|play|top|extend|save)"
)
_OBJECT = (
    r"(?:it|that|this|them|me|us|him|her|my|our|the|a|an|all|both|those|these|up|on|off|out|in|back"
    r"|down|for|to"
    r"|another|some|order|\d\S*)"
)
_COMMAND = re.compile(
    rf"""(?:{_POLITELY}|{_WANT}){_ACTS}\ {_OBJECT}\b.* | {_POLITELY}{_ACTS}(?:\ \w+){{1,2}}
    | (?:please\ )?(?:show|tell|give|read|list|check|find|get|fetch|look\ up|track)\ (?:me\ )?(?:my|our)\b.*
    | (?:yes|yep|yeah|no|ok|sure)(?:\ (?:please|do\ (?:that|it|so)|go\ ahead|thanks|sure))*
    | go\ ahead(?:\ .*)? | do\ (?:it|that|so)(?:\ .*)?""",
    _X,
)
_CAN_YOU = re.compile(
    rf"(?:can|could|would|will)\ you\ (?:please\ )?"
    rf"{_ACTS}\ (?:it|that|this|them|me|us|my|our|.*\bfor\ me)\b.*",
    _X,
)
_NOT_COMMANDS = re.compile(
    r"(?:set|add|order|print|text|message|call|report|return|play|top|log|sign)\ (?:theory|of|by|statement)\b"
)
_THING = (
    r"(?:\w+\ ){0,2}(?:orders?|balance|account|parcel|package|delivery|refund|payments?|bill"
    r"|booking|reservation"
    r"|appointment|invoice|subscription|claim|application|statement|loan|points|transaction"
    r"|transfer|salary|payslip"
    r"|results|schedule|calendar|meeting|shift|prescription|deposit|request|ticket|complaint|card"
    r"|contract|plan)"
)
_STATE = (
    r"(?:arrive[ds]?|arriving|come|coming|here|ready|shipped|sent|delivered|dispatched|confirmed"
    r"|approved|accepted"
    r"|rejected|processed|received|paid|due|expire[sd]?|expiring|cancelled|canceled|active|overdue"
    r"|blocked|booked"
    r"|scheduled|completed|late|delayed|gone|through|pending)"
)
_PERSONAL = re.compile(
    rf"""(?<!\S)(?:
    (?:what|where|when|who|which)\ (?:is|are|was|were)\ (?:my|our)\b
      (?!\ (?:\w+\ )?(?:options?|rights|choices)\b)
    | how\ (?:much|many|old|long|high|big)\ (?:is|are|was|were)\ (?:my|our)\b
    | (?<!why\ )(?:when\ )?(?:is|are|has|have|was|were|did|does|do|will)\ (?:my|our)\ {_THING}
      \ (?:\w+\ ){{0,3}}{_STATE}\b
    | how\ (?:much|many)\ (?:\w+\ )?(?:do|did|have)\ i\ (?:still\ )?
      (?:owe|spend|spent|earn|earned|use|used|have(?!\ to))\b
    | what\ (?:do|did|have)\ i\ (?:owe|order|buy|say|ask|pay|spend|book)\b(?!\ for)
    | (?:did|have)\ i\ (?:already\ |ever\ )?
      (?:pay|paid|order|ordered|book|booked|receive|received|win|won|pass|passed)\b
    | do\ i\ (?:still\ )?(?:owe\b|have\ (?:any|enough)\b(?!.*\b(?:to|rights?)\b))
    | my\ (?:\w+\ )?(?:name|number|id|email|address|reference|postcode|birthday|iban|phone)\ is\b
    | i\ am\ (?:called|named)\b | ^remember\ (?:me|that\ i|my)\b | (?:know|say|tell\ me)\ about\ me\b
    | who\ am\ i\b
    | should\ i\ (?:marry|quit|divorce|break)\b
    | (?:order|account|booking|ticket|case|reference|invoice|customer|policy|claim|parcel|tracking
      |confirmation)
      (?:\ (?:number|no|nr|id|reference|ref))?(?:\ is)?(?:\ \#)?\ (?:\d{{4,}}|[a-z]+-?\d{{3,}}\w*)(?!\S)
    )""",
    _X,
)
_IDENTIFIES = re.compile(
    r"[\w.+-]{1,64}@[\w-]{1,255}\.\w|\b[A-Z]{2}\d{2}[ ]?(?:\w{4}[ ]?){3,8}|\+?\d[\d ()-]{9,20}\d"
)
_WORKS = (
    r"(?:story|stories|jokes?|poems?|haikus?|limericks?|riddles?|songs?|lyrics|ideas?|slogans?"
    r"|taglines?|puns?"
    r"|tales?|fun\ facts?|captions?|prompts?|plots?|nicknames?|compliments?|quotes?"
    r"|pick\ up\ lines?|logos?|names?|essays?"
    r"|scripts?|dialogs?|images?|pictures?|melody)"
)
_CREATIVE = re.compile(
    rf"""(?:{_POLITELY}|{_WANT}|i\ need\ )(?:
      (?:write|compose|draft|rewrite|rephrase|paraphrase|reword|invent|imagine|pretend|brainstorm|improvise
        |roleplay|role\ play|act\ as|make\ up|come\ up\ with|sing|rap)\b.*
    | (?:tell|give|make|suggest|propose|pick|choose|recommend|show|think\ of|create|design|generate
      |need|continue)
      \ (?:me\ |us\ )?(?:(?:an?|some|the|another|\d+|1|more|few)\ )*(?:\S+\ ){{0,2}}{_WORKS}\b.*
    | (?:an?|another|\d+|some)\ (?:\S+\ ){{0,2}}{_WORKS}\ (?:about|for|please)\b.*
    | surprise\ (?:me|us)\b.* | entertain\ me\b.* | (?:flip|toss)\ a\ coin\b.*
    | roll\ (?:a|the|\d+)\ (?:dice|die)\b.*
    | (?:give|tell|show|make|write|try)\ (?:me\ )?(?:another|a\ different|1\ more|\d+\ more)\b.*
    | another(?:\ (?:1|one))? | try\ again\b.*
    | (?:pick|choose|give|name|generate)\ (?:me\ )?(?:an?\ |some\ )?(?:random\b|number\b|card\b).*
    )""",
    _X,
)
_NOT_CREATIVE = re.compile(
    r"(?:give|show)\ me\ the\ name\b|(?:change|generate)\ (?:an?|the)\ (?:user|file|domain)\b"
)

_ELSEWHERE_INSIDE = (
    ("time", ("今天", "现在", "今日", "今の", "天気", "天气", "오늘", "지금")),
    ("personal", ("我的", "私の", "僕の", "내 ", "제 ")),
    ("creative", ("写一", "讲个", "書いて", "써줘")),
)


def refusal_of(question: Question) -> str:
    """ "time", "personal", "creative", or "" where the answer may be given to another asking.

    "My" in a how-to is anybody's ("How do I update my card?"); where something of one's own is asked for, or
    done ("where is my order", "cancel my subscription"), the answer is one person's. Of other languages
    only possessives and a few words of time are known.
    """
    features = (question if question.features else read_question(question.text)).features
    assert features is not None
    normal = features.normal
    if not normal.is_english and (found := _elsewhere(question.text, normal)):
        return found
    clauses = [" ".join(_started(clause)) for clause in normal.clauses]
    if any(_CREATIVE.fullmatch(clause) and not _NOT_CREATIVE.match(clause) for clause in clauses):
        return "creative"
    if _is_personal(question.text, normal, clauses):
        return "personal"
    whole = " ".join(word.lstrip("^") for word in normal.plain)
    if _TIME.search(whole) or (not _asks_how(normal) and _NOW.search(whole)):
        return "time"
    return ""


def _is_personal(text: str, normal: NormalForm, clauses: Sequence[str]) -> bool:
    if any(_PERSONAL.search(clause) for clause in clauses) or _IDENTIFIES.search(text):
        return True
    if _is_introduced(normal):
        return True
    if any(clause.partition(" ")[0] in known.WH for clause in clauses):
        return False
    return any(
        (_COMMAND.fullmatch(clause) and not _NOT_COMMANDS.match(clause)) or _CAN_YOU.fullmatch(clause)
        for clause in clauses
    )


def _is_introduced(normal: NormalForm) -> bool:
    """ "I am Anna", "this is Mr Smith": a name after what introduces one."""
    before = ""
    for token in normal.tokens:
        if token.named and token.text not in known.PEOPLES and before in ("i'm", "i am", "name is", "name's"):
            return True
        before = (
            f"{before.rpartition(' ')[2]} {token.text}".strip() if token.text in ("am", "is") else token.text
        )
    return False


def _asks_how(normal: NormalForm) -> bool:
    return normal.form[:1] == ("<how>",) or any(
        clause[0] == "why" or clause[:3] in (("how", "do", "i"), ("how", "can", "i"))
        for clause in normal.clauses
    )


def _started(clause: Sequence[str]) -> Sequence[str]:
    """Without greetings and openers; one that is all there is may be an answer ("ok")."""
    words = [word.lstrip("^") for word in clause]
    while len(words) > 1 and (words[0] in known.OPENERS or (words[0],) in known.GREETINGS):
        words = words[1:]
    return words


def _elsewhere(text: str, normal: NormalForm) -> str:
    words = frozenset(normal.plain)
    for kind, these in known.ELSEWHERE.items():
        if words & these:
            return kind
    for kind, pieces in _ELSEWHERE_INSIDE:
        if any(piece in text for piece in pieces):
            return kind
    return ""
