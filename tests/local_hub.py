# SPDX-License-Identifier: Apache-2.0
"""A server in place of the Hub for the whole suite, started on import: before that of huggingface_hub.

huggingface_hub reads its address and its folders once. Whatever asks for the Hub, in this process or in commands that
it starts, reaches this machine only, and finds neither the cache nor the token of whoever runs the tests.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from hub_server import ACCOUNTS, HubServer


if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before the server that the tests put in place of the Hub.")

HUB = HubServer(ACCOUNTS)
HUB.start()
HUB_HOME = Path(tempfile.mkdtemp(prefix="blockprune-hub-"))
HUB_CACHE = HUB_HOME / "hub"
atexit.register(shutil.rmtree, HUB_HOME, ignore_errors=True)
atexit.register(HUB.stop)

os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": str(HUB_HOME),
    "HF_HUB_CACHE": str(HUB_CACHE),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # the server has no such storage
    "NO_PROXY": "127.0.0.1",
}
for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
