"""Write every figure that README, slides and notebooks show: ``python -m dsv3_mini.viz.figures``.

Files are the same bytes whenever nothing has changed: no dates, no random identifiers.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.fp8_formats import Format
from dsv3_mini.fp8 import convert_to_fp8
from dsv3_mini.model import Transformer
from dsv3_mini.viz.block_diagram import block_diagram
from dsv3_mini.viz.explorer import breakdown
from dsv3_mini.viz.fp8 import format_picture, layer_formats, number_line
from dsv3_mini.viz.mla_explorer import cache_figure
from dsv3_mini.viz.rope_explorer import rope_figure
from dsv3_mini.viz.style import styled
from dsv3_mini.viz.yarn_explorer import yarn_figure


def all_figures() -> dict[str, Figure]:
    """File name (without ending) to figure."""
    return {
        "v3_layer": block_diagram({"mini": ModelConfig.mini(), "V3": ModelConfig.v3()}),
        "v3_parameters": breakdown(ModelConfig.v3()),
        "v3_cache": cache_figure(),
        "rope": rope_figure(),
        "v3_yarn": yarn_figure(),
        "fp8_codes": number_line(),
        "fp8_layer": format_picture(_fp8_layer()),
    }


def _fp8_layer() -> list[Format]:
    """The first MoE layer of V3, from a converted model without memory."""
    config = ModelConfig.v3()
    with torch.device("meta"):
        model = Transformer(config.replace(num_hidden_layers=4, num_nextn_predict_layers=0))
    convert_to_fp8(model)  # fp32, as V3's master weights
    return layer_formats(model, config.first_k_dense_replace)


def main() -> None:
    """Write the SVG files, each beside its target and then renamed."""
    parser = argparse.ArgumentParser(description="Write every figure of the project.")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="default: figures")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in all_figures().items():
        target = folder / f"{name}.svg"
        beside = folder / f".{name}.writing"
        with styled():
            figure.savefig(beside, format="svg", metadata={"Date": None, "Creator": None})
        os.replace(beside, target)
        print(target)


if __name__ == "__main__":
    main()
