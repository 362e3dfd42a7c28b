"""Somebody's data, read once: rows to chats, split by group, tokens and loss mask, and everything that is wrong with it."""

from fourscore.data.check import Check, check_text, check_view
from fourscore.data.draft import draft_study
from fourscore.data.prepare import prepare, trivial_answer
from fourscore.data.rows import PARTS, Part, Row, read_rows, write_rows
from fourscore.data.template import Rendered, answer_ids, end_of_turn, prompt_hash, render_prompt, render_row

__all__ = [
    "PARTS",
    "Check",
    "Part",
    "Rendered",
    "Row",
    "answer_ids",
    "check_text",
    "check_view",
    "draft_study",
    "end_of_turn",
    "prepare",
    "prompt_hash",
    "read_rows",
    "render_prompt",
    "render_row",
    "trivial_answer",
    "write_rows",
]
