"""The target `internvl`: InternVLForConditionalGeneration and LlavaProcessor, release 3 without any change.

The library reads InternVL's vision config as InternVL's own encoder, whatever a file says: `read_config` is
needed to load such a folder. (InternVLProcessor would cut pictures into tiles, with tokens around them.)
"""

import copy
from pathlib import Path

from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, PreTrainedConfig

from convert.export import Source, compare
from convert.llava import write_folder
from convert.names import State

PARTS = {"layer_norm": "vision_proj.mlp.0", "linear_1": "vision_proj.mlp.1", "linear_2": "vision_proj.mlp.3"}
NAMES = {f"{theirs}.{n}": f"{ours}.{n}" for theirs, ours in PARTS.items() for n in ("weight", "bias")}


def write(folder: Path, source: Source) -> None:
    model, r = source.model, source.model.config.pixel_shuffle
    if model.config.projector != "mlp":
        raise ValueError(f"projector is {model.config.projector!r}: InternVL's is an MLP, see --format llava")
    if r & (r - 1):
        raise ValueError(f"pixel_shuffle is {r}: InternVL's works for powers of two")
    state, vision = model.state_dict(), copy.deepcopy(model.config.vision_config)
    projector = {theirs: state[ours] for theirs, ours in NAMES.items()}
    config = InternVLConfig(projector_hidden_act="gelu", downsample_ratio=1 / r)
    write_folder(folder, source, config, vision, model.vision_encoder.state_dict(), projector)


def verify(folder: Path, source: Source) -> str:
    return compare(folder, source, InternVLForConditionalGeneration, config=read_config(folder))


def read_config(folder: Path) -> InternVLConfig:
    fields, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    return InternVLConfig(**fields | {"vision_config": AutoConfig.for_model(**fields["vision_config"])})


def read_projector(projector: State, encoder: State, config: PreTrainedConfig) -> State:
    if config.projector_hidden_act != "gelu":
        raise ValueError(f"projector_hidden_act is {config.projector_hidden_act!r}, expected 'gelu'")
    return {ours: projector[theirs] for theirs, ours in NAMES.items()}
