"""The README stays short, and its examples run as written."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\nb\n```sh\nls\n```\n```python\ny = 2\n```\n"
    assert python_blocks(text) == ["x = 1\n", "y = 2\n"]


def test_readme_has_at_most_120_lines():
    assert len(README.read_text().splitlines()) <= 120


def test_readme_examples_run():
    blocks = python_blocks(README.read_text())
    assert blocks
    namespace = {"__name__": "readme"}
    for block in blocks:  # one after the other, as a reader would paste them
        exec(compile(block, str(README), "exec"), namespace)
