"""Makes the quickstart's rows: short English requests, each answered by one strict JSON call.

    Put 48.20 euros for the taxi on 14 March 2026 under travel
    {"call":"add_expense","amount":48.20,"currency":"EUR","category":"travel","date":"2026-03-14"}

Amounts and dates of the held-out rows occur in no training row, so a right answer was read, not remembered.

    python recipes/quickstart/make_data.py [FOLDER]
"""

from __future__ import annotations

import datetime
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

SEED = 7
N_TRAIN, N_HELD_OUT = 560, 64
SYSTEM = "Reply with one JSON call."
FIRST_DAY, N_DAYS = datetime.date(2025, 1, 1), 5 * 365

CURRENCIES = {
    "EUR": ("{} euros", "€{}", "EUR {}"),
    "USD": ("{} dollars", "${}", "USD {}"),
    "GBP": ("{} pounds", "£{}"),
}
CATEGORIES = {
    "travel": ("the taxi", "a train ticket", "the flight", "parking"),
    "food": ("lunch", "dinner", "groceries", "coffee"),
    "office": ("paper", "a keyboard", "printer ink", "a desk lamp"),
    "health": ("the pharmacy", "the dentist", "new glasses"),
}
TOPICS = ("call the bank", "water the plants", "pay the rent", "send the report", "renew the passport")
EXPENSES = (
    "Put {amount} for {item} on {date} under {category}",
    "I paid {amount} for {item} on {date}, that is {category}",
    "{category}: {item}, {amount}, {date}",
    "Log {item} as {category}: {amount} on {date}",
)
REMINDERS = (
    "Remind me to {topic} on {date} at {time}",
    "On {date} at {time} I have to {topic}",
    "Set a reminder for {date}, {time}: {topic}",
)
TABLES = (
    "Book a table for {guests} on {date} at {time}",
    "We are {guests}, table please, {date} at {time}",
    "Table at {time} on {date}, {guests} people",
)
Row = tuple[str, str, frozenset[str]]


class Values:
    """Random amounts and dates of one side: every fifth value is held out, the others are trained on."""

    def __init__(self, rng: random.Random, *, held_out: bool) -> None:
        self.rng = rng
        self.held_out = held_out

    def number(self, first: int, end: int) -> int:
        """A number of this side, from ``first`` to below ``end``."""
        while True:
            value = self.rng.randrange(first, end)
            if (value % 5 == 0) == self.held_out:
                return value

    def amount(self) -> str:
        cents = self.number(100, self.rng.choice((1_000, 10_000, 100_000)))
        return f"{cents // 100}.{cents % 100:02}"

    def date(self) -> datetime.date:
        """Any day, but half of them before the 10th and a quarter the 10th, 20th or 30th.

        To tell 3 March from 30 March, and to write 03 for the one, is the hardest thing to learn here.
        """
        kind = self.rng.choice(("short", "short", "round", "other"))
        while True:
            date = FIRST_DAY + datetime.timedelta(days=self.number(0, N_DAYS))
            if kind == ("short" if date.day < 10 else "round" if date.day % 10 == 0 else "other"):
                return date


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    rng = random.Random(SEED)
    train = make_rows(Values(rng, held_out=False), N_TRAIN)
    held_out = make_rows(Values(rng, held_out=True), N_HELD_OUT)
    check_apart(train, held_out)
    for name, rows in (("train", train), ("held_out", held_out)):
        write_rows(folder / f"{name}.jsonl", rows)
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def make_rows(values: Values, n: int) -> list[Row]:
    """``n`` rows with different requests, half of them expenses."""
    makers: tuple[Callable[[Values], Row], ...] = (make_expense, make_expense, make_reminder, make_table)
    rows: dict[str, Row] = {}
    while len(rows) < n:
        row = makers[len(rows) % len(makers)](values)
        rows[row[0]] = row
    return list(rows.values())


def make_expense(values: Values) -> Row:
    rng, amount, date = values.rng, values.amount(), values.date()
    currency = rng.choice(tuple(CURRENCIES))
    category = rng.choice(tuple(CATEGORIES))
    request = rng.choice(EXPENSES).format(
        amount=rng.choice(CURRENCIES[currency]).format(amount),
        item=rng.choice(CATEGORIES[category]),
        date=spell_date(rng, date),
        category=category,
    )
    call = f'{{"call":"add_expense","amount":{amount},"currency":"{currency}","category":"{category}",'
    return request, f'{call}"date":"{date}"}}', frozenset({amount, str(date)})


def make_reminder(values: Values) -> Row:
    rng, date = values.rng, values.date()
    topic, hour, minute = rng.choice(TOPICS), rng.randrange(7, 22), rng.choice((0, 15, 30, 45))
    time = f"{hour:02}:{minute:02}"
    request = rng.choice(REMINDERS).format(topic=topic, date=spell_date(rng, date), time=time)
    call = f'{{"call":"add_reminder","topic":"{topic}","date":"{date}","time":"{time}"}}'
    return request, call, frozenset({str(date)})


def make_table(values: Values) -> Row:
    rng, date = values.rng, values.date()
    guests, time = rng.randrange(2, 13), f"{rng.randrange(17, 22)}:{rng.choice((0, 15, 30, 45)):02}"
    request = rng.choice(TABLES).format(guests=guests, date=spell_date(rng, date), time=time)
    call = f'{{"call":"book_table","guests":{guests},"date":"{date}","time":"{time}"}}'
    return request, call, frozenset({str(date)})


def spell_date(rng: random.Random, date: datetime.date) -> str:
    """The date as people write it, never ambiguous: 14 March 2026, March 14, 2026 or 2026-03-14."""
    month = MONTHS[date.month - 1]
    return rng.choice((f"{date.day} {month} {date.year}", f"{month} {date.day}, {date.year}", str(date)))


MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


def check_apart(train: list[Row], held_out: list[Row]) -> None:
    """None if no request and no amount or date of the held-out rows occurs among the training rows."""
    seen = frozenset().union(*(values for _, _, values in train))
    requests = {request for request, _, _ in train}
    for request, answer, values in held_out:
        assert request not in requests, request
        assert not values & seen, (request, values & seen)
        json.loads(answer)


def write_rows(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for request, answer, _ in rows:
            roles = (("system", SYSTEM), ("user", request), ("assistant", answer))
            messages = [{"role": role, "content": content} for role, content in roles]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
