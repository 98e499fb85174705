"""A small task with a score: a short English message to a shop becomes a JSON record.

    Hi, Nina here. Please send me three lamps on Friday.
    {"intent":"order","person":"Nina","item":"lamps","quantity":3,"day":"friday"}

The score is exact match of the whole record. Training and held-out messages use different sentences, people and items,
so that a model cannot score by memorizing them: it has to copy the open fields (`person`, `item`) from the message. The
closed fields (`intent`, `day`, numbers) are shared by both splits. A message without a day has `"day": null`.
"""

from __future__ import annotations

import json
import random
from typing import Any

FIELDS = ("intent", "person", "item", "quantity", "day")
SYSTEM = "Turn the message into JSON."

INTENTS = ("order", "cancel", "postpone", "return", "question")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}
LARGEST_QUANTITY = 30

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "order": (
            "Hi, {person} here. Please send me {quantity} {item} on {day}.",
            "I would like to order {quantity} {item} for {day}. Thanks, {person}",
            "{person} needs {quantity} {item} by {day}.",
            "Could we get {quantity} more {item} delivered on {day}? The name is {person}.",
            "Put me down for {quantity} {item}, please. {person}",
            "My name is {person} and I want to buy {quantity} {item}.",
            "Good morning! {quantity} {item} for {person}, to arrive on {day}, please.",
            "Please add {quantity} {item} to the order of {person}.",
            "We are out of {item}. Send {quantity} of them to {person} this {day}.",
            "Can you reserve {quantity} {item} for {person}? Pick-up is on {day}.",
            "{person} asked me to order {quantity} {item}.",
            "Deliver {quantity} {item} to my office on {day}, please. It is for {person}.",
            "Hello, we want {quantity} {item} delivered to {person}.",
        ),
        "cancel": (
            "Please cancel the {quantity} {item} for {person}.",
            "{person} no longer needs the {quantity} {item} that were due on {day}.",
            "Hello, this is {person}. Cancel my {quantity} {item} on {day}, please.",
            "Sorry, we have to cancel {quantity} {item}. Regards, {person}",
            "Forget about the {quantity} {item} for {day}, plans of {person} have changed.",
            "I do not want the {quantity} {item} anymore. {person}",
            "Stop the order of {quantity} {item}! It was for {person}, on {day}.",
            "Cancel the delivery to {person} on {day}: {quantity} {item}.",
            "{person} decided against the {quantity} {item}. Please take them off the list.",
            "There is no need to send {quantity} {item} on {day}. Cheers, {person}",
        ),
        "postpone": (
            "Could you move the {quantity} {item} for {person} to {day}?",
            "{person} will be away, so bring the {quantity} {item} on {day} instead.",
            "Please deliver my {quantity} {item} later, on {day}. {person}",
            "This is {person}. Can the {quantity} {item} wait until {day}?",
            "We must postpone the {quantity} {item} to {day}. Best, {person}",
            "Postpone the delivery for {person}, {quantity} {item}, please.",
            "The {quantity} {item} should come on {day}, not today. Thank you, {person}",
            "Hi, {person} would like to have the {quantity} {item} a bit later than planned.",
            "Change the date for {quantity} {item} to {day}, says {person}.",
            "Not now! Push the {quantity} {item} of {person} back to {day}.",
        ),
        "return": (
            "{person} wants to send back {quantity} {item}.",
            "I have to return {quantity} {item}. Can you fetch them on {day}? {person}",
            "The {quantity} {item} are broken, please take them back on {day}. {person}",
            "Hello, {person} speaking. I am returning {quantity} {item} on {day}.",
            "How can {person} give back {quantity} {item}?",
            "{quantity} {item} did not fit. {person} will return them on {day}.",
            "Please collect {quantity} damaged {item} from {person} on {day}.",
            "We received the wrong {item}, so {person} is sending all {quantity} back.",
            "I am not happy with the {quantity} {item} and want my money back. {person}",
            "Return for {person}: {quantity} {item}, to be picked up {day}.",
        ),
        "question": (
            "Do you have {quantity} {item} in stock? {person} is asking.",
            "What would {quantity} {item} cost? Greetings, {person}",
            "Hi, it is {person}. Are {quantity} {item} available on {day}?",
            "{person} would like to know the price of {quantity} {item}.",
            "Is it possible to get {quantity} {item} on {day}? Just asking, {person}",
            "How much are {quantity} {item}? Please tell {person}.",
            "A question from {person}: will there be {quantity} {item} left on {day}?",
            "Can you tell me whether {quantity} {item} are on sale this {day}? {person}",
            "Where are the {quantity} {item} that {person} should have had on {day}?",
            "{person} wonders if you sell {item}, and how long {quantity} would take.",
        ),
    },
    "heldout": {
        "order": (
            "Hello, please send {quantity} {item} to {person} on {day}.",
            "{person} wants to order {quantity} {item}.",
            "Hi! I need {quantity} {item} by {day}, please. My name is {person}.",
            "Please deliver {quantity} {item} this {day}. Thank you, {person}",
        ),
        "cancel": (
            "Hi, {person} here. Please cancel {quantity} {item}.",
            "Cancel the order for {day}, please: {quantity} {item}. Regards, {person}",
            "{person} does not need the {quantity} {item} on {day} anymore.",
            "We no longer want {quantity} {item}. Sorry, {person}",
        ),
        "postpone": (
            "Hello, {person} here. Can you move my {quantity} {item} to {day}?",
            "Please postpone the {quantity} {item} until {day}. Thanks, {person}",
            "{person} would rather have the {quantity} {item} later, on {day}.",
            "Could the {quantity} {item} for {person} come on {day} instead?",
        ),
        "return": (
            "Hi, this is {person}. I want to return {quantity} {item}.",
            "{person} is sending back {quantity} {item} on {day}.",
            "Please take back {quantity} broken {item} on {day}. Best, {person}",
            "I would like to give back {quantity} {item}. {person}",
        ),
        "question": (
            "Hi, do you have {quantity} {item} on {day}? {person}",
            "{person} asks how much {quantity} {item} would cost.",
            "Are there {quantity} {item} in stock? Thanks, {person}",
            "Can you tell {person} if {quantity} {item} will be available on {day}?",
        ),
    },
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = {
    "train": _words(
        """
        Nina Oscar Laura Peter Maria David Sofia Felix Clara Simon Alice Bruno Diana Hugo Irene Jacob Karen Leon
        Marta Nathan Olivia Paul Rosa Samuel Teresa Victor Wendy Adam Bella Carlos Emma Frank Gloria Henry
        Isabel James Kevin Linda Martin Nora Patrick Rachel Steven Tina Walter Anton Barbara Chris Donna Eric
        Fiona George Helen Ivan Julia Keith Lucy Marcus Nancy Otto Philip Ruth Sarah Thomas Vera William Amanda
        Brian Carol Dennis
        """
    ),
    "heldout": _words(
        """
        Anna Robert Eva Michael Susan Daniel Jane Mark Lisa Andrew Grace Richard Emily Jack Sandra Louis Monica
        Ryan Kate Edward Sophie Max Angela Luke Ellen Roger
        """
    ),
}

