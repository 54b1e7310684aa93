"""Check that the questions kept for measuring are far enough from those used for training.

    python training/check_heldout.py [FILE ...]      default: heldout.jsonl and dev.jsonl

Promises: exit 0 when in every file each item names an intent of the world, the dialogue before its
wording is one the world allows, and the wording shares at most two thirds of its content words
with any one wording that training can use; else exit 1 with a line for each breach. The rule must
hold twice: with question words (who, where, ...) counted as content and without them. Words are
compared by their stem. The pairs of keywords that `dialogues` forms are wordings as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from world import Intent, Item, content_words, keywords, read_items, read_world

HERE = Path(__file__).parent
FILES = [HERE / "heldout.jsonl", HERE / "dev.jsonl"]


def closest(wording: str, others: dict[str, str], question_words: bool) -> tuple[int, int, str]:
    """Return (shared, own, other): the most content words that one of others shares, the number of
    the wording's own, and that other wording with its intent."""
    own = content_words(wording, question_words)
    best = (0, len(own), "")
    for other, intent in others.items():
        shared = len(own & content_words(other, question_words))
        if shared > best[0]:
            best = (shared, len(own), f"{intent}: {other}")
    return best


def paired(
    wording: str, telling: dict[str, frozenset[str]], question_words: bool
) -> tuple[int, int, str]:
    """Return the same as `closest` for the pairs of `telling` words of any one intent."""
    own = content_words(wording, question_words)
    best = (0, len(own), "")
    for name, words in telling.items():
        shared = min(2, len(own & words))
        if shared > best[0]:
            best = (shared, len(own), f"{name}: a pair of keywords")
    return best


def breaches(
    item: Item,
    intents: dict[str, Intent],
    wordings: dict[str, str],
    telling: dict[str, frozenset[str]],
) -> list[str]:
    """Return what is wrong with one item, a sentence each."""
    if item.intent not in intents:
        return ["no such intent"]
    wrong = []
    answers = {intent.answer: name for name, intent in intents.items()}
    said = [m["content"] for m in item.messages if m["role"] == "assistant"]
    if any(text not in answers for text in said):
        wrong.append("the dialogue holds an answer that is not in the world")
    elif said and answers[said[-1]] not in intents[item.intent].after:
        wrong.append(f"does not follow {answers[said[-1]]}")
    for question_words in (True, False):
        for shared, own, other in (
            closest(item.wording, wordings, question_words),
            paired(item.wording, telling, question_words),
        ):
            if own == 0 or 3 * shared > 2 * own:
                wrong.append(f"shares {shared} of {own} content words with '{other}'")
    return wrong


def check(path: Path, intents: dict[str, Intent]) -> int:
    """Print the breaches of one file and a summary line; return how many there are."""
    wordings = {text: intent.name for intent in intents.values() for text in intent.wordings}
    index = keywords(list(intents.values()))
    telling = {
        name: content_words(" ".join(word for word, users in index.items() if name in users))
        for name in intents
    }
    items = read_items(path)
    count = 0
    for item in items:
        for sentence in breaches(item, intents, wordings, telling):
            print(f"{path.name}: {item.intent}: '{item.wording}' {sentence}")
            count += 1
    later = sum(len(item.messages) > 1 for item in items)
    names = len({item.intent for item in items})
    print(f"{path.name}: {len(items)} items, {later} follow-ups, {names} intents, {count} breaches")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    arguments = parser.parse_args()
    intents = {intent.name: intent for intent in read_world()}
    wordings = {text for intent in intents.values() for text in intent.wordings}
    print(f"{len(intents)} intents, {len(wordings)} different wordings")
    return 1 if sum(check(path, intents) for path in arguments.files) else 0


if __name__ == "__main__":
    sys.exit(main())
