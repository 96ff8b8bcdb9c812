"""The model card of an exported folder: what the model is, how it was made, how it is used."""

import platform
from pathlib import Path

import jinja2
import torch
import transformers

from convert.export import Source
from convert.minimind import required_transformers

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(folder: Path, target: str, source: Source) -> None:
    model, sidecar = source.model, source.sidecar
    trained = (p for key, p in model.named_parameters() if not key.startswith("vision_encoder."))
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    card = template.render(
        target=target,
        name=folder.name,
        parameters=f"{sum(parameter.numel() for parameter in trained) / 1e6:.2f}",
        config=model.config,
        kind="mixture of experts" if model.config.use_moe else "dense",
        stage=sidecar.get("stage") or "unknown",
        encoder=f"`{Path(source.encoder).name}`" if source.encoder else "a frozen encoder",
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        needed=required_transformers(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