ITEMS = {
    "train": _words(
        """
        lamps chairs tables pillows blankets mirrors candles vases clocks shelves cups plates bowls forks knives
        spoons towels baskets boxes bottles jars buckets ropes hammers nails screws ladders brushes rollers
        gloves boots jackets shirts socks hats belts scarves coats shoes umbrellas notebooks pencils folders
        envelopes stamps stickers posters printers cables keyboards monitors batteries cameras phones tablets
        apples oranges bananas lemons carrots onions potatoes tomatoes eggs cakes cookies sandwiches pizzas
        tulips roses magnets helicopters trumpets violins flutes pianos kettles toasters ovens fridges fans heaters
        lanterns torches bulbs wires pumps pipes taps sinks bricks tiles planks panels doors windows gates fences
        hinges locks keys chains hooks clips pins needles threads buttons zippers ribbons fabrics carts wagons
        scooters sleds skis skates rackets balls bats nets kites puzzles dolls robots trains rockets marbles crayons
        markers erasers rulers staplers scissors tapes labels calendars diaries maps globes compasses telescopes
        lenses filters tripods headphones microphones chargers adapters routers drives chips sensors motors gears
        springs bearings valves mattresses cushions sofas stools benches wardrobes drawers hangers irons mops brooms
        sponges soaps shampoos perfumes combs razors bandages pills masks goggles vests aprons gowns suits ties
        sandals slippers wallets purses watches bracelets necklaces earrings plums pears cherries melons mangoes
        peppers cucumbers cabbages radishes walnuts almonds biscuits waffles pancakes donuts noodles dumplings
        sausages lilies orchids ferns
        """
    ),
    "heldout": _words(
        """
        desks curtains carpets glasses pans bags tents helmets sweaters dresses rings books pens magazines
        speakers screens bikes tires peaches grapes mushrooms pies muffins plants drums guitars
        """
    ),
}

