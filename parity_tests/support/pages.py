"""Pages of the documentation, as a reader uses them."""

import re


def pasted(page: str) -> dict[str, object]:
    """Runs a page's blocks of Python one after the other, and returns the names that they made.

    Every block of the page must be Python.
    """
    codes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(codes) == page.count("```") / 2
    names: dict[str, object] = {"__name__": "page"}
    for code in codes:
        exec(code, names)  # noqa: S102
    return names
