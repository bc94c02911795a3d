# SPDX-License-Identifier: Apache-2.0
"""A plug-in that cannot be imported, as when something it needs is not installed."""

raise ImportError("the demo plug-in is broken on purpose")
