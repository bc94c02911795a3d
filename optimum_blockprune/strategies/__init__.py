# SPDX-License-Identifier: Apache-2.0
"""Built-in strategies, one module each; found by entry-point name, never imported by another strategy.

To write one: subclass `optimum_blockprune.PruningStrategy` and register it in the entry-point group
`optimum_blockprune.strategies` (see docs/writing-a-strategy.md).
"""
