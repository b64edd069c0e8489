"""Text that may be shown: no secrets, no control characters; and settings that must hold no secret.

Credentials come from the environment or the SDK's own chain, so nothing of ours needs to hold one. What slips in by way
of a URL or a library's message is taken out where errors and log lines are made.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
SECRET_NAMES = r"secret|passw(?:or)?d|token|signature|credential|(?:access|private|api|account|shared)[._-]?key"
"""Of settings, parameters and variables, in a regular expression; also Spark's."""
_USER_INFO = re.compile(r"(?<=://)[^/@:\s]*:(?!\d+(?:/|$))[^@\s]+(?=@)")
"""`KEY:SECRET` of `s3://KEY:SECRET@bucket`; not the port of `hdfs://host:9000/a@b`."""
_PARAMETER = re.compile(rf"([?&;](?:[\w.-]*(?:{SECRET_NAMES})[\w.-]*|sig|key)=)[^&;\s'\"]+", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    rf"([\w.-]*(?:{SECRET_NAMES})[\w.-]*(?:=|['\"]\s*[:=]\s*)['\"]?)(?!\*\*\*)[^\s'\",;&)]+", re.IGNORECASE
)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_ENVIRONMENT = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_SECRET_SETTING = re.compile(SECRET_NAMES, re.IGNORECASE)
_NAMES_A_PLACE = re.compile(r"(providers?|file|path|type|class|enabled)$|\.secrets\.|secretKeyRef", re.IGNORECASE)
"""Settings of Spark and Hadoop that say where a secret is, not what it is."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""All that moves a cursor, colours, rings or turns the direction of writing, but line feeds and tabs."""


def redact(text: str) -> str:
    """The text without what looks like a secret, and without the credentials of this process's environment."""
    text = _KEY_ID.sub(HIDDEN, _USER_INFO.sub(HIDDEN, text))
    text = _ASSIGNMENT.sub(rf"\g<1>{HIDDEN}", _PARAMETER.sub(rf"\g<1>{HIDDEN}", text))
    for name in _ENVIRONMENT:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one would blank out words
            text = text.replace(value, HIDDEN)
    return text


def printable(text: str) -> str:
    """The text for a terminal: control characters, which can rewrite what was printed before, become `\\ufffd`."""
    return _CONTROL.sub("\ufffd", text)


def holds_secret(text: str) -> bool:
    """Whether a value, a URL most likely, carries a key or a secret."""
    return any(pattern.search(text) for pattern in (_USER_INFO, _PARAMETER, _KEY_ID))


def secrets_in(tree: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the settings that hold a key or a secret, in a tree of plain values."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            dotted = f"{name}.{key}" if name else str(key)
            if isinstance(value, str) and _SECRET_SETTING.search(str(key)) and not _NAMES_A_PLACE.search(str(key)):
                yield redact(dotted)
            else:
                yield from secrets_in(value, dotted)
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from secrets_in(value, f"{name}[{place}]")
    elif isinstance(tree, str) and (holds_secret(tree) or re.search(rf"-D\S*(?:{SECRET_NAMES})\S*=", tree, re.I)):
        yield redact(name)


class Redacting(logging.Filter):
    """Takes secrets and control characters out of every line of a log's handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record's text; none is held back."""
        record.msg, record.args = printable(redact(record.getMessage())), ()
        return True
