"""Every set of data that is read from files, by its folder."""

from absorber.bench.data import documents
from absorber.bench.data_sets import examples, questions, summarized

ASKED = {
    "ag_news": lambda folder, split: examples("ag_news", folder, split),
    "trec": lambda folder, split: examples("trec", folder, split),
    "banking77": lambda folder, split: examples("banking77", folder, split),
    "musique": questions,
    "samsum": lambda folder, split: summarized("samsum", folder, split),
    "squality": lambda folder, split: summarized("squality", folder, split),
}
"""What the asking tasks read."""

READ = {
    "novels": lambda folder, split: documents("books", folder, split),
    "wikitext2": lambda folder, split: documents("encyclopedia", folder, split),
    "talks": lambda folder, split: documents("dialogues", folder, split),
}
"""What streams are made of; talks are the dialogues of samsum without their summaries."""
