"""README for package indexes, whose pages have no files beside them. Everything else stands in
pyproject.toml.

Links to files of this repository become absolute where `[project.urls]` has a `Source` (as on
GitHub: /blob/ and /raw/); without one a link becomes its text, and an image what it shows in words.
"""

import pathlib
import re

from setuptools import setup

HERE = pathlib.Path(__file__).parent


def source() -> "str | None":
    """The address of the repository, from pyproject.toml; there is no tomllib in Python 3.10."""
    urls = re.search(
        r"^\[project\.urls\]\n(.*?)(?=^\[|\Z)",
        (HERE / "pyproject.toml").read_text("utf-8"),
        re.M | re.S,
    )
    found = urls and re.search(r'^Source\s*=\s*"(.*?)/?"', urls[1], re.M | re.I)
    return found[1] if found else None


def for_index(text: str, url: "str | None") -> str:
    """`text` without links that lead nowhere on a page of its own."""

    def replaced(link: "re.Match[str]") -> str:
        image, shown, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        if url is None:
            return f"*({shown}: a figure in `{target}`)*" if image else shown
        return f"{image}[{shown}]({url}/{'raw' if image else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)", replaced, text)


if __name__ == "__main__":
    readme = (HERE / "README.md").read_text("utf-8")
    setup(
        long_description=for_index(readme, source()), long_description_content_type="text/markdown"
    )
