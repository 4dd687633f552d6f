"""Build a self-contained HTML page: no script, and no external style sheet, font or image."""

import base64
from collections.abc import Iterable, Mapping
from html import escape

STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 5rem; background: #fff; color: #1d2026;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em }
h2 { font-size: 1.3rem; margin: 3rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid #dde1e7 }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem }
p { max-width: 46rem; margin: .5rem 0 }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #f3f4f7; padding: .1em .3em;
  border-radius: 3px }
.notice { border-left: 4px solid #d55e00; padding: .4rem .9rem; background: #fff6ee; max-width: 44rem }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .32rem .75rem; text-align: right }
thead th { font-weight: 600; color: #555c68; border-bottom: 1px solid #c9ced6 }
thead th[colspan] { text-align: center; border-bottom: 1px solid #e6e9ee }
tbody th { text-align: left; font-weight: 500 }
tbody td { border-bottom: 1px solid #eef0f3 }
tbody th[scope=row] { border-bottom: 1px solid #eef0f3; position: sticky; left: 0; background: inherit }
tbody { background: #fff }
.heading th { padding-top: 1rem; font-size: .8rem; color: #555c68; font-weight: 600; white-space: normal }
.heading span { position: sticky; left: .75rem; display: inline-block; max-width: min(40rem, 80vw) }
tbody.run th[scope=row] { font-weight: 650 }
tbody.floor, tbody.difference, tbody.closed { color: #3d434d }
tbody.published { background: #f4f1fa; color: #4b3b73 }
tbody.published th[scope=row], tbody.published td { font-style: italic }
tbody.published .heading th { color: #4b3b73 }
figure { margin: 0 }
figure img { display: block; width: 100%; height: auto }
figure.wide { overflow-x: auto; margin: 1.4rem 0 }
figure.wide img { min-width: 34rem; max-width: 100% }
figcaption { font-size: .86rem; color: #555c68; margin-top: .3rem; max-width: 46rem }
figure.panels { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.4rem 0 }
.panels div { flex: 0 1 14rem; min-width: 0 }
.panels span { font-size: .82rem; overflow-wrap: anywhere }
.panels figcaption { flex: 1 0 100%; margin: 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 1.6rem 2rem;
  margin: 1.2rem 0; align-items: start }
.grid.narrow { grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
.grid img { width: auto; max-width: 100%; max-height: 18rem }
td small { display: block; font-size: .74rem; color: #6b7280; font-weight: 400; line-height: 1.1 }
strong { font-weight: 750 }
.files { font-size: .86rem; color: #555c68 }
summary { cursor: pointer; margin: 1rem 0; font-weight: 600 }
.key i { display: inline-block; width: .85em; height: .85em; border-radius: 2px; margin-right: .3em;
  vertical-align: -.05em }
.key span { white-space: nowrap; margin-right: .6em }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem }
dt { font-weight: 600 } dd { margin: 0; color: #555c68 }
@media (max-width: 40rem) {
  body { padding: 1.2rem .9rem 3rem; font-size: 15px }
  h1 { font-size: 1.5rem } h2 { margin-top: 2rem }
  dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem }
  th, td { padding: .3rem .5rem }
  tbody th[scope=row] { min-width: 5rem; max-width: 7rem; white-space: normal; overflow-wrap: break-word }
  .panels div { flex: 0 1 calc(50% - .3rem) }
}
""".strip()


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole HTML document; `parts` are HTML."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def heading(text: str, level: int = 2) -> str:
    """Return a heading as HTML; `text` is plain."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph as HTML; `text` is plain and `kind` its CSS class."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """Return a definition list as HTML; the items are terms and their descriptions, plain text."""
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in items) + "</dl>"


def figure(image: bytes, caption: str, alt: str, wide: bool = False) -> str:
    """Return an embedded PNG or SVG image with its caption as HTML; a `wide` one scrolls on a narrow screen."""
    style = ' class="wide"' if wide else ""
    return (
        f'<figure{style}><img src="{_data(image)}" alt="{escape(alt, quote=True)}">'
        f"{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"
    )


def panels(images: Mapping[str, bytes], caption: str, alt: str) -> str:
    """Return PNG images, each above its key as a label, as one figure with a caption; they wrap on a narrow screen."""
    shown = "".join(
        f'<div><img src="{_data(image)}" alt="{escape(alt, quote=True)}"><span>{escape(label)}</span></div>'
        for label, image in images.items()
    )
    return f'<figure class="panels">{shown}<figcaption>{escape(caption)}</figcaption></figure>'


def details(summary: str, parts: Iterable[str]) -> str:
    """Return HTML `parts` that are hidden until the reader opens them by the plain text `summary`."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def links(text: str, files: Mapping[str, str]) -> str:
    """Return a paragraph of links to files beside the page as HTML; `files` are their names by the plain link text."""
    anchors = ", ".join(f'<a href="{escape(name, quote=True)}">{escape(label)}</a>' for label, name in files.items())
    return f'<p class="files">{escape(text)} {anchors}</p>'


def grid(figures: Iterable[str], narrow: bool = False) -> str:
    """Return figures as HTML that places them side by side, two or (narrow ones) more if the screen is wide enough."""
    return f'<div class="grid{" narrow" if narrow else ""}">{"".join(figures)}</div>'


def colour_key(entries: Iterable[tuple[tuple[int, int, int], str]]) -> str:
    """Return a legend of RGB colours and their meanings as HTML."""
    marks = " ".join(f'<span><i style="background:rgb{colour}"></i>{escape(text)}</span>' for colour, text in entries)
    return f'<p class="key">{marks}</p>'


def _data(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
