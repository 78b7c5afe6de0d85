"""`rollout serve`: an engine behind HTTP, until Ctrl-C or SIGTERM."""

from __future__ import annotations

from typing import Annotated

import typer

from ..config import EngineConfig
from ..errors import ConfigError
from ..server.config import ServerConfig, ServeSettings
from ..settings import load_settings
from .options import (
    ConfigFile,
    Overrides,
    as_overrides,
    as_toml,
    check_model_given,
    setting_option,
)

EPILOG = """[bold]Examples[/bold]

  rollout serve --model PATH

  rollout serve --model PATH --tp-size 2 --port 8000

  rollout serve --model PATH --num-replicas 4

  rollout serve --address ipc:///run/user/1000/engine.sock

  ROLLOUT_API_KEY=... rollout serve --model PATH --host 0.0.0.0

  rollout serve --print-config > serve.toml

[bold]Who may come in[/bold]

  Without a key only processes of this machine, at 127.0.0.1. --api-key may be
  given several times: each key is a client of its own, and then --admin-api-key
  is who may touch weights, memory, pauses and other clients' requests.
"""

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder of the model (engine.model_path).")
]
Address = Annotated[
    str | None,
    typer.Option(help="Serve over this engine or pool of another process, and start none."),
]
Replicas = Annotated[int | None, setting_option(ServeSettings, "num_replicas")]
TpSize = Annotated[int | None, setting_option(EngineConfig, "tp_size")]
Dtype = Annotated[str | None, setting_option(EngineConfig, "dtype")]
Device = Annotated[str | None, setting_option(EngineConfig, "device")]
LoadFormat = Annotated[str | None, setting_option(EngineConfig, "load_format")]
ContextLength = Annotated[int | None, setting_option(EngineConfig, "context_length")]
Host = Annotated[str | None, setting_option(ServerConfig, "host")]
Port = Annotated[int | None, setting_option(ServerConfig, "port")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option("--api-key", envvar="ROLLOUT_API_KEY", help="Key of a client; repeatable."),
]
AdminKey = Annotated[
    str | None,
    typer.Option("--admin-api-key", envvar="ROLLOUT_ADMIN_API_KEY", help="Key of the admin."),
]
ModelName = Annotated[str | None, setting_option(ServerConfig, "served_model_name")]
ChatTemplate = Annotated[str | None, setting_option(ServerConfig, "chat_template")]
CertFile = Annotated[str | None, setting_option(ServerConfig, "ssl_certfile")]
KeyFile = Annotated[str | None, setting_option(ServerConfig, "ssl_keyfile")]
LogLevel = Annotated[str | None, setting_option(ServerConfig, "log_level")]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the settings as TOML and exit.")
]


def serve(
    model: Model = None,
    address: Address = None,
    num_replicas: Replicas = None,
    tp_size: TpSize = None,
    dtype: Dtype = None,
    device: Device = None,
    load_format: LoadFormat = None,
    context_length: ContextLength = None,
    host: Host = None,
    port: Port = None,
    api_keys: ApiKeys = None,
    admin_api_key: AdminKey = None,
    served_model_name: ModelName = None,
    chat_template: ChatTemplate = None,
    ssl_certfile: CertFile = None,
    ssl_keyfile: KeyFile = None,
    log_level: LogLevel = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Serve a model over HTTP; what is not an option here is a setting of --config and --set."""
    options = {
        "engine.model_path": model,
        "engine.tp_size": tp_size,
        "engine.dtype": dtype,
        "engine.device": device,
        "engine.load_format": load_format,
        "engine.context_length": context_length,
        "address": address,
        "num_replicas": num_replicas,
        "server.host": host,
        "server.port": port,
        "server.api_keys": api_keys,
        "server.admin_api_key": admin_api_key,
        "server.served_model_name": served_model_name,
        "server.chat_template": chat_template,
        "server.ssl_certfile": ssl_certfile,
        "server.ssl_keyfile": ssl_keyfile,
        "server.log_level": log_level,
    }
    if model is not None and address is not None:
        raise ConfigError("got --model and --address, expected one of the two")
    if model is None and config is None and (print_config or address is not None):
        options["engine.model_path"] = "PATH"
    else:
        check_model_given(model, config, overrides)
    settings = load_settings(ServeSettings, config, [*(overrides or ()), *as_overrides(options)])
    if print_config:
        typer.echo(as_toml(settings))
        return
    settings.server.check()
    _serve(settings)


def _serve(settings: ServeSettings) -> None:
    try:
        from ..server.launch import serve_settings
    except ImportError as error:
        raise ConfigError(
            f"rollout serve needs {error.name}, which is not installed; pip install 'rollout-sync[server]'"
        ) from None
    serve_settings(settings, lambda url: typer.echo(f"serving at {url}"))
