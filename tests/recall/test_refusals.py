"""Whose answers do not carry over to another asking, and whose do."""

from __future__ import annotations

import pytest

from stockpot.recall.questions.question import Question, read_question
from stockpot.recall.questions.refusals import refusal_of

TIME = """
What's the weather in Lisbon?
Is it going to rain tomorrow?
What time is it?
What's the date today?
What's on at the cinema tonight?
Who won the match last night?
What is the current price of gold?
What's the latest news about the strike?
What is the exchange rate from euro to yen?
Convert 30 dollars to pounds
Is the office open right now?
Which films come out next week?
What happened this morning?
Is flight BA 12 delayed?
What was the stock price of Acme yesterday?
Wie ist das Wetter heute?
今天天气怎么样？
""".strip().splitlines()

PERSONAL = """
Where is my order?
Where is order 4711?
What's my balance?
What is my account number?
Cancel my subscription
Please cancel it
Book me a table for two
Can you send me the invoice?
Could you please reschedule my appointment?
I want to close my account
When will my parcel arrive?
Has my refund been processed?
How much do I owe?
What did I order?
My name is Ada, what can I get?
I'm Anna, can you help?
My email is ada@example.org, is that right?
Do I still owe anything?
Yes please
Send the report to Sam
Track my parcel
What's the status of booking X12345?
Wo ist meine Bestellung?
Où est mon colis ?
""".strip().splitlines()

CREATIVE = """
Write a poem about the sea
Tell me a joke
tell me another joke please
Can you write me a short story about a fox?
Imagine you are a pirate
Brainstorm names for a bakery
Give me five ideas for a birthday party
Come up with a slogan
Compose a haiku
Pick a random number
Suggest a name for my cat
Flip a coin
Rewrite this sentence to sound friendlier
Make up a riddle
Another one
Surprise me
""".strip().splitlines()

NONE = """
How do I update my payment card?
How do I cancel my subscription?
Where can I find my invoices?
How can I check my balance?
Can I change my delivery address?
What does my insurance cover?
Why is my broadband slow?
Can my landlord enter the flat?
How do I write a cover letter?
What is a random forest?
How do I open a current account?
What is the capital of France?
What is the news feed algorithm in a social network called?
Who wrote the story of Faust?
What is the difference between a poem and a song?
How does currying work in Haskell?
Do you ship to Norway?
What is buy now pay later?
Can you explain recursion?
I am a student, can I get a discount?
How long does delivery take?
What is the time complexity of quicksort?
How do I track my order?
Can you recommend a good database?
What are my rights as a tenant?
Explain the theory of relativity
Is it possible to book a table online?
How do I set up my email?
What are the opening hours?
Wie ändert man ein Passwort?
""".strip().splitlines()

ACCEPTED_ANYWAY = {"What is the news feed algorithm in a social network called?"}
"""Refused though it need not be: a miss, never a wrong answer."""


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (text, kind)
        for texts, kind in ((TIME, "time"), (PERSONAL, "personal"), (CREATIVE, "creative"))
        for text in texts
    ],
)
def test_what_does_not_carry_over_is_refused(text: str, kind: str) -> None:
    assert refusal_of(read_question(text)) == kind


@pytest.mark.parametrize("text", [text for text in NONE if text not in ACCEPTED_ANYWAY])
def test_what_anybody_may_be_told_is_not(text: str) -> None:
    assert refusal_of(read_question(text)) == ""


def test_a_question_that_was_not_read_is_read() -> None:
    assert refusal_of(Question("Tell me a joke")) == "creative"
