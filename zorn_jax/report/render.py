"""A report as one HTML page, and as Markdown."""

import base64
import html
import pathlib
import urllib.parse

from zorn_jax.report import claims, document as documents
from zorn_jax.report.document import (
  Document,
  Fold,
  Pictures,
  Section,
  Table,
  Text,
)

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2330; background: #fff;
  margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 84rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid #d7dbe2; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .6rem 0; overflow-wrap: anywhere; }
nav { font-size: .9rem; }
nav a { display: inline-block; margin-right: .9rem; padding: .15rem 0; }
a { color: #1f5fa8; }
.scroll { overflow-x: auto; margin: .8rem 0; border: 1px solid #d7dbe2;
  border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid #e8ebf0; min-width: 3rem; }
td { font-variant-numeric: tabular-nums; }
td.long { min-width: 15rem; overflow-wrap: anywhere; }
td.short { white-space: nowrap; }
th { background: #f3f5f8; font-weight: 600; vertical-align: bottom; }
tr:last-child td { border-bottom: 0; }
@media (max-width: 40rem) {
  td.long { min-width: 9rem; }
  td:first-child.short { white-space: normal; }
  td .word { white-space: normal; border-radius: 8px; }
}
.pictures { display: grid; gap: .8rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.pictures img { display: block; width: 100%; max-width: 30rem; height: auto; }
.word { display: inline-block; padding: 0 .5rem; border-radius: 999px;
  white-space: nowrap; font-weight: 600; }
.yes { background: #dff3e1; color: #14532d; }
.no { background: #fde2dd; color: #7f1d1d; }
.open { background: #eceff4; color: #39424f; }
details { margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; padding: .2rem 0; }
pre { overflow-x: auto; background: #f3f5f8; padding: .6rem;
  border-radius: 6px; font-size: .8rem; }
"""

_CLASSES = {
  claims.CONFIRMED: "yes",
  claims.REFUTED: "no",
  claims.UNTESTED: "open",
  documents.INTERRUPTED: "no",
}


def as_html(document: Document) -> str:
  """One page that needs no other file and no network."""
  sections = document.sections
  links = "".join(
    f'<a href="#s{i}">{html.escape(section.title)}</a>'
    for i, section in enumerate(sections)
  )
  body = "\n".join(_section(i, section) for i, section in enumerate(sections))
  title, lead = html.escape(document.title), html.escape(document.lead)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{lead}</p>
<nav>{links}</nav>
{body}
</body>
</html>
"""


def _section(index: int, section: Section) -> str:
  blocks = "\n".join(map(_block, section.blocks))
  return f'<h2 id="s{index}">{html.escape(section.title)}</h2>\n{blocks}'


def _block(block):
  if isinstance(block, Text):
    return f"<p>{html.escape(block.text)}</p>"
  if isinstance(block, Table):
    return _table(block)
  if isinstance(block, Pictures):
    images = "".join(
      f'<img alt="{html.escape(x.alt)}" '
      f'src="data:image/svg+xml;base64,{_base64(x.svg)}">'
      for x in block.pictures
    )
    return f'<div class="pictures">{images}</div>'
  return (
    f"<details><summary>{html.escape(block.summary)}</summary>"
    f"<pre>{html.escape(block.text)}</pre></details>"
  )


def _base64(text):
  return base64.b64encode(text.encode()).decode()


def _table(table: Table):
  head = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in table.head)
  rows = "\n".join(
    "<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows
  )
  return (
    '<div class="scroll" tabindex="0"><table>\n'
    f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
  )


def _cell(text):
  kind = _CLASSES.get(text)
  if kind:
    return f'<td><span class="word {kind}">{html.escape(text)}</span></td>'
  kind = "long" if len(text) > 36 else "short"
  return f'<td class="{kind}">{html.escape(text)}</td>'


def as_markdown(document: Document, stem: str) -> tuple[str, dict[str, str]]:
  """The same as Markdown.

  Args:
    document: What it says.
    stem: What the names of the pictures begin with.
  Returns:
    The text, and the pictures by the names that it knows them by.
  """
  lines = [f"# {document.title}", "", document.lead]
  pictures = {}
  for section in document.sections:
    lines += ["", f"## {section.title}"]
    for block in section.blocks:
      lines.append("")
      if isinstance(block, Text):
        lines.append(block.text)
      elif isinstance(block, Table):
        lines += _markdown_table(block)
      elif isinstance(block, Fold):
        lines += [
          "<details>",
          f"<summary>{html.escape(block.summary)}</summary>",
        ]
        lines += ["", "```json", block.text, "```", "", "</details>"]
      else:
        for picture in block.pictures:
          name = f"{stem}-{len(pictures) + 1}.svg"
          pictures[name] = picture.svg
          lines.append(f"![{picture.alt}]({urllib.parse.quote(name)})")
  return "\n".join(lines) + "\n", pictures


def _markdown_table(table):
  def line(cells):
    cells = (x.replace("|", r"\|").replace("\n", " ") for x in cells)
    return "| " + " | ".join(cells) + " |"

  yield line(table.head)
  yield "|" + "---|" * len(table.head)
  yield from map(line, table.rows)


def save(document: Document, path: pathlib.Path) -> list[pathlib.Path]:
  """Writes the page, the Markdown beside it and the pictures of that.

  Args:
    document: What it says.
    path: Of the page; FILE.html, beside which come FILE.md and FILE-1.svg.
  Returns:
    All files that were written.
  """
  text, pictures = as_markdown(document, path.stem)
  files = {path: as_html(document), path.with_suffix(".md"): text}
  files |= {path.with_name(name): svg for name, svg in pictures.items()}
  for file, content in files.items():
    file.write_text(content)
  return list(files)
