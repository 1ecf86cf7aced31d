"""What a text gives away is found in time that grows with the text and no faster, whoever wrote it."""

import subprocess
import sys

import pytest

from mxdsurgery.disclosure import disclosures, masked

# Pieces of which a text is made that keeps patterns busy: each begins something that the rest does not end.
PIECES = [
    "token=",
    "token=a!",
    "secret",
    "sk-",
    "bearer ",
    "://a:",
    "?key=",
    "-----BEGIN ",
    '"/a',
    " ",
    "- /a ",
    "/home/me/x ",
]
# Of "token=" a text of this length took more than a minute; all of these take some seconds together.
ALL = """
import sys
from mxdsurgery.disclosure import disclosures
for piece in sys.argv[1:]:
    disclosures(piece * (300_000 // len(piece)))
"""


def test_no_text_takes_longer_than_its_length_says():
    done = subprocess.run([sys.executable, "-c", ALL, *PIECES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token=abcdefghijk1", "token=[a secret by its name]"),
        ("token=token=token=abcdefghijk1", "token=[a secret by its name]"),
        ("password: correcthorsebattery!9", "password: [a secret by its name]!9"),
        ("token=" * 100 + "!" * 200 + "7", "token=" * 100 + "!" * 200 + "7"),
        ("sk-" + "abc-" * 6 + "1", "[an OpenAI key]"),
        ("sk-" + "abc-" * 6, "sk-" + "abc-" * 6),
        ("x sk-" + "a" * 30 + " sk-" + "a" * 30 + "1", "x sk-" + "a" * 30 + " [an OpenAI key]"),
        ("Authorization: bearer abcdefgh1234.x", "Authorization: bearer [a bearer token]"),
    ],
)
def test_a_value_is_a_secret_if_it_holds_letters_and_digits(text, shown):
    assert masked(text) == shown


def test_lines_are_counted_from_the_beginning():
    text = "\n".join(f"x{n} /home/me/{n}" if n % 3 else "nothing" for n in range(1, 31))
    assert [finding.line for finding in disclosures(text)] == [n for n in range(1, 31) if n % 3]
