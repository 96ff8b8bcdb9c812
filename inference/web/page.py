"""The page of the web demo: what is on it, how it looks, and which event does what."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal, is_static_file

from inference.chat import Sampling
from inference.pictures import SHIPPED_PICTURES
from inference.web.conversation import Conversation
from inference.web.events import Demo
from inference.web.texts import TEXTS

FILES_CHECKED, FILES_KEPT = 3600, 24 * 3600  # seconds between looks at uploaded files, and their age
EXAMPLES = {
    "drawing_tiger.png": "What is this?",
    "drawing_cat_pizza.png": "What is on the left?",
    "drawing_car_banana_owl.png": "How many things are there?",
    "drawing_sailboat.png": "这是什么？",
    "photo_cat.jpg": "Describe the picture.",
    "photo_coffee.jpg": "描述这张图片。",
}
I18N = gr.I18n(**{"en": TEXTS["en"], "zh": TEXTS["zh"], "zh-CN": TEXTS["zh"], "zh-TW": TEXTS["zh"]})
FONTS = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]  # the system's own
CSS = """
main { width: 100%; max-width: 1240px; margin: 0 auto; }
#about { opacity: 0.75; }
#chat .examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 8px; }
#chat .example { min-width: 0; padding: 8px; }
#saw .grid-wrap, #attention .grid-wrap { min-height: 0; max-height: none; }
@media (max-width: 640px) {
  main { padding: 8px !important; }
  #chat { height: 62vh !important; }
}
"""
# A browser leaves the page to show a picture that is dropped beside the question: it goes to the question.
JS = """
() => {
  const ours = (event) => event.dataTransfer.types.includes("Files") && !event.defaultPrevented;
  document.addEventListener("dragover", (event) => ours(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    const input = document.querySelector("#question input[type=file]");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
}
"""


class Page(gr.Blocks):
    """Takes no file but what was uploaded here and its own examples; what is wrong with what is sent, its
    sender is told. Gradio would fetch any address, and log a traceback."""

    async def process_api(self, block_fn: Any, inputs: list[Any], *args, **kwargs) -> dict[str, Any]:
        told = kwargs.get("event_data")
        with told_in_one_line():
            for path in paths_in([inputs, told and told._data]):
                if not (is_in_or_equal(path, get_upload_folder()) or is_static_file(path)):
                    raise ValueError("a file that was not uploaded here")
        return await super().process_api(block_fn, inputs, *args, **kwargs)

    async def preprocess_data(self, *args, **kwargs) -> list[Any]:
        with told_in_one_line():
            return await super().preprocess_data(*args, **kwargs)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    try:
        yield
    except (gr.Error, OSError, TypeError, ValueError) as error:
        message = str(getattr(error, "message", error))
        raise gr.Error(f"This cannot be taken: {message}", print_exception=False) from None


def paths_in(data: Any) -> Iterator[str]:
    """Whatever Gradio might take for the path of a file."""
    if isinstance(data, dict) and isinstance(data.get("path"), str):
        yield data["path"]
    if isinstance(data, (dict, list)):
        for part in data.values() if isinstance(data, dict) else data:
            yield from paths_in(part)


def build_page(demo: Demo) -> gr.Blocks:
    say = I18N
    gr.set_static_paths(SHIPPED_PICTURES)  # copies of the examples would be deleted with old uploads
    with Page(
        title="MiniMind-V", analytics_enabled=False, fill_width=True, delete_cache=(FILES_CHECKED, FILES_KEPT)
    ) as page:
        conversation = gr.State(Conversation())
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                gr.Markdown(say("about"), elem_id="about")
                chat = gr.Chatbot(
                    label=say("chat"),
                    elem_id="chat",
                    height="66vh",
                    placeholder=say("welcome"),
                    examples=examples(),
                    buttons=["copy", "copy_all"],
                    layout="bubble",
                    feedback_options=None,
                    allow_file_downloads=False,
                )
                question = gr.MultimodalTextbox(
                    placeholder=say("ask"),
                    show_label=False,
                    file_types=["image"],
                    file_count="multiple",
                    max_plain_text_length=100_000,
                    elem_id="question",
                    autofocus=True,
                )
            with gr.Column(scale=3, min_width=320):
                picker = gr.Dropdown(demo.names(), value=demo.first, label=say("model"), elem_id="model")
                new = gr.Button(say("new"), size="md", elem_id="new")
                with gr.Accordion(say("saw"), open=True):
                    pictures = dict(
                        columns=2, fit_columns=False, height="auto", format="png", buttons=["fullscreen"]
                    )
                    saw = gr.Gallery(show_label=False, elem_id="saw", **pictures)
                    gr.Markdown(say("saw_info"))
                    look = gr.Button(say("look"), size="md", elem_id="look")
                    token = gr.Dropdown([], label=say("token"), visible=False, elem_id="token")
                    attention = gr.Gallery(show_label=False, visible=False, elem_id="attention", **pictures)
                with gr.Accordion(say("settings"), open=False):
                    system = gr.Textbox("", label=say("system"), lines=2, max_length=2000)
                    published = Sampling()
                    told = {"label": say("temperature"), "info": say("temperature_info")}
                    sampling = [
                        gr.Slider(0, 2, published.temperature, step=0.05, **told),
                        gr.Slider(0.05, 1, published.top_p, step=0.05, label=say("top_p")),
                        gr.Slider(1, 1024, published.max_new_tokens, step=1, label=say("max_new_tokens")),
                    ]

        model_event = dict(concurrency_id="model", concurrency_limit=1)  # generation is one at a time
        at_once = dict(queue=False, show_progress="hidden", api_visibility="private")
        beside = [chat, conversation, saw, attention, token]
        asking = dict(
            fn=demo.ask,
            inputs=[question, conversation, picker, system, *sampling],
            outputs=[question, *beside],
            show_progress_on=chat,
            show_progress="minimal",
            **model_event,
        )

        def busy(update: bool) -> dict[str, Any]:
            buttons = gr.update(submit_btn=not update, stop_btn=update)
            return dict(fn=lambda: buttons, outputs=question, **at_once)

        typed = question.submit(**busy(True)).then(**asking, api_name="ask")
        clicked = chat.example_select(fill_in, None, question, **at_once).then(**busy(True))
        clicked = clicked.then(**asking, api_visibility="private")
        for answered in (typed, clicked):
            answered.then(**busy(False))
            answered.failure(**busy(False))  # what follows with `then` does not follow an error
        question.stop(None, None, None, cancels=[typed, clicked])
        gr.on([new.click, chat.clear], demo.restart, picker, beside, cancels=[typed, clicked], **at_once)
        picker.input(
            demo.switch, [picker, conversation], [picker, *beside], api_visibility="private", **model_event
        )
        look.click(demo.look, conversation, [attention, token], api_name="look", **model_event)
        token.input(demo.draw, [conversation, token], attention, **at_once)
        page.load(lambda: gr.update(choices=demo.names()), None, picker, **at_once)
    return page


def fill_in(selected: gr.SelectData) -> dict[str, Any]:
    """Text and pictures of the example of that number: Gradio would serve whatever file the browser named."""
    chosen = next((one for number, one in enumerate(examples()) if number == selected.index), None)
    if chosen is None:
        raise gr.Error("There is no such example.", print_exception=False)
    return {"text": chosen["text"], "files": chosen["files"]}


def examples() -> list[dict[str, Any]]:
    paths = {Path(SHIPPED_PICTURES) / name: question for name, question in EXAMPLES.items()}
    return [
        {"text": question, "files": [str(path)], "icon": str(path)}
        for path, question in paths.items()
        if path.is_file()
    ]
