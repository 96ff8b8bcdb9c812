"""Answers about pictures as a page to look at: HTML in one file, or Markdown with thumbnails beside it.

Everything from models, files and flags is escaped.
"""

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup

from common.cli import user_errors
from common.weights import write_file
from dataset.pictures import open_image, picture_name
from inference.answers import Question, pictures_of
from inference.ask import Answer

THUMBNAIL = 256  # pixels of the longer side

HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
  table { border-collapse: collapse; }
  th, td { border: 1px solid #8886; padding: .5rem; text-align: left; vertical-align: top; }
  td { white-space: pre-wrap; overflow-wrap: anywhere; }
  small { display: block; opacity: .7; }
</style>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
<table>
<tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows -%}
<tr><td>{% for picture in row.pictures -%}
<img src="{{ picture.source }}" alt="{{ picture.name }}"><small>{{ picture.name }}</small>
{%- endfor %}</td><td>{{ row.question }}</td>
{%- if expected %}<td>{{ row.expected }}</td>{% endif %}
{%- for answer in row.answers -%}
<td>{{ answer.text }}<small>{{ "%.1f" % answer.tokens_per_second }} tokens/s</small></td>
{%- endfor %}</tr>
{% endfor -%}
</table>
</html>
"""

MARKDOWN = """\
# {{ title }}

{{ about }}

|{% for name in head %} {{ name }} |{% endfor %}
|{% for name in head %} --- |{% endfor %}
{% for row in rows -%}
| {% for picture in row.pictures %}![{{ picture.name }}]({{ picture.source }}) {% endfor -%}
| {{ row.question }} |
{%- if expected %} {{ row.expected }} |{% endif %}
{%- for answer in row.answers %} {{ answer.text }} ({{ "%.1f" % answer.tokens_per_second }} tokens/s) |
{%- endfor %}
{% endfor -%}
"""


def write_picture_report(
    path: Path, questions: Sequence[Question], answers: Sequence[Sequence[Answer]], names: Sequence[str]
) -> None:
    """Writes `answers[i][j]`, the answer of the model `names[j]` to `questions[i]`, to a .html or .md file.

    Markdown keeps its thumbnails in the folder `{stem}_pictures` beside it. UserError if that fails.
    """
    html = path.suffix.lower() == ".html"
    thumbnails = embedded_thumbnails(questions) if html else saved_thumbnails(questions, path)
    rows = [
        {
            "pictures": [
                {"name": Path(picture_name(image)).name, "source": thumbnails[image]}
                for image in question.images
            ],
            "question": question.text,
            "expected": question.expected,
            "answers": said,
        }
        for question, said in zip(questions, answers, strict=True)
    ]
    expected = any(question.expected for question in questions)
    answered_by = list(names) if len(names) > 1 else ["answer"]
    text = (html_environment() if html else markdown_environment()).from_string(HTML if html else MARKDOWN)
    page = text.render(
        title="Answers about pictures",
        about=f"{len(questions)} questions, answered by {', '.join(names)}.",
        head=["picture", "question", *(["expected"] if expected else []), *answered_by],
        rows=rows,
        expected=expected,
    )
    write_file(path, lambda file: file.write(page.encode(errors="backslashreplace")))


def html_environment() -> Environment:
    return Environment(autoescape=True)


def markdown_environment() -> Environment:
    return Environment(
        autoescape=False,  # Markdown needs more than HTML's escapes: all that is put in goes through these
        finalize=lambda value: value if isinstance(value, Markup) else escape_markdown(str(value)),
    )


def escape_markdown(text: str) -> str:
    """`text` as one line that Markdown, in a table or out of it, shows as it is."""
    escaped = re.sub(r"([\\`*_\[\]<>|~$&#!])", r"\\\1", text.strip())
    return re.sub(r"\s*\n\s*", "<br>", escaped)


def embedded_thumbnails(questions: Sequence[Question]) -> dict[str, str]:
    """Path of each picture -> its thumbnail as a data URI."""
    return {
        image: data_uri(thumbnail(image, where), "image/jpeg")
        for image, where in pictures_of(questions).items()
    }


def data_uri(content: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"


def saved_thumbnails(questions: Sequence[Question], path: Path) -> dict[str, Markup]:
    """Path of each picture -> its thumbnail's path, relative to the report at `path`."""
    folder = path.with_name(f"{path.stem}_pictures")
    with user_errors(f"--report {path}"):
        folder.mkdir(exist_ok=True)
    found = {}
    for number, (image, where) in enumerate(pictures_of(questions).items()):
        content = thumbnail(image, where)
        file_path = folder / f"{number:04}.jpg"
        write_file(file_path, lambda file, content=content: file.write(content))
        found[image] = Markup(quote(os.fsencode(f"{folder.name}/{file_path.name}")))
    return found


def thumbnail(path: str, where: str) -> bytes:
    picture = open_image(path, where)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return stream.getvalue()
