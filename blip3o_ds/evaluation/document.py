"""A report as blocks of text, tables and pictures, written as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 0.25em 0.6em; text-align: left; white-space: nowrap; }
th { background: #f2f2f2; }
img { max-width: 100%; }"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `strong` ones are set in bold."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the whole report's."""

    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {_escape(self.text)}"

    def html(self, folder: Path) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """Text."""

    text: str

    def markdown(self) -> str:
        return _escape(self.text)

    def html(self, folder: Path) -> str:
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; all have its length."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """The columns are padded, so that it can be read as it is."""
        marked = [[_escape(f"**{cell.text}**" if cell.strong else cell.text) for cell in row] for row in self.rows]
        lines = [[_escape(name) for name in self.head], *marked]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)

    def html(self, folder: Path) -> str:
        rows = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in self.head)}</tr>"]
        for row in self.rows:
            cells = [f"<b>{html.escape(cell.text)}</b>" if cell.strong else html.escape(cell.text) for cell in row]
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        return "<table>\n" + "\n".join(rows) + "\n</table>"


@dataclass(frozen=True)
class Picture:
    """A PNG file, named relative to the report; HTML holds its content."""

    file: str
    title: str

    def markdown(self) -> str:
        return f"![{self.title}]({self.file})"

    def html(self, folder: Path) -> str:
        content = base64.b64encode((folder / self.file).read_bytes()).decode()
        return f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,{content}">'


Block = Heading | Paragraph | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown, whose tables are also readable as plain text."""
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """The report as a page that needs no other file; pictures are read from `folder`."""
    title = html.escape(next(block.text for block in blocks if isinstance(block, Heading)))
    body = "\n".join(block.html(folder) for block in blocks)
    head = f'<meta charset="utf-8">\n<title>{title}</title>\n<style>\n{_STYLE}\n</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _escape(text: str) -> str:
    """What would end a cell or a line of Markdown is no part of a text."""
    return text.replace("|", "\\|").replace("\n", " ")
