"""A server that runs as a child of this process and serves a folder of weights.

Knows processes, ports and whether a server is healthy; nothing of what is asked of it.
"""

import atexit
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from self_rewarding_lm.errors import ConfigError, ServerError

logger = logging.getLogger(__name__)


HOST = "127.0.0.1"


PLACES = ("{checkpoint}", "{port}")


EXAMPLE = "vllm serve {checkpoint} --port {port} --host 127.0.0.1 --gpu-memory-utilization 0.5"


SHOWN_LINES = 30
"""Lines of a server's log that an error shows."""


POLL_SECONDS = 0.1


POLL_TIMEOUT = 5.0


AFTER_KILL_SECONDS = 10.0


MOST_ANSWER = 2**20
"""Bytes of the answer to a command that are read."""


def check_command(command: str) -> None:
    """Raise ConfigError if a command has no place for the checkpoint or the port."""
    missing = [place for place in PLACES if place not in command]
    if missing:
        raise ConfigError(
            f"launch is the command that serves a folder of weights, such as {EXAMPLE!r}; "
            f"{command!r} lacks {' and '.join(missing)}."
        )


class LaunchedServer:
    """One server process, in a process group of its own. Its log is a file beside the checkpoint.

    start_timeout: seconds within which it must be healthy. stop_timeout: seconds that it has to end
    before it is killed. environment: variables of its process besides those of this one.
    """

    def __init__(
        self,
        command: str,
        checkpoint: Path,
        *,
        start_timeout: float,
        stop_timeout: float,
        environment: Mapping[str, str] = {},
    ) -> None:
        check_command(command)
        self.environment = environment
        self.command, self.checkpoint = command, checkpoint
        self.start_timeout, self.stop_timeout = start_timeout, stop_timeout
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log: Any = None
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it and wait until it is healthy.

        Raises ConfigError if there is no such command, and ServerError with the end of the server's
        log if it ends or is not healthy in time.
        """
        self.log = NamedTemporaryFile(  # noqa: SIM115
            dir=self.checkpoint.parent, prefix="server-", suffix=".log", delete=False
        )
        values = dict(zip(PLACES, (str(self.checkpoint), str(self.port)), strict=True))
        arguments = shlex.split(self.command)
        for place, value in values.items():
            arguments = [argument.replace(place, value) for argument in arguments]
        logger.info("starting %s (log: %s)", shlex.join(arguments), self.log.name)
        atexit.register(self.stop)
        try:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
            self._wait_until_healthy()
        except OSError as error:
            self.stop()
            raise ConfigError(f"launch={self.command!r} cannot be started: {error}") from error
        except BaseException:
            self.stop()
            raise

    def order(self, path: str, body: Mapping[str, Any], api_key: str | None) -> Any:
        """Post a command, which has start_timeout seconds; what comes back, None if it is no JSON.

        Raises ServerError with the server's words, and the end of its log, if it is not done.
        """
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        began = time.monotonic()
        connection = HTTPConnection(HOST, self.port, timeout=self.start_timeout)
        with closing(connection):
            try:
                connection.request("POST", path, json.dumps(body), headers)
                response = connection.getresponse()
                status, content = response.status, response.read(MOST_ANSWER)
            except (OSError, HTTPException) as error:
                raise ServerError(
                    self._failure(f"did not answer POST {path} ({error!r})")
                ) from error
        if status != 200:
            words = content.decode(errors="replace")[:500]
            raise ServerError(self._failure(f"answers POST {path} with status {status}: {words}"))
        logger.info("POST %s: %.1f s", path, time.monotonic() - began)
        with suppress(ValueError):
            return json.loads(content)
        return None

    def stop(self) -> None:
        """Stop it and all its children, and wait until they are gone."""
        process = self.process
        if process is not None:
            self._signal(signal.SIGTERM)
            if not self._ends_within(self.stop_timeout):
                logger.warning(
                    "the server (process %d) still runs %g s after SIGTERM; it is killed",
                    process.pid,
                    self.stop_timeout,
                )
                self._signal(signal.SIGKILL)
                if not self._ends_within(AFTER_KILL_SECONDS):
                    logger.warning("children of the server %d still run", process.pid)
            self.process = None
        if self.log is not None:
            self.log.close()
        atexit.unregister(self.stop)

    def _wait_until_healthy(self) -> None:
        assert self.process is not None
        began = time.monotonic()
        while True:
            code = self.process.poll()
            if code is not None:
                raise ServerError(self._failure(f"ended with exit code {code}"))
            if _is_healthy(self.port):
                logger.info("%s is healthy after %.0f s", self.url, time.monotonic() - began)
                return
            if time.monotonic() - began > self.start_timeout:
                waited = f"was not healthy after {self.start_timeout:g} s (start_timeout)"
                raise ServerError(self._failure(waited))
            time.sleep(POLL_SECONDS)

    def _failure(self, how: str) -> str:
        """How the server failed, with the last lines of its log."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()
        shown = "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) or "  (nothing)"
        return (
            f"the server of launch={self.command!r} {how.rstrip('.')}. The last lines of its log "
            f"({self.log.name}):\n{shown}"
        )

    def _signal(self, number: int) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _ends_within(self, seconds: float) -> bool:
        """Whether the process and its group end within some seconds."""
        assert self.process is not None
        until = time.monotonic() + seconds
        while True:
            self.process.poll()  # reads its exit status, else it stays as a zombie
            try:
                os.killpg(self.process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind((HOST, 0))
        return server.getsockname()[1]


def _is_healthy(port: int) -> bool:
    """Whether GET /health answers 200; if there is no such path, whether GET /v1/models does."""
    status = _status(port, "/health")
    return status == 200 or (status in (404, 405) and _status(port, "/v1/models") == 200)


def _status(port: int, path: str) -> int | None:
    """The status of a GET; None if nothing answers."""
    with closing(HTTPConnection(HOST, port, timeout=POLL_TIMEOUT)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, HTTPException):
            return None
