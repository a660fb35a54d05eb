"""The first cells of every notebook of the course: where we are, and whether this machine is ready."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

PIPELINE = {  # step: what it is, what comes out of it
    "pictures": ("pictures", "query, normals"),
    "features": ("ImageBind", "patch tokens"),
    "map": ("memory, words", "anomaly map"),
    "prompts": ("prompt learner", "prompt tokens"),
    "language": ("Vicuna + LoRA", "answers"),
    "diagnosis": ("diagnosis", "verdict, regions"),
}
BOX, GAP, HEIGHT = 128, 22, 54  # pixels of a step, between two, and of the row


def pipeline(you_are_here: str | tuple[str, ...]):
    """The system from left to right as an SVG picture, with one or several steps of PIPELINE marked."""
    from IPython.display import SVG

    here = (you_are_here,) if isinstance(you_are_here, str) else you_are_here
    if unknown := set(here) - set(PIPELINE):
        raise ValueError(f"no step {', '.join(sorted(unknown))} in the pipeline: choose of {', '.join(PIPELINE)}")
    shapes = []
    for number, (step, (name, result)) in enumerate(PIPELINE.items()):
        left = number * (BOX + GAP)
        middle, marked = left + BOX / 2, step in here
        box, text = ("#c8253c", "#fff") if marked else ("#e9edf2", "#222")
        shapes.append(
            f'<rect x="{left}" y="22" width="{BOX}" height="{HEIGHT}" rx="9" fill="{box}"/>'
            f'<text x="{middle}" y="45" font-weight="bold" fill="{text}">{name}</text>'
            f'<text x="{middle}" y="64" font-size="12" fill="{text}">{result}</text>'
        )
        if marked:
            shapes.append(f'<text x="{middle}" y="14" font-size="12" fill="#c8253c">you are here</text>')
        if number:
            shapes.append(f'<path d="M{left - GAP + 4} 49h12m-5 -5l5 5l-5 5" stroke="#888" fill="none"/>')
    width = len(PIPELINE) * (BOX + GAP) - GAP
    return SVG(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + 26}" font-size="14" '
        f'font-family="sans-serif" text-anchor="middle">{"".join(shapes)}</svg>'
    )


def environment(profile, needs: Mapping[str | PathLike, str] | None = None) -> None:
    """Print versions, device, precision with its reason, and the weights of a profile, given by name or as ``Profile``.

    Raises WeightsError where the profile's weights, or files of ``needs``, are missing; ``needs`` names for
    each file what makes it: ``{"../runs/features.safetensors": "notebook 05"}``.
    """
    import platform

    import torch
    import transformers

    from spgdd import __version__
    from spgdd.errors import WeightsError
    from spgdd.loading import choose_dtype
    from spgdd.profiles import get_profile, weights_folder

    chosen, root = get_profile(profile) if isinstance(profile, str) else profile, weights_folder()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = f"cuda, {torch.cuda.get_device_name()}" if device == "cuda" else "cpu"
    reason = choose_dtype(device)[1]
    if chosen.precision == "float32":
        reason = f"float32: {chosen.name} is small enough to be exact everywhere"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"versions   spgdd {__version__}, {versions}, transformers {transformers.__version__}")
    print(f"profile    {chosen.name}: {chosen.purpose}")
    print(f"device     {hardware}")
    print(f"precision  {reason}")

    files = {root / file: source for file, source in chosen.files().items()}
    wanted = files | {Path(file): source for file, source in (needs or {}).items()}
    missing = [f"  {file} (from {source})" for file, source in wanted.items() if not file.is_file()]
    if missing:
        how = f"Run the notebook named; `spgdd weights download {chosen.name}` fetches what is published."
        raise WeightsError("\n".join([f"{len(missing)} file(s) are missing:", *missing, how]))
    size = sum(file.stat().st_size for folder in {f.parent for f in files} for file in folder.iterdir())
    print(f"weights    {size / 1e6:,.0f} MB in {root}")
