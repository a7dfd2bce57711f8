"""What a style of recall documents offers."""

from __future__ import annotations

import abc
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    sentence: str
    question: str
    answer: str
    subject: str = ""  # as it stands in the sentence and in the question, for styles that trainers use


class Style(abc.ABC):
    """Makes one document; no two of its facts answer the same question."""

    @abc.abstractmethod
    def fact(self) -> Fact: ...

    @abc.abstractmethod
    def noise(self) -> str:
        """A sentence that answers no question; it may mention what facts are about."""

    @abc.abstractmethod
    def unknown_question(self) -> Fact:
        """A question that the document does not answer, with what to say then."""
