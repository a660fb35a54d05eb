"""`spgdd train`: train a profile's delta, on one device or many.

spgdd train --profile spgdd-7b --data_path data/TADD_text.json --image_root_path data/images --preset recommended
deepspeed --module spgdd train --profile spgdd-7b --data_path data/TADD_text.json
"""

import argparse
import dataclasses
import os
import re
from pathlib import Path

from spgdd.training import settings as presets
from spgdd.training.settings import CHOICES, FIELDS, Settings

CHAT = "pandagpt4_visual_instruction_data.json"
HERE = "notebook 05"  # of the deltas that training makes


def add_commands(subparsers) -> argparse.ArgumentParser:
    """Add the `train` command to the sub-parsers of `spgdd`; it sets `run(args) -> exit status`."""
    parser = subparsers.add_parser("train", help="train a profile's delta", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--profile", default="mini", help="mini (default), anomalygpt-7b, spgdd-7b or spgdd-13b")
    add("--preset", default="recommended", metavar="NAME", help="workshop, paper, recommended, or a .yaml file")
    add("--data_path", type=Path, metavar="FILE", help="TADD's text, TADD_text.json")
    add("--tadd_path", type=Path, metavar="DIR", help="its images (default: TADD beside the text, else its folder)")
    add("--image_root_path", type=Path, metavar="DIR", help="images of PandaGPT's data; without it, no chat data")
    add("--chat_path", type=Path, metavar="FILE", help=f"PandaGPT's text (default: {CHAT} beside its images)")
    add("--held_out_path", type=Path, metavar="FILE", help="text about images for evaluation, as --data_path")
    add("--variants", type=int, default=4, metavar="N", help="self-supervised anomalies of a good image (default: 4)")
    add("--turns", type=int, metavar="N", help="cut conversations to so many questions (default: none is cut)")
    add("--cache", type=Path, default=Path("runs/features"), metavar="DIR", help="features (default: runs/features)")
    add("--on_the_fly", action="store_true", help="no cache: encode each image again and again")
    add("--root", type=Path, metavar="DIR", help="folder of the weights (default: pretrained_ckpt)")
    add("--imagebind_ckpt_path", type=Path, metavar="FILE", help="in place of the profile's")
    add("--vicuna_ckpt_path", type=Path, metavar="DIR", help="in place of the profile's")
    add("--delta_ckpt_path", type=Path, nargs="+", metavar="FILE",
        help="start from these, a later one over an earlier (default: PandaGPT's of the profile)")  # fmt: skip
    add("--save_path", type=Path, metavar="DIR", help="delta and checkpoints (default: where the profile looks for a "
        "delta of yours, else runs/train/PROFILE)")  # fmt: skip
    add("--log_path", type=Path, metavar="DIR", help="train.jsonl and TensorBoard (default: --save_path)")
    add("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    add("--engine", choices=("torch", "deepspeed"), help="default: deepspeed if a launcher started several")
    add("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed's settings (default: the preset's)")
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    group = parser.add_argument_group("fields of the preset", "each goes before the preset and its DeepSpeed file")
    about = dict(re.findall(r"^    (\w+): .*  # (.+)$", Path(presets.__file__).read_text("utf-8"), re.MULTILINE))
    for field in dataclasses.fields(Settings):
        if field.name not in FIELDS:
            continue
        kind = {"type": field.type, "metavar": field.type.__name__.upper()}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            kind = {"type": float, "nargs": 2, "metavar": ("B1", "B2")}
        elif field.name in CHOICES:
            kind = {"choices": CHOICES[field.name]}
        group.add_argument(f"--{field.name}", default=None, help=about[field.name], **kind)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Read everything that can be wrong first, then the weights, then train."""
    from spgdd.errors import SpgddError
    from spgdd.profiles import get_profile, weights_folder
    from spgdd.training.settings import load_settings

    changed = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    settings = load_settings(args.preset, args.deepspeed, **changed)
    if not args.data_path and not args.image_root_path:
        raise SpgddError("Nothing to train on: give --data_path TADD_text.json, --image_root_path, or both.")
    profile, root = get_profile(args.profile), weights_folder(args.root)
    last = profile.deltas[-1]
    default = (root / last.file).parent if last.notebook == HERE else Path("runs/train") / profile.name
    folder = args.save_path or default
    engine = args.engine or ("deepspeed" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "torch")

    import torch

    from spgdd.training.data import TrainingData
    from spgdd.training.engine import start_processes
    from spgdd.training.loop import train

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank = ranks = 0
    if engine == "deepspeed":
        own = start_processes()
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if device == "cuda":
            torch.cuda.set_device(own)
            device = f"cuda:{own}"
    torch.manual_seed(settings.seed)  # of the parts that begin at random
    model = start(profile, root, args, settings, device)
    cache = None if args.on_the_fly else args.cache
    chat = args.image_root_path and (args.chat_path or args.image_root_path.parent / CHAT)
    data = TrainingData(model, args.data_path, args.tadd_path or images(args.data_path), chat=chat, cache=cache,
                        chat_images=args.image_root_path, variants=args.variants, turns=args.turns,
                        seed=settings.seed)  # fmt: skip
    held_out = None
    if args.held_out_path:
        held_out = TrainingData(model, args.held_out_path, images(args.held_out_path), cache=cache, variants=0)
    for each in filter(None, (data, held_out)):
        each.fill(rank, max(ranks, 1))
    train(model, data, settings, folder, held_out=held_out, engine=engine, resume=args.resume, log_folder=args.log_path)
    if rank == 0:
        print(f"{folder / 'delta.safetensors'}: trained.")
    return 0


def images(text: Path | None) -> Path | None:
    """The folder of the images that a text file is about."""
    if text is None:
        return None
    return text.parent / "TADD" if (text.parent / "TADD").is_dir() else text.parent


def start(profile, root: Path, args: argparse.Namespace, settings: Settings, device: str):
    """The model to begin with: the frozen parts, and the deltas that training starts from."""
    import torch

    from spgdd.loading import load_model
    from spgdd.profiles import Delta

    deltas = profile.deltas[:-1]
    if args.delta_ckpt_path:
        deltas = tuple(Delta(str(path.absolute()), (), "--delta_ckpt_path") for path in args.delta_ckpt_path)
    files = {"imagebind_file": args.imagebind_ckpt_path, "language": args.vicuna_ckpt_path}
    files = {name: str(path.absolute()) for name, path in files.items() if path}
    dtype = None if settings.precision == "auto" else getattr(torch, settings.precision)
    quantize = None if settings.quantize == "none" else settings.quantize
    return load_model(dataclasses.replace(profile, deltas=deltas, **files), root, device, dtype, quantize)
