"""Closed lists of English words and phrases that readings of questions know: data, no rules."""

from __future__ import annotations

from typing import Final


def words_of(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def _pairs(text: str) -> dict[str, str]:
    """`a=b c=d`: `_` in a value is a space."""
    return {left: right.replace("_", " ") for left, right in (pair.split("=") for pair in text.split())}


def _phrases(text: str) -> tuple[tuple[str, ...], ...]:
    """Longest first; `_` between the words of one."""
    return tuple(sorted({tuple(each.split("_")) for each in text.split()}, key=len, reverse=True))


ENGLISH: Final = words_of(
    "the what how does my you your where when why who which of to and for with should would"
    " could there this"
    " that are have from please not about it can do is i in a if has was were will need me at without"
    " whats hows cant dont doesnt isnt"
)
NOT_ENGLISH: Final = words_of(
    "der das und ist nicht ich wie wo kann mein meine ein eine für mit zu le la les des du est"
    " je mon ma mes"
    " comment où pour avec une el los las que qué cómo como mi es un una por para dónde il lo gli che di"
    " per con non mio mia het een ik mijn hoe waar niet van met o os não meu minha och jag är min inte hur"
)
CONTRACTIONS: Final = _pairs(
    "whats=what_is hows=how_is wheres=where_is whos=who_is whens=when_is thats=that_is theres=there_is"
    " cannot=can_not cant=can_not dont=do_not doesnt=does_not didnt=did_not isnt=is_not arent=are_not"
    " wasnt=was_not werent=were_not havent=have_not hasnt=has_not hadnt=had_not wouldnt=would_not"
    " couldnt=could_not shouldnt=should_not wont=will_not mustnt=must_not neednt=need_not"
    " im=i_am ive=i_have"
    " youre=you_are youve=you_have theyre=they_are theyve=they_have weve=we_have couldve=could_have"
    " gonna=going_to wanna=want_to gotta=got_to"
    " can't=can_not won't=will_not shan't=shall_not i'm=i_am"
)
TAKES_IS: Final = words_of("what where who how when why that there it he she here which everything something")
"""Words whose 's is a contraction of `is` (as good as always, in a question)."""

SPELLINGS: Final = _pairs(
    "colour=color favourite=favorite favour=favor behaviour=behavior neighbour=neighbor"
    " neighbours=neighbors"
    " labour=labor honour=honor rumour=rumor odour=odor flavour=flavor flavours=flavors harbour=harbor"
    " centre=center centres=centers theatre=theater theatres=theaters litre=liter litres=liters metre=meter"
    " metres=meters fibre=fiber kilometre=kilometer kilometres=kilometers millimetre=millimeter"
    " millimetres=millimeters centimetre=centimeter centimetres=centimeters calibre=caliber"
    " organise=organize organised=organized organisation=organization organisations=organizations"
    " recognise=recognize recognised=recognized realise=realize authorise=authorize authorised=authorized"
    " authorisation=authorization customise=customize customised=customized optimise=optimize"
    " optimised=optimized optimisation=optimization initialise=initialize initialised=initialized"
    " normalise=normalize serialise=serialize summarise=summarize synchronise=synchronize"
    " apologise=apologize"
    " prioritise=prioritize minimise=minimize maximise=maximize finalise=finalize specialise=specialize"
    " specialised=specialized utilise=utilize visualise=visualize capitalise=capitalize"
    " categorise=categorize"
    " analyse=analyze analysed=analyzed catalyse=catalyze paralysed=paralyzed defence=defense"
    " offence=offense"
    " licence=license licences=licenses practise=practice cancelled=canceled cancelling=canceling"
    " travelling=traveling travelled=traveled traveller=traveler travellers=travelers labelled=labeled"
    " labelling=labeling modelling=modeling signalling=signaling fuelled=fueled jewellery=jewelry"
    " enrol=enroll enrols=enrolls enrolment=enrollment instal=install instalment=installment"
    " instalments=installments fulfil=fulfill fulfilment=fulfillment skilful=skillful grey=gray tyre=tire"
    " tyres=tires cheque=check cheques=checks programme=program programmes=programs catalogue=catalog"
    " dialogue=dialog aluminium=aluminum pyjamas=pajamas mum=mom mums=moms plough=plow sceptical=skeptical"
    " anaesthetic=anesthetic paediatric=pediatric diarrhoea=diarrhea oestrogen=estrogen"
    " haemoglobin=hemoglobin"
    " foetus=fetus ageing=aging judgement=judgment acknowledgement=acknowledgment whilst=while"
    " amongst=among"
    " towards=toward afterwards=afterward learnt=learned burnt=burned spelt=spelled dreamt=dreamed"
    " mould=mold moustache=mustache sulphur=sulfur kerb=curb storey=story cosy=cozy draught=draft"
)
"""British to American. Words that mean more there (`cheque`, `tyre`) meet their other"
" sense in no like question."""

SYNONYMS: Final = _pairs(
    "quickest=fastest begin=start begins=starts beginning=starting purchase=buy purchasing=buying"
    " photo=photograph photos=photographs tv=television fridge=refrigerator bicycle=bike bicycles=bikes"
    " kids=children kid=child okay=ok 2fa=2_factor_authentication"
    " wifi=wi_fi info=information percent=% phoning=calling"
    " asap=as_soon_as_possible cellphone=cell_phone timetable=schedule mobiles=mobile_phones"
    " uk=united_kingdom"
)
"""Words with one meaning each, the same for both (read after spelling)."""

FUSED: Final[dict[tuple[str, str], list[str]]] = {
    ("e", "mail"): ["email"],
    ("e", "mails"): ["emails"],
    ("web", "site"): ["website"],
    ("per", "cent"): ["%"],
    ("log", "into"): ["log", "in", "to"],
    ("sign", "into"): ["sign", "in", "to"],
}
"""Two words and what is written for them too."""

CASE_TELLS: Final = words_of(
    "us it who aids er ira polish turkey china march may will mark bill sue rob pat bath"
)
"""Words that are names or acronyms where they are capitalised, and something else where they are not."""

MONTHS: Final = words_of(
    "january february march april may june july august september october november december"
)
WEEKDAYS: Final = words_of("monday tuesday wednesday thursday friday saturday sunday")

NUMBER_WORDS: Final = {
    word: int(value)
    for word, value in _pairs(
        "zero=0 one=1 two=2 three=3 four=4 five=5 six=6 seven=7 eight=8 nine=9 ten=10 eleven=11 twelve=12"
        " thirteen=13 fourteen=14 fifteen=15 sixteen=16 seventeen=17 eighteen=18 nineteen=19"
        " twenty=20 thirty=30"
        " forty=40 fifty=50 sixty=60 seventy=70 eighty=80 ninety=90"
    ).items()
}
SCALES: Final = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
ORDINALS: Final = _pairs(
    "first=1st third=3rd fourth=4th fifth=5th sixth=6th seventh=7th eighth=8th ninth=9th"
    " tenth=10th eleventh=11th"
    " twelfth=12th"
)
"""Without `second`, which is also a time."""
UNITS: Final = {
    unit: unit
    for unit in words_of(
        "kg g mg lb oz km m cm mm mile mph kb mb gb tb ml l hour minute second day week month year"
        " am pm % gbp euro"
        " dollar pence cent user person degree kw kwh bit byte"
    )
} | _pairs(
    "kilogram=kg kilograms=kg kilo=kg kilos=kg kgs=kg gram=g grams=g lbs=lb ounce=oz ounces=oz kilometer=km"
    " kilometers=km miles=mile centimeter=cm centimeters=cm millimeter=mm millimeters=mm meter=m meters=m"
    " megabyte=mb megabytes=mb gigabyte=gb gigabytes=gb terabyte=tb terabytes=tb hours=hour hrs=hour hr=hour"
    " minutes=minute mins=minute min=minute secs=second seconds=second days=day weeks=week months=month"
    " years=year yrs=year yr=year percent=% liter=l liters=l users=user people=person dollars=dollar"
    " usd=dollar euros=euro eur=euro degrees=degree cents=cent bits=bit bytes=byte"
)
"""After a number, what it counts: as it is written, and the name used here."""
SPANS: Final = words_of("second minute hour day week month year")
NEGATIONS: Final = words_of(
    "not no never without none nobody nothing neither nor cannot avoid except stop prevent"
    " fail refuse unable"
    " instead lack non hardly rarely"
)
NEGATED: Final = words_of(
    "nonmember nonmembers nontaxable nonrefundable nontransferable nonsmoking nonresident nonresidents unable"
    " unavailable unlike unlikely unpaid unused unlimited unsafe unlawful unfair unwanted"
)
"""Words whose beginning negates them."""
GREETINGS: Final = _phrases(
    "hi hello hey hiya greetings howdy morning good_morning good_afternoon good_evening good_day hi_there"
    " hello_there hey_there hi_team hello_team hi_all hello_all hi_everyone hello_everyone hi_folks hi_guys"
    " dear_team dear_all um uh er erm hmm ah oh okay ok excuse_me sorry sorry_to_bother_you"
    " apologies please"
    " quick_question quick_1 silly_question stupid_question a_quick_question just_a_quick_question"
    " 1_quick_question i_have_a_question i_have_a_quick_question"
    " just_curious out_of_curiosity thanks but"
)
"""What may stand before a question. `but` only after another."""
DOUBTFUL_GREETINGS: Final = _phrases("morning sorry please but thanks ok okay oh apologies wondering")
HESITATIONS: Final = words_of("um uh erm hmm")
OPENERS: Final = words_of("so well and right anyway alright but")
"""The same, only right before a question word."""
FAREWELLS: Final = _phrases(
    "please thanks thank_you thank_you_very_much thanks_very_much many_thanks thanks_in_advance"
    " thank_you_in_advance cheers ta thx thanks_a_lot thank_you_so_much much_appreciated kind_regards"
    " best_regards regards"
)
TELL_ME: Final = _phrases(
    "can_you_tell_me could_you_tell_me would_you_tell_me can_you_let_me_know could_you_let_me_know"
    " tell_me let_me_know do_you_know i_would_like_to_know i_want_to_know i_need_to_know i_wonder"
    " i_was_wondering i_am_wondering would_you_mind_telling_me i_just_wanted_to_know any_idea"
    " would_you_be_able_to_tell_me do_you_happen_to_know can_you_please_tell_me could_you_please_tell_me"
    " please_tell_me please_let_me_know wondering just_wondering can_anyone_tell_me does_anyone_know"
)

WH: Final = words_of("what how where when why who which whose whom")
AUXILIARIES: Final = words_of(
    "is are was were do does did can could will would shall should may might must has have had am"
)
PREPOSITIONS: Final = words_of(
    "on at in near for to with from during by under through inside outside using without"
    " before after within"
    " over about if when as"
)
PRONOUNS: Final = words_of("i you we they he she it there this that one someone anyone")

KNOWN_RARE: Final = words_of(
    "pubic inulin immanent proscribe hypotension hypertension prednisolone prednisone stationery ingenuous"
    " discreet discrete causal casual martial marital unclear nuclear trial trail"
)
"""Words a list of frequent ones lacks that look like slips of others."""
NAMES: Final = words_of(
    "steven stephen stephan brian bryan katherine catherine kathryn sarah sara philip phillip"
    " geoffrey jeffrey"
    " michael michelle daniel danielle robert roberta joseph josephine richard anthony antonia marie maria"
    " mariah anne anna annie hannah hanna alexander alexandra alexandria william williams johnson johnston"
    " thompson thomson anderson andersen peterson petersen harrison jackson roberts robertson"
    " edward edwards"
    " allison alison lauren laurence lawrence rebecca deborah debra nicholas nicolas jonathan"
    " matthew mathew"
    " martin martina christian christina christine kristin kristen elizabeth elisabeth isabel isabelle"
    " gabriel gabrielle louise louisa charles charlie charlotte carolyn caroline carol karen karin andrew"
    " andrea adrian adriana patrick patricia"
    " england ireland iceland scotland london manchester edinburgh bristol glasgow birmingham liverpool"
    " america australia austria germany france canada brazil portugal slovakia slovenia niger nigeria"
    " dominica iran iraq mali malawi sweden switzerland"
)

PEOPLES: Final = words_of(
    "british english scottish welsh irish american canadian australian german french spanish italian dutch"
    " polish indian chinese japanese european african asian muslim christian jewish hindu catholic"
)
"""What one says one is without giving a name."""

ELSEWHERE: Final = {
    "time": words_of(
        "heute jetzt aktuell morgen gestern wetter aujourd'hui maintenant demain hier météo"
        " actuel actuelle hoy ahora mañana ayer tiempo actual oggi adesso domani ieri vandaag"
        " nieuws hoje agora amanhã idag imorgon сегодня сейчас завтра погода"
    ),
    "personal": words_of(
        "mein meine meinen meiner meinem meins ich mon ma mes moi mi mis mío mio mia miei mie"
        " mijn meu minha meus minhas min mitt mina мой моя мои моё мне"
    ),
    "creative": words_of(
        "schreib schreibe erfinde dichte witz gedicht écris écrivez invente poème blague escribe"
        " inventa poema chiste scrivi poesia barzelletta schrijf verzin escreva piada skriv напиши"
        " придумай"
    ),
}
"""Words of other languages that make a question one of these kinds."""
