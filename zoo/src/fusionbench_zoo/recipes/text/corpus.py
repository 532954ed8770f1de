"""What pre-training reads: books, and of each source of the tasks the part that is its own."""

from collections.abc import Iterator
from pathlib import Path

from fusionbench_zoo.recipes.text.partition import part_of
from fusionbench_zoo.recipes.text.sources import mails, paragraphs, rated, synsets, verses


def corpus(work: Path) -> Iterator[list[str]]:
    """Documents: each one text, or two that belong together, as the pairs of the tasks do."""
    for text in paragraphs(work):
        yield [text]
    for mail in mails(work):
        if part_of("mails", mail.group) == "pretrain":
            yield [mail.text]
    for sentence in rated(work):
        if part_of("rated", sentence.group) == "pretrain":
            yield [sentence.text]
    for number, (old, new) in verses(work).items():
        if part_of("verses", str(number // 1000)) == "pretrain":
            yield [old, new]
            yield [new, old]
    known = synsets(work)
    for synset in known.values():
        if part_of("synsets", synset.key) == "pretrain":
            yield [f"{', '.join(synset.words)}: {synset.gloss}"]
            for above in synset.hypernyms[:1]:
                yield [synset.gloss, f"a kind of {known[above].words[0]}"]
            for example in synset.examples:
                word = next((w for w in synset.words if w.lower() in example.lower()), None)
                yield [example] if word is None else [example, f"{word}: {synset.gloss}"]
