# SPDX-License-Identifier: Apache-2.0
"""Tells `optimum-cli` about `optimum-cli blockprune`."""

# Optimum imports every module of this folder at each start of optimum-cli, without a safety net: an import that fails
# here kills every command, `optimum-cli env` included. Hence this one light import and nothing else.
#
# No __init__.py in optimum/, optimum/commands/ or optimum/commands/register/: they are namespace packages that Optimum
# and its plug-ins share, and an __init__.py would hide the others' modules.
from optimum_blockprune.commands import BlockPruneCommand


REGISTER_COMMANDS = [BlockPruneCommand]