Example = dict[str, list[dict[str, str]]]


def templates(split: str) -> list[tuple[str, str]]:
    """Returns every (intent, sentence) of a split, in a fixed order."""
    return [(intent, sentence) for intent in INTENTS for sentence in TEMPLATES[split][intent]]


def generate(split: str, count: int, seed: int) -> list[Example]:
    """Returns `count` conversations of the split `train` or `heldout`; equal arguments give equal conversations.

    All sentences of the split are used in turn, reshuffled each round, so that they are equally frequent.
    Raises ValueError for another split.
    """
    if split not in TEMPLATES:
        raise ValueError(f"split must be one of {', '.join(TEMPLATES)}; got {split!r}")
    rng = random.Random(f"{split} {seed}")
    examples: list[Example] = []
    while len(examples) < count:
        round_of_templates = templates(split)
        rng.shuffle(round_of_templates)
        for intent, sentence in round_of_templates[: count - len(examples)]:
            examples.append(_fill(intent, sentence, split, rng))
    return examples


def target_record(example: Example) -> dict[str, Any]:
    """Returns the record in the assistant's turn of an example."""
    record: dict[str, Any] = json.loads(example["messages"][-1]["content"])
    return record


def prompt_messages(example: Example) -> list[dict[str, str]]:
    """Returns the conversation up to the assistant's turn, which the model continues."""
    return example["messages"][:-1]


def exact_match(answer: str, example: Example) -> bool:
    """Returns whether the first JSON object in `answer` equals the target record: the same keys, values and types.

    Text around the object is ignored, so that an untrained model is judged by its record alone.
    """
    start = answer.find("{")
    try:
        record, _ = json.JSONDecoder().raw_decode(answer, max(start, 0))
    except (ValueError, RecursionError):
        return False
    # Compared as text, because in Python 3 == 3.0 and 1 == True.
    return json.dumps(record, sort_keys=True) == json.dumps(target_record(example), sort_keys=True)


def _fill(intent: str, sentence: str, split: str, rng: random.Random) -> Example:
    quantity = rng.randint(2, 10) if rng.random() < 0.7 else rng.randint(11, LARGEST_QUANTITY)
    written = NUMBER_WORDS[quantity] if quantity in NUMBER_WORDS and rng.random() < 0.5 else str(quantity)
    if sentence.startswith("{quantity}"):
        written = written.capitalize()
    day = rng.choice(DAYS) if "{day}" in sentence else None
    person, item = rng.choice(PEOPLE[split]), rng.choice(ITEMS[split])
    message = sentence.format(person=person, item=item, quantity=written, day=(day or "").capitalize())
    record = dict(zip(FIELDS, (intent, person, item, quantity, day), strict=True))
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(record, separators=(",", ":"))},
        ]
    }
