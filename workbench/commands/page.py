"""The page in the browser: `app`."""

import atexit
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import Device, Dtype
from workbench.errors import InputError
from workbench.location import located

SETTINGS = {
    "server.address": "localhost",
    "server.fileWatcherType": "none",
    "server.maxUploadSize": 20,  # MB: recipes
    "browser.gatherUsageStats": "false",
    "runner.magicEnabled": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
}


def app(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", parser=located, help="A trace: a DuckDB file, or a folder of Parquet parts."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to steer: a Hub id, a folder, or `demo`. [default: the traced one]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port on this machine. [default: 8501 or the next free]")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Don't open a browser window.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Look at a trace and steer the model on a page, served on this machine only; Ctrl+C ends it."""
    found = importlib.util.find_spec("workbench_app")
    if importlib.util.find_spec("streamlit") is None or found is None or found.origin is None:
        raise InputError("the page takes the package streamlit: pip install 'moe-workbench[app]'")
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"--port {port}: expected a number from 1 to 65535.")
    with socket.socket() as probe:
        if port is not None and probe.connect_ex(("localhost", port)) == 0:
            raise InputError(f"--port {port} is in use; choose another, or leave it out to take a free one.")
    if file is not None:
        from workbench import connection

        with connection.reading(file):  # a file that can't be shown is refused before there is a server
            pass
    given = {"TRACE": file and file.resolve(), "MODEL": model, "DEVICE": device, "DTYPE": dtype}
    os.environ.update({f"WORKBENCH_{name}": str(value) for name, value in given.items() if value})
    home = Path(found.origin).parent
    settings = SETTINGS | {"server.headless": str(no_browser).lower(), "theme.base": home / "theme.toml"}
    settings |= {} if port is None else {"server.port": port}
    from streamlit.web import cli

    # Registered first, so done last: where threads outlive an interpreter, DuckDB's bindings print pages about leaks.
    status = {"code": 0}
    atexit.register(lambda: os._exit(status["code"]))
    sys.argv = ["streamlit", "run", str(home / "main.py"), *(f"--{key}={value}" for key, value in settings.items())]
    try:
        cli.main()
    except SystemExit as ended:
        status["code"] = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
