"""What differs and means nothing is equal; what is not known to mean nothing is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.recall.questions.normal_form import normal_form
from stockpot.recall.questions.question import compare, read_question
from stockpot.recall.questions.spelling import is_slip

SAME = """
Could you tell me how to get a refund? | How do I get a refund?
Can you tell me if you deliver to Malta? | Do you deliver to Malta?
could you tell me where the nearest office is | Where is the nearest office?
I was wondering if you ship to Norway | Do you ship to Norway?
For orders abroad, how do I claim VAT back? | How do I claim VAT back for orders abroad?
If I cancel, do I get a refund? | Do I get a refund if I cancel?
What does the premium plan cost? | How much is the premium plan?
What's the cost of the premium plan? | how much does the premium plan cost
I'd like to close my account, how do I do that? | How do I close my account?
What's the process for closing my account? | How can I close my account?
Am I able to pay by cheque? | Can I pay by check?
whats 20% of three hundred | What is 20 percent of 300?
Do you open on the third of May? | Do you open on the 3rd of May?
Thanks! How do I log into my account? | HOW DO I LOG IN TO MY ACCOUNT
Hi, quick question: is there parking? Many thanks! | is there  parking
It isn't working, why? | It is not working - why?
How do I organise a conferense? | How do I organize a conferense?
Is the U.K. in Europe? | Is the UK in Europe?
Is 1,500 enough? | Is 1500 enough?
Will it take twenty-five minutes? | Will it take 25 mins?
¿Cómo cancelo? | cómo cancelo
Wie ändere ich mein Passwort? | WIE ÄNDERE ICH MEIN PASSWORT
パスワードを変更する方法は？ | パスワードを変更する方法は
""".strip().splitlines()  # fmt: skip

OTHER = """
How do I use pip in Python 3.10? | How do I use pip in Python 3.1?
What does grep -v do? | What does grep -V do?
Can I ship to the US? | Can I ship to the us?
What is C++? | What is C?
What is C#? | What is C?
How do I fill a form? | How do I file a form?
Is insulin safe? | Is inulin safe?
What is nitrite? | What is nitrate?
How do I treat hypotension? | How do I treat hypertension?
Is it not safe? | Is it safe?
What does "it" mean here? | What does it mean here?
Is -5 bigger than 3? | Is 5 bigger than 3?
What's Steven's number? | What's Stevan's number?
What is a few? | What is few?
How do you handle refunds? | How do I handle refunds?
What is the best way to cook rice? | How do I cook rice?
Should I use tabs? | Can I use tabs?
Am I able to park here? | Am I allowed to park here?
What is 5 < 3? | What is 5 > 3?
How much is 1,000? | How much is 1.000?
Does he trust her? | Does she trust him?
Who beat Brazil? | Who did Brazil beat?
Is the cat on the mat? | Is the mat on the cat?
How do I write to /etc/hosts? | How do I write to /etc/Hosts?
Where do I live? | Where can I live?
How do I please my boss? | How do I my boss?
What is x²? | What is x2?
What are my options for 2-3 days? | What are my options for 23 days?
How do I set it to right? | How do I set it to left?
भारत की राजधानी क्या है | भरत की राजधानी क्या है
Wie lange dauert es? | Wie lang dauert es?
""".strip().splitlines()  # fmt: skip


def is_same(line: str) -> bool:
    first, _, second = line.partition(" | ")
    return compare(read_question(first), read_question(second), 0.99).equal_form


@pytest.mark.parametrize("line", SAME)
def test_what_means_nothing_is_left_out(line: str) -> None:
    assert is_same(line)


@pytest.mark.parametrize("line", OTHER)
def test_what_may_mean_something_stays(line: str) -> None:
    assert not is_same(line)


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("adress", "address"),
        ("chnage", "change"),
        ("accomodation", "accommodation"),
        ("definately", "definitely"),
        ("goverment", "government"),
        ("calender", "calendar"),
        ("seperate", "separate"),
    ],
)
def test_a_slip_is_a_slip_in_both_directions(slip: str, meant: str) -> None:
    assert is_slip(slip, meant)
    assert is_slip(meant, slip)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("desert", "dessert"),
        ("affect", "effect"),
        ("public", "pubic"),
        ("planing", "planning"),
        ("moped", "mopped"),
        ("insulin", "inulin"),
        ("sulfate", "sulfite"),
        ("prescribe", "proscribe"),
        ("mute", "unmute"),
        ("approve", "aprove1"),
        ("Mary", "Marry"),
        ("daniel", "danielle"),
        ("debit", "debt"),
        ("tens", "teens"),
    ],
)
def test_another_word_is_no_slip(first: str, second: str) -> None:
    assert not is_slip(first, second)
    assert not is_slip(second, first)


@given(st.text(max_size=80))
def test_any_text_has_a_form_and_case_or_space_around_do_not_change_it(text: str) -> None:
    form = normal_form(text)
    assert normal_form(f"  {text}\n").form == form.form
    assert bool(form.form) == bool(form.plain)


TO_CANCEL = "how do i cancel the plan without a fee on monday 3 gb"


@given(st.lists(st.sampled_from(TO_CANCEL.split(" ")), max_size=10))
def test_politeness_and_punctuation_change_nothing(words: list[str]) -> None:
    text = " ".join(["what is", *words])
    assert normal_form(f"Hello there, {text} please?!").form == normal_form(text).form
