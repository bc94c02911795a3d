# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every architecture, and the truth that pruned ones are held to."""
