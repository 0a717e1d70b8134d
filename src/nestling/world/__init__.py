"""The embedded synthetic world: facts, documents, dialogues, rankings and problems from one seed (a side room).

Reading order: streams, language, facts; stories, pages, programs, exercises, documents; turns, dialogues, rubric,
rankings, problems, evaluation; world. It is a test bench with known truth, not a sample of real language.
"""

from nestling.world.world import World

__all__ = ["World"]
