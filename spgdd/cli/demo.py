"""`spgdd demo`: the model as a web page, for this machine or, with a password, for others.

    spgdd demo
    spgdd demo --profile anomalygpt-7b --host 0.0.0.0      # asks for the password, or takes $SPGDD_DEMO_PASSWORD
"""

import hmac
import os
import tempfile
from pathlib import Path

from typer import Option

from spgdd.errors import SpgddError

HERE = ("127.0.0.1", "localhost", "::1")
UPLOAD, REMEMBERED = 25 * 2**20, 16  # bytes of a file at most, or what a memory of so many good pictures takes
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # what each system has: nothing is fetched
CONTRAST = {  # of the theme's faint texts, as WCAG asks for
    "body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_700", "button_primary_background_fill_dark": "*primary_700",
    "link_text_color_dark": "*secondary_300",
}  # fmt: skip
CSS = """.spgdd .spgdd-badge{color:#fff!important}
.spgdd table,.spgdd tr,.spgdd th,.spgdd td{border-width:0 0 1px!important;border-color:#8883!important}"""
ACCESSIBLE = """() => new MutationObserver(() => {
  document.querySelectorAll("button:has(button)").forEach((outer) => {  // what adds a file: a button in another one
    outer.role = "group"; outer.tabIndex = -1; outer.ariaLabel = outer.title = "Add files" })
  document.querySelectorAll("[role=log]").forEach((talk) => { talk.tabIndex = 0 })  // scrolls by keyboard
  document.querySelectorAll("input[type=radio]:not([name=pictures])").forEach((each) => {  // arrow keys step in a group
    each.name = "pictures" })
}).observe(document.body, {childList: true, subtree: true, attributeFilter: ["name"]})"""


def demo(
    host: str = Option("127.0.0.1", help="0.0.0.0 lets others in the network in, who then need a password"),
    port: int = Option(7860, help="0: one that is free"),
    password: str = Option(None, envvar="SPGDD_DEMO_PASSWORD", help="every visitor is asked for it, under any name"),
    examples: Path = Option(None, help="folder of PRODUCT/picture and PRODUCT/good/picture (default: generated parts)"),
    seconds: float = Option(60, help="longest time for an answer"),
    **model,
) -> None:
    """Serve a page that diagnoses pictures, until Ctrl+C; programs can call it too.

    No public link is made, and nothing is fetched from elsewhere.
    """
    from spgdd.diagnosis import load

    with tempfile.TemporaryDirectory(prefix="spgdd-demo-") as folder:
        page = serve(load(**model), host, port, password, examples or draw_examples(Path(folder)), seconds)
        print(f"The demo is at {page.local_url}, for {'who has the password' if password else 'this machine alone'}. "
              "Ctrl+C ends it.")  # fmt: skip
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)


def serve(diagnoser, host: str = "127.0.0.1", port: int = 0, password: str | None = None,
          examples: Path | None = None, seconds: float = 60):  # fmt: skip
    """Serve the page until ``close()`` of what is returned; its address is in ``local_url``.

    Raises SpgddError for another host than this machine without a password, and for a port that is taken.
    """
    if host not in HERE and not password:
        raise SpgddError(f"At {host} everybody in the network could use the demo: give a --password.")
    try:
        import gradio
    except ImportError as error:
        raise SpgddError("The demo needs gradio: `pip install 'spgdd[notebooks]'`.") from error
    from spgdd.ui.web_demo import build

    model, profile = diagnoser.model, diagnoser.model.profile
    patches = (profile.size // profile.patch) ** 2 * (4 if profile.rotate else 1)
    upload = max(UPLOAD, REMEMBERED * 4 * model.memory.gates.numel() * patches)
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # a browser is to keep nothing of what was asked
    page = build(diagnoser, examples, seconds)
    try:
        page.launch(
            server_name=host, server_port=port or None, share=False, inline=False, prevent_thread_lock=True, quiet=True,
            auth=password and (lambda _, given: hmac.compare_digest(given.encode(), password.encode())),
            max_file_size=upload, allowed_paths=[str(Path(examples).resolve())] if examples else None, ssr_mode=False,
            state_session_capacity=100, enable_monitoring=False, show_error=False, footer_links=["api"], css=CSS,
            js=ACCESSIBLE, theme=gradio.themes.Default(**FONTS).set(**CONTRAST),
        )  # fmt: skip
    except OSError as error:
        raise SpgddError(f"Port {port} at {host} cannot be opened ({error}). Name another with --port.") from error
    return page


def draw_examples(folder: Path) -> Path:
    """Generated parts for visitors without pictures: of each product four good ones, and one in doubt."""
    import torch
    from PIL import Image

    from miniworld import TYPES, photograph

    for product, damage in (("gear", "burn"), ("leather", "hole"), ("tile", "crack"), ("cable", None)):
        kinds = torch.tensor([-1] * 4 + [TYPES.index(damage) if damage else -1])
        shots = photograph(product, torch.ones_like(kinds), torch.arange(5), kinds).images  # (5, 3, H, W)
        names = [*(f"good/{number}" for number in range(4)), damage or "intact"]
        (folder / product / "good").mkdir(parents=True)
        for shot, name in zip(shots, names, strict=True):
            Image.fromarray(shot.permute(1, 2, 0).numpy()).save(folder / product / f"{name}.png")
    return folder
