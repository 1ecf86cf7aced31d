"""A row's text: in a column by its name, also inside others with dots, as a string or as a chat."""

from collections.abc import Collection, Iterator, Mapping
from textwrap import shorten
from typing import Any

from transformers import PreTrainedTokenizerBase

from mxdsurgery.errors import DataError, first_line

# Who speaks in chats of messages with from and value, as ShareGPT has them, and what templates call them.
_ROLES = dict.fromkeys(("human", "user"), "user") | {"system": "system"}
_ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant")
_ROLES |= dict.fromkeys(("tool", "function", "function_response", "observation"), "tool")
MOST_NAMES = 300  # characters of the names that an error lists


def top_columns(names: Collection[str], columns: Collection[str]) -> list[str]:
    """The columns that dotted names are in, or are themselves."""
    return [column for column in columns if any(name == column or name.startswith(f"{column}.") for name in names)]


def has_column(name: str, columns: Collection[str]) -> bool:
    """Whether there is such a column, or one that holds such columns; ``columns`` are named with dots inside others."""
    return name in columns or any(column.startswith(f"{name}.") for column in columns)


def no_column(name: str, columns: Collection[str], where: str, flag: str = "--text-column") -> DataError:
    """The error for a column that is not there; ``columns`` are those that are."""
    return DataError(
        f"{where} has no column {name!r}",
        expected=f"one of its columns: {shorten(', '.join(columns), MOST_NAMES)}",
        fix=f"name the column with {flag}",
    )


def dotted_names(row: Mapping[str, Any], depth: int = 4) -> Iterator[str]:
    """The names of a row's columns, those inside others with a dot."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value and depth:
            yield from (f"{name}.{inner}" for inner in dotted_names(value, depth - 1))
        else:
            yield str(name)


def value_in(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, also of one inside others (``doc.text``); None inside one that holds none.

    Raises:
        KeyError: the row has no such column.
    """
    if name in row:
        return row[name]
    for column, value in row.items():
        if name.startswith(f"{column}."):
            if value is None:
                return None
            if isinstance(value, Mapping):
                try:
                    return value_in(value, name[len(column) + 1 :])
                except KeyError:
                    pass
    raise KeyError(name)


def text_in(row: Mapping[str, Any], name: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The text in a column of a row; None where it holds none (null).

    Args:
        row: columns by name.
        name: the column's.
        where: file and line, for people.
        tokenizer: has the template that a chat is written out with; None: there are no chats.

    Raises:
        DataError: no such column, or something else in it.
    """
    try:
        value = value_in(row, name)
    except KeyError:
        raise no_column(name, list(dotted_names(row)), where) from None
    if value is None or isinstance(value, str):
        return value
    if _is_chat(value):
        return _written_out(value, name, where, tokenizer)
    expected, fix = "a column of text", "name the column with --text-column"
    what = type(value).__name__
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        what, fix = "token ids", "give the text that they were made from: another tokenizer's ids say nothing to this model"
    elif isinstance(value, list):
        what = f"a list of {type(value[0]).__name__}" if value else "an empty list"
        expected = "a column of text, or of chats: lists of messages, each with role and content (or from and value)"
    raise DataError(f"{where} holds {what} in its column {name!r}", expected=expected, fix=fix)


def _is_chat(value: object) -> bool:
    """Whether a value is a list of messages: with role and content, or with from and value."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, Mapping)
            and any(isinstance(one.get(who), str) and what in one for who, what in (("role", "content"), ("from", "value")))
            for one in value
        )
    )


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as chat templates know it; Parquet fills in what only other messages have."""
    if isinstance(message.get("role"), str) and "content" in message:
        return {key: value for key, value in message.items() if value is not None or key == "content"}
    role = _ROLES.get(message["from"].strip().lower())
    if role is None:
        raise DataError(
            f"{where} holds a message from {message['from']!r}",
            expected=f"one of {', '.join(_ROLES)}",
            fix="name the speakers so, or write the chat out as one string",
        )
    return {"role": role, "content": message["value"]}


def _written_out(chat: list[dict[str, Any]], name: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError(
            f"{where} holds a chat in its column {name!r}, and the model's tokenizer has no chat template",
            expected="a tokenizer that says how a chat is written out, or a column of text",
            fix="write each chat out as one string, in a column of its own",
        )
    messages = [_message(message, where) for message in chat]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises whatever it likes
        raise DataError(
            f"{where}: the model's chat template refuses the chat in the column {name!r}: {first_line(error)}",
            expected="a chat as the model's template has it",
            fix="leave such chats out, or write them out as strings",
        ) from None
