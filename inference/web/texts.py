"""The web demo's words, English and Chinese; the browser's language chooses."""

import html
from typing import Any

TEXTS = {
    "en": {
        "about": "**MiniMind-V** is a small vision-language model trained from scratch. It can be wrong.",
        "chat": "Chat",
        "welcome": "Drop a picture, paste one, or try an example",
        "ask": "Ask about a picture...",
        "new": "New chat",
        "model": "Model",
        "settings": "Settings",
        "system": "System prompt",
        "temperature": "Temperature",
        "temperature_info": "0 always takes the likeliest token",
        "top_p": "Top-p",
        "max_new_tokens": "Longest answer, in tokens",
        "saw": "What the model saw",
        "saw_info": "Your pictures after cropping and scaling, pixel by pixel.",
        "look": "Where did the last answer look?",
        "token": "Token of the answer",
        "whole": "whole answer (mean)",
        "switched": "A new conversation with {weight}",
        "empty": "Write a question or add a picture.",
        "too_many": "A conversation takes at most {limit} pictures. Start a new chat for more.",
        "no_picture": "{name} is not a picture that can be read. Try a PNG, JPEG or WebP file.",
        "too_long": "The conversation is too long ({tokens} tokens, at most {limit}). Start a new chat.",
        "too_much_text": "The conversation is too long ({characters} characters, at most {limit}).",
        "too_large": "The pictures of one question may have {limit} megapixels together. Send smaller ones.",
        "refused": "This cannot be answered: {error}",
        "no_answer": "There is no answer about a picture yet.",
        "unknown_model": "{weight} is not among the models here any more. Reload the page.",
        "failed": "The model cannot be loaded: {error}",
    },
    "zh": {
        "about": "**MiniMind-V** 是从零训练的小型视觉语言模型，可能会答错。",
        "chat": "对话",
        "welcome": "拖入或粘贴图片，或者试试下面的例子",
        "ask": "就图片提问……",
        "new": "新对话",
        "model": "模型",
        "settings": "设置",
        "system": "系统提示词",
        "temperature": "温度",
        "temperature_info": "为 0 时总取最可能的词元",
        "top_p": "Top-p",
        "max_new_tokens": "回答的最大词元数",
        "saw": "模型看到了什么",
        "saw_info": "裁剪、缩放之后的图片，逐像素显示。",
        "look": "上一个回答看了哪里？",
        "token": "回答中的词元",
        "whole": "整个回答（平均）",
        "switched": "已用 {weight} 开始新对话",
        "empty": "请写下问题，或添加一张图片。",
        "too_many": "一次对话最多 {limit} 张图片。更多图片请开始新对话。",
        "no_picture": "{name} 不是能读取的图片。请用 PNG、JPEG 或 WebP 文件。",
        "too_long": "对话太长（{tokens} 个词元，上限 {limit}）。请开始新对话。",
        "too_much_text": "对话太长（{characters} 个字符，上限 {limit}）。",
        "too_large": "一个问题的图片合计最多 {limit} 百万像素。请缩小图片。",
        "refused": "无法回答：{error}",
        "no_answer": "还没有关于图片的回答。",
        "unknown_model": "这里已经没有 {weight} 这个模型。请刷新页面。",
        "failed": "无法加载模型：{error}",
    },
}


def text(key: str, *, accept_language: str | None, **details: Any) -> str:
    """HTML words for `key` in the language that an Accept-Language header asks for first."""
    language = "zh" if (accept_language or "").lower().startswith("zh") else "en"
    return TEXTS[language][key].format(**{name: html.escape(str(value)) for name, value in details.items()})
