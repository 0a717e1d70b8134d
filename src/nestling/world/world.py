"""The embedded world: one object from which all synthetic data is drawn.

>>> world = World.generate(seed=1, size="tiny")
>>> document = next(world.documents(seed=1, count=1))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.core.types import Conversation, Document, Labelled, Problem, PromptRow, Ranking
from nestling.world import dialogues, documents, evaluation, moderation, problems, rankings, rubric
from nestling.world.facts import Facts, make_facts
from nestling.world.streams import Stream


@dataclass(frozen=True)
class World:
    """A world that knows what is true in it. Every method is a pure function of its arguments and the world.

    `split` is "train" or "val": they share no wording of a user's turn, no stranger and no persona name;
    `evaluation` is a third, held-out one.
    """

    facts: Facts

    @classmethod
    def generate(cls, seed: int, size: str = "small", language: str = "en") -> World:
        """Make a world: "tiny" has 12 people, "small" 100, "medium" 1000.

        Raises:
            UserError: an unknown size or language.
        """
        return cls(make_facts(seed, size, language))

    def documents(self, seed: int, count: int | None = None, split: str = "train",
                  size: int | None = None) -> Iterator[Document]:
        """Documents for pre-training: `count` of them, or as many as have `size` bytes of text, or endlessly many."""
        total = 0
        for document in documents.documents(self.facts, seed, split, count):
            if size is not None and total >= size:
                return
            total += len(document.text.encode())
            yield document

    def dialogues(self, seed: int, count: int, split: str = "train",
                  kinds: Mapping[str, float] | None = None) -> Iterator[Conversation]:
        """Conversations for fine-tuning; `kinds` gives shares by kind (default `dialogues.SHARES`)."""
        return dialogues.dialogues(self.facts, seed, count, split, kinds)

    def rankings(self, seed: int, count: int, split: str = "train", noise: float = 0.1,
                 disagreement: float = 0.2) -> Iterator[Ranking]:
        """Ranked answers for reward models; `meta["noise_free"]` has the exact scores in order."""
        return rankings.rankings(self.facts, seed, count, split, noise, disagreement)

    def labelled_answers(self, row: PromptRow, texts: Sequence[str], seed: int, noise: float = 0.1,
                         disagreement: float = 0.2) -> Ranking:
        """Anybody's answers to a prompt of this world, marked by a labeller as in `rankings`."""
        stream = Stream(seed, "labeller", *(message.content for message in row.prompt))
        return rankings.labelled(self.facts, stream, row, texts, noise, disagreement)

    def prompts(self, seed: int, count: int, split: str = "train",
                kinds: Mapping[str, float] | None = None) -> Iterator[PromptRow]:
        """Prompts for reinforcement learning; meta is the truth for `score`."""
        return rankings.prompts(self.facts, seed, count, split, kinds)

    def problems(self, seed: int, count: int, split: str = "train") -> Iterator[Problem]:
        """Verifiable problems with chains of thought in `meta["thought"]`."""
        return problems.problems(self.facts, seed, count, split)

    def labelled(self, seed: int, count: int, split: str = "train") -> Iterator[Labelled]:
        """Texts with the categories of moderation that they belong to; `meta["group"]` is the phrase behind a text."""
        return moderation.labelled(self.facts, seed, count, split)

    def evaluation(self, kind: str, seed: int, count: int) -> list[PromptRow]:
        """Held-out rows for a capability (`evaluation.KINDS`)."""
        return evaluation.evaluation(self.facts, kind, seed, count)

    def score(self, meta: Mapping[str, Any], text: str) -> rubric.Score:
        """The true reward of a text as the answer to the prompt with this meta."""
        return rubric.score(self.facts, meta, text)
