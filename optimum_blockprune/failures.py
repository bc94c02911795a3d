# SPDX-License-Identifier: Apache-2.0
"""Why a push failed, in words: what happened, what helps, and how to go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .errors import BlockPruningError, HubError


LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or pass token=... (--token)"
_NEW_TOKEN = "Make a token that may write to it at https://huggingface.co/settings/tokens, then `hf auth login`."
_LATER = "Try again later; see https://status.huggingface.co."
_FULL = "Free some space in your storage, make the repository public, or ask for more."
_CAUSES = {
    400: ("The Hub finds the request wrong.", "Mend what it names."),
    401: ("The Hub does not accept the token.", _NEW_TOKEN),
    402: ("The Hub asks for payment first.", _FULL),
    403: ("The token may not write to this repository.", f"{_NEW_TOKEN} Or pass create_pr=True (--create-pr)."),
    404: ("The Hub knows no such repository or branch, or hides it from this token.", "Mind the spelling; log in."),
    409: ("Something else is changing the repository.", "Wait until it is done."),
    412: ("Somebody else committed to this branch during the upload.", "Look at what changed, then push again."),
    413: ("A file is too large for the Hub.", "Save with a smaller max_shard_size."),
    429: ("The Hub limits how often it may be asked.", "Wait some minutes."),
}
_URL_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class Attempt:
    """A push that may fail: how to go on then, and what may not be printed."""

    advice: str
    token: str | bool | None

    def failed(self, what: str, cure: str) -> HubError:
        """Builds the error; links are stripped of what signs them."""
        text = _TOKEN.sub("hf_***", _URL_QUERY.sub(r"\1", f"{what} {cure}"))
        if isinstance(self.token, str) and self.token:
            text = text.replace(self.token, "***")
        return HubError(f"{text} {self.advice}")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns whatever a push raises into `HubError`."""
        try:
            yield
        except BlockPruningError:
            raise
        except Exception as error:  # huggingface_hub, its HTTP library, its threads and hf_xet share no base class
            raise self.failed(*_diagnosis(error)) from error


def _diagnosis(error: Exception) -> tuple[str, str]:
    """What happened and what helps, from the error or from those behind it."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    said = _said(chain)
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return "Offline mode is on.", "Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE."
    if any(isinstance(each, LocalTokenNotFoundError) for each in chain):
        return f"There is no token to log in to the Hub with ({said}).", f"{LOG_IN}."
    codes = (getattr(getattr(each, "response", None), "status_code", None) for each in chain)
    status = next((code for code in codes if code), None)
    if status is not None:
        return _of_status(status, said)
    if isinstance(error, JSONDecodeError):
        return f"The Hub gave an answer that cannot be read ({said}).", _LATER
    if isinstance(error, OSError) and error.filename:
        return f"A file cannot be read: {said}.", "Mend that."
    if any("Timeout" in type(each).__name__ for each in chain):
        return f"The Hub did not answer in time ({said}).", "Try again later; HF_HUB_DOWNLOAD_TIMEOUT sets the limit."
    if any(isinstance(each, (OSError, *HfHubHTTPError.__bases__)) for each in chain):
        return f"The connection to the Hub failed ({said}).", "Check the network."
    return f"The upload failed: {said}.", "Mend that first if it lies in the folder."


def _of_status(status: int, said: str) -> tuple[str, str]:
    what, cure = _CAUSES.get(status, (f"The Hub refused with status {status}.", "Try again later."))
    if status >= 500:
        what, cure = f"The Hub is failing (status {status}).", _LATER
    elif status in (402, 403, 413) and re.search(r"storage|quota|limit reached", said, re.IGNORECASE):
        what, cure = "The storage is full.", _FULL
    return f"{what} ({status}: {said})", cure


def _said(chain: list[BaseException]) -> str:
    """The words of the Hub if it gave a reason; else those of the error, and of the one that a thread failed with."""
    # A ValueError of the client's own (a card that the Hub refuses) says more than the answer behind it.
    own = isinstance(chain[0], ValueError) and not hasattr(chain[0], "response")
    for each in [] if own else chain:
        if getattr(each, "server_message", None):
            return " ".join(each.server_message.split())[:500]
    texts = [str(each) or type(each).__name__ for each in chain[: 2 if isinstance(chain[0], RuntimeError) else 1]]
    return " ".join(" ".join(texts).split())[:500].rstrip(".")
