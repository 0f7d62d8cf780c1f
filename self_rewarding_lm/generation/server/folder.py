"""A server on a folder of weights that are written for it: started, asleep, given others, stopped.

Knows folders and one server at a time; nothing of what is asked of it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.server.client import Body
from self_rewarding_lm.generation.server.process import LaunchedServer, check_command
from self_rewarding_lm.generation.server.proof import Proof
from self_rewarding_lm.generation.server.reloading import Reload
from self_rewarding_lm.runs.stage_files import ADAPTER_FILE


class FolderServer:
    """What `command` starts on a folder within `folder`.

    model: the model's name on the server; None for the folder itself. reload: how it takes other
    weights while it runs. start_timeout: seconds within which it starts, and carries out each
    command. stop_timeout: seconds that it has to end.
    """

    def __init__(
        self,
        command: str,
        *,
        folder: str | Path | None,
        model: str | None,
        api_key: str | None,
        reload: Reload | None,
        start_timeout: float,
        stop_timeout: float,
    ) -> None:
        check_command(command)
        if reload is not None and reload.flag not in command:
            raise ConfigError(
                f"with reload the server sleeps while the stage trains, so its command needs "
                f"{reload.flag}, which is missing from {command!r}. (A script of your own that "
                "starts the server can take it as an argument.)"
            )
        self.command, self.folder, self.model, self.api_key = command, folder, model, api_key
        self.reload, self.start_timeout, self.stop_timeout = reload, start_timeout, stop_timeout
        self.proof = Proof()
        self._server: LaunchedServer | None = None
        self._work: Path | None = None
        self._weights = Path()
        self._loads = 0

    @property
    def runs(self) -> bool:
        return self._server is not None

    def give(self, save: Callable[[Path], None]) -> tuple[str, str]:
        """Have the weights that `save` writes served; the address and the model's name there.

        Raises ConfigError if there is no such command, ServerError if the server does not start, or
        refuses the weights.
        """
        if self._server is None:
            self._start(save)
        else:
            self._reload(save)
        assert self._server is not None
        return self._server.url, self.model or str(self._server.checkpoint)

    def sleep(self) -> None:
        """Let go of the device's memory until the next weights come."""
        assert self.reload is not None
        self.reload.sleep(self._order, is_adapter=self._is_adapter)

    def stop(self) -> None:
        """End the server, and delete the weights that were written for it; its log stays."""
        if self._server is not None:
            self._server.stop()
            self._server = None
            self.proof = Proof()
        if self._work is not None:
            for folder in self._work.glob("model*"):
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _is_adapter(self) -> bool:
        return (self._weights / ADAPTER_FILE).exists()

    def _start(self, save: Callable[[Path], None]) -> None:
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        self._work = Path(mkdtemp(prefix="served-", dir=self.folder)).absolute()
        self._weights, self._loads = self._work / "model", 0
        try:
            self._weights.mkdir()
            save(self._weights)
            if self.reload is not None and self._is_adapter and self.model is None:
                raise ConfigError(
                    "reload gives the server each stage's adapter by its name: give model=, the "
                    "name that --lora-modules (vLLM) or --lora-paths (SGLang) has for {checkpoint}."
                )
            server = LaunchedServer(
                self.command,
                self._weights,
                start_timeout=self.start_timeout,
                stop_timeout=self.stop_timeout,
                environment=self.reload.environment if self.reload is not None else {},
            )
            server.start()
        except BaseException:
            self.stop()
            raise
        self._server = server

    def _reload(self, save: Callable[[Path], None]) -> None:
        """Write weights, and have the server take them.

        A whole model is written over the one that the command names. An adapter has a new folder
        each time, since caches of a server may know adapters by their folders.
        """
        assert self.reload is not None
        old, self._loads = self._weights, self._loads + 1
        if self._is_adapter:
            self._weights = old.with_name(f"model-{self._loads}")
            self._weights.mkdir()
        save(self._weights)
        self.reload.wake(self._order, self._weights, self.model if self._is_adapter else None)
        if old != self._weights and old.name != "model":
            shutil.rmtree(old, ignore_errors=True)

    def _order(self, path: str, body: Body) -> Any:
        assert self._server is not None
        return self._server.order(path, body, self.api_key)
