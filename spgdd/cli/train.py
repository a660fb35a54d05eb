"""`spgdd train`: train a profile's delta, on one device or many.

spgdd train --profile spgdd-7b --data_path data/TADD_text.json --image_root_path data/images --preset recommended
accelerate launch --multi_gpu -m spgdd train --profile spgdd-7b --data_path data/TADD_text.json

The second form shares the work among all GPUs, as `torchrun --nproc-per-node gpu -m spgdd train` does; with --engine
deepspeed, or started as `deepspeed --module spgdd train --engine deepspeed`, under DeepSpeed.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from typer import Option

from spgdd.cli.common import DEVICE, PROFILE, ROOT, option, say
from spgdd.errors import SpgddError
from spgdd.profiles import Delta, get_profile, weights_folder
from spgdd.training.settings import OPTIONS, load_settings

CHAT = "pandagpt4_visual_instruction_data.json"
HERE = "notebook 05"  # of the deltas that training makes


def setting(field: dataclasses.Field):
    """The option of a field of ``TrainingSettings``; what is not given is the preset's."""
    kind, flag = field.type, f"--{field.name}"
    if "choices" in field.metadata:
        kind = Literal[field.metadata["choices"]]
    elif kind is bool:
        flag = f"--{field.name}/--no-{field.name}"
    elif kind is tuple:
        kind = tuple[float, float]
    return option(field.name, kind, Option(None, flag, help=field.metadata["help"]))


SETTINGS = [setting(field) for field in OPTIONS.values()]


def train(
    profile: str = PROFILE,
    preset: str = Option("recommended", help="workshop, paper, recommended, or a .yaml file, with the options below"),
    data_path: Path = Option(None, "--data_path", help="TADD's text, TADD_text.json"),
    tadd_path: Path = Option(None, "--tadd_path", help="its images (default: TADD beside the text, else its folder)"),
    image_root_path: Path = Option(None, "--image_root_path", help="images of PandaGPT's data; without, no chat data"),
    chat_path: Path = Option(None, "--chat_path", help=f"PandaGPT's text (default: {CHAT} beside its images)"),
    held_out_path: Path = Option(None, "--held_out_path", help="text about images for evaluation, as --data_path"),
    variants: int = Option(4, help="self-supervised anomalies of a good image"),
    turns: int = Option(None, help="cut conversations to so many questions (default: none is cut)"),
    cache: Path = Option("runs/features", help="where encoded images are kept"),
    on_the_fly: bool = Option(False, "--on_the_fly", help="no cache: encode each image again and again"),
    root: Path = ROOT,
    imagebind_ckpt_path: Path = Option(None, "--imagebind_ckpt_path", help="a file in place of the profile's"),
    vicuna_ckpt_path: Path = Option(None, "--vicuna_ckpt_path", help="a folder in place of the profile's"),
    delta_ckpt_path: list[Path] = Option((), "--delta_ckpt_path", help="start from these, a later one over an earlier "
                                         "(default: PandaGPT's of the profile)"),
    save_path: Path = Option(None, "--save_path", help="folder of delta and checkpoints (default: where the profile "
                             "looks for a delta of yours, else runs/train/PROFILE)"),
    log_path: Path = Option(None, "--log_path", help="folder of train.jsonl (default: --save_path)"),
    resume: bool = Option(False, "--resume", help="go on from the last checkpoint, if there is one"),
    engine: Literal["torch", "deepspeed"] = Option(None, help="default: deepspeed if --deepspeed is given, else torch"),
    deepspeed: Path = Option(None, help="DeepSpeed's settings, a .json file (default: the preset's)"),
    device: str = DEVICE,
    **changed,
) -> None:  # fmt: skip
    """Train a profile's delta, on one device or many."""
    settings = load_settings(preset, deepspeed, **{key: value for key, value in changed.items() if value is not None})
    if not data_path and not image_root_path:
        raise SpgddError("Nothing to train on: give --data_path TADD_text.json, --image_root_path, or both.")
    profile, root = get_profile(profile), weights_folder(root)
    if not profile.language:
        raise SpgddError(f"profile {profile.name} has nothing to train: it does not speak. Choose one that does.")
    last = profile.deltas[-1]
    default = (root / last.file).parent if last.notebook == HERE else Path("runs/train") / profile.name
    folder = save_path or default
    engine = engine or ("deepspeed" if deepspeed else "torch")

    import torch

    from spgdd.loading import load_model
    from spgdd.training import loop
    from spgdd.training.data import TrainingData
    from spgdd.training.worker import join_processes

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = join_processes(device, engine == "deepspeed")
    rank, ranks = processes.process_index, processes.num_processes
    if processes.use_distributed and device == "cuda":
        device = str(processes.device)
    torch.manual_seed(settings.seed)  # of the parts that begin at random
    deltas = tuple(Delta(str(path.absolute()), (), "--delta_ckpt_path") for path in delta_ckpt_path)
    files = {"imagebind_file": imagebind_ckpt_path, "language": vicuna_ckpt_path}
    files = {name: str(path.absolute()) for name, path in files.items() if path}
    profile = dataclasses.replace(profile, deltas=deltas or profile.deltas[:-1], **files)
    dtype = None if settings.precision == "auto" else getattr(torch, settings.precision)
    quantize = None if settings.quantize == "none" else settings.quantize
    model = load_model(profile, root, device, dtype, quantize)
    cache = None if on_the_fly else cache
    chat = image_root_path and (chat_path or image_root_path.parent / CHAT)
    data = TrainingData(model, data_path, tadd_path or images(data_path), chat=chat, cache=cache,
                        chat_images=image_root_path, variants=variants, turns=turns, seed=settings.seed)  # fmt: skip
    held_out = None
    if held_out_path:
        held_out = TrainingData(model, held_out_path, images(held_out_path), cache=cache, variants=0)
    for each in filter(None, (data, held_out)):
        each.fill(rank, ranks)
    loop.train(model, data, settings, folder, held_out=held_out, engine=engine, resume=resume, log_folder=log_path)
    if torch.distributed.is_initialized():  # together: who leaves first takes the others' connection along
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        say(f"{folder / 'delta.safetensors'}: trained.")


def images(text: Path | None) -> Path | None:
    """The folder of the images that a text file is about."""
    if text is None:
        return None
    return text.parent / "TADD" if (text.parent / "TADD").is_dir() else text.parent
