"""Two zero-shot tasks from a text of one's own, for a machine that reaches no data hub.

    python scripts/make_tasks.py wiki.test.raw tasks
    lightning-gsq test runs/mine --tasks tasks/continuation.yaml,tasks/last_word.yaml --against org/original

* ``continuation``: which of four passages of 16 words follows 48 words? The wrong ones are from other paragraphs of the
  same article, as far from their beginning. Accuracy by likelihood.
* ``last_word``: the word after 64 words, if it occurred among them and has at least five letters. Accuracy of the
  greedy answer.

The text is a paragraph a line; headings as in WikiText (`` = Title = ``) begin an article; a text without any is one.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import yaml

CONTEXT, ENDING, CHOICES = 48, 16, 4
LAST_WORD_CONTEXT, LEAST_LETTERS = 64, 5

CONTINUATION = {
    "task": "continuation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{endings}}",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc"}],
}
LAST_WORD = {
    "task": "last_word",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": " {{word}}",
    "metric_list": [{"metric": "acc"}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="a paragraph a line")
    parser.add_argument("folder", type=Path, help="where the task files go")
    parser.add_argument("--questions", type=int, default=300, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    articles = list(articles_of(options.text.read_text(encoding="utf-8")))
    options.folder.mkdir(parents=True, exist_ok=True)
    for task, found in ((CONTINUATION, continuations), (LAST_WORD, last_words)):
        draw = random.Random(options.seed)
        questions = list(found(articles, draw))
        if len(questions) < options.questions:
            raise SystemExit(f"{options.text} has {len(questions)} questions for {task['task']}: lower --questions")
        write(options.folder, task, draw.sample(questions, options.questions))


def articles_of(text: str) -> Iterator[list[list[str]]]:
    """The paragraphs of each article, as words."""
    article: list[list[str]] = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["="] and words[1:2] != ["="]:
            yield article
            article = []
        elif words and words[0] != "=":
            article.append(words)
    yield article


def continuations(articles: list[list[list[str]]], draw: random.Random) -> Iterator[dict[str, object]]:
    """A question for each paragraph that is long enough and has enough others beside it."""
    end = CONTEXT + ENDING
    for article in articles:
        long = [paragraph for paragraph in article if len(paragraph) >= end]
        if len(long) < CHOICES:
            continue
        for number, paragraph in enumerate(long):
            others = draw.sample([other for index, other in enumerate(long) if index != number], CHOICES - 1)
            right = draw.randrange(CHOICES)
            options = [*others[:right], paragraph, *others[right:]]
            endings = [" ".join(words[CONTEXT:end]) for words in options]
            yield {"context": " ".join(paragraph[:CONTEXT]), "endings": endings, "right": right}


def last_words(articles: list[list[list[str]]], draw: random.Random) -> Iterator[dict[str, object]]:
    """A question for each paragraph with a word that was there before, drawn among those that are."""
    for paragraph in (paragraph for article in articles for paragraph in article):
        places = [
            place
            for place in range(LAST_WORD_CONTEXT, len(paragraph))
            if paragraph[place].isalpha()
            and len(paragraph[place]) >= LEAST_LETTERS
            and paragraph[place] in paragraph[place - LAST_WORD_CONTEXT : place]
        ]
        if places:
            place = draw.choice(places)
            yield {"context": " ".join(paragraph[place - LAST_WORD_CONTEXT : place]), "word": paragraph[place]}


def write(folder: Path, task: dict[str, object], questions: list[dict[str, object]]) -> None:
    """The task file, and its data beside it."""
    data = f"{task['task']}.jsonl"
    with (folder / data).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    settings = {**task, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"}
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
