"""Mistakes, and hubs that cannot be reached, told in one sentence in the place of a traceback."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from ordinal_prompt.checkpoint import is_offline

HUB_PATIENCE = 3  # seconds


class UserError(Exception):
    """A mistake in options or data, told in one sentence and without a traceback."""


@contextlib.contextmanager
def clean_errors(script: str) -> Iterator[None]:
    """Ends the script with a one-line message on a `UserError`, and says how to go on after an interrupt."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{script}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{script}: interrupted; the same command goes on after the last complete epoch") from None


@contextlib.contextmanager
def needs_network(what: str, way_out: str) -> Iterator[None]:
    """Turns the many errors of a hub that cannot be reached into one sentence."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the libraries log what is told below
    try:
        yield
    except Exception as error:
        if not is_offline(error):
            raise
        raise UserError(f"could not download {what}: no hub can be reached; {way_out}.") from error
    finally:
        logging.disable(disabled)


def skip_unreachable_hub() -> None:
    """Where the Hugging Face hub cannot be reached, only its cache is asked from here on.

    huggingface_hub repeats the question for half a minute per file otherwise, even if the hub's name has no address.
    Behind a proxy the hub is always asked.
    """
    if "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
        return
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), HUB_PATIENCE
        ).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True  # it has read the environment already
