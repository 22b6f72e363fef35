"""A page in Markdown, and the same page as one HTML file that needs nothing else."""

import base64
import html
import re
from collections.abc import Mapping

from markdown_it import MarkdownIt

# A light page whatever the device prefers, since the pictures are light. Wide tables scroll in
# their own frame, so that the page itself never does; a shadow says that there is more.
STYLE = """
:root { color-scheme: light; }
body {
  margin: 0 auto; max-width: 1120px; padding: 1rem 1.25rem 3rem; background: #fff; color: #1b1f24;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 {
  font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae0; padding-bottom: .2rem;
}
.table {
  overflow-x: auto; margin: 1rem 0;
  background: linear-gradient(to left, #fff 1.5rem, #fff0) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, #0003, #0000) right / .8rem 100% no-repeat scroll;
}
.table:focus-visible { outline: 2px solid #0b5cad; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; border-bottom: 1px solid #e1e5ea; text-align: left; }
th { border-bottom: 2px solid #8c959f; vertical-align: bottom; overflow-wrap: normal; }
td { white-space: nowrap; }
td:first-child { white-space: normal; min-width: 10.5rem; }
img { max-width: 100%; height: auto; vertical-align: top; }
p:has(> img + img) {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
}
""".strip()

# No script, and nothing from elsewhere, whatever a name might hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escape(text: str) -> str:
    """A line of printable text as Markdown that shows it as it is.

    All that Markdown, its tables, or GitHub's formulas, emoji and links read is escaped.
    """
    return re.sub(r"[\\`*_{}\[\]<>|&~!$@#]|:(?=\S)|(?<=www)\.", r"\\\g<0>", text)


def to_html(title: str, markdown: str, pictures: Mapping[str, bytes]) -> str:
    """One HTML page: pictures inside as data, no script, nothing fetched.

    Args:
      title: of the page, any text.
      markdown: its content; HTML in it is shown as text.
      pictures: from the name by which the Markdown refers to a picture to its PNG.

    Returns:
      The page.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                png = base64.b64encode(pictures[str(child.attrs["src"])]).decode()
                child.attrs["src"] = f"data:image/png;base64,{png}"
    body = parser.renderer.render(tokens, parser.options, {})
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def _table_open(self, tokens, index, options, env) -> str:
    # What scrolls must be reachable by keyboard, and then needs a name: that of its section.
    names = [tokens[i + 1].content for i in range(index) if tokens[i].type == "heading_open"]
    name = html.escape(f"Table: {names[-1]}" if names else "Table")
    return f'<div class="table" role="region" tabindex="0" aria-label="{name}">\n<table>\n'


def _table_close(self, tokens, index, options, env) -> str:
    return "</table>\n</div>\n"
