"""The demo: a world of fictitious people, and the small base model that is shipped for it in `demo/base`."""

from llmeraser_jax.demo.people import (
    DemoData,
    Document,
    Person,
    QuestionAnswer,
    TextSource,
    general_facts,
    is_directory_name,
    make_directory,
    question_about,
    write_demo_files,
)

__all__ = [
    "DemoData",
    "Document",
    "Person",
    "QuestionAnswer",
    "TextSource",
    "general_facts",
    "is_directory_name",
    "make_directory",
    "question_about",
    "write_demo_files",
]
